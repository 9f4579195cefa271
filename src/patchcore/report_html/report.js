/* The gallery, the thresholds, the large view and the sortable tables of report.html; a module, hence strict. */
const PAGE_SIZE = 24; // cards that are added at a time
const classes = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const state = { shown: 0, thresholds: classes.map((c) => c.methods.map((m) => m.start)), limit: PAGE_SIZE, ids: [] };
const current = () => classes[state.shown];
const threshold = (m) => state.thresholds[state.shown][m];
const isAlarm = (m, i) => current().methods[m].values[i] > threshold(m);
const isWrong = (m, i) => isAlarm(m, i) !== current().images[i].bad;

/* Text goes in as text alone, never as markup: names of files may hold anything. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function drawing(size, lines) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", `0 0 ${size[0]} ${size[1]}`);
  svg.setAttribute("aria-hidden", "true");
  for (const [kind, line] of lines) {
    if (line) {
      const path = document.createElementNS(space, "path");
      path.setAttribute("d", line);
      path.setAttribute("class", kind);
      svg.append(path);
    }
  }
  return svg;
}

// --- Decisions ------------------------------------------------------------------------------------------------

function outcome(m, i) {
  const { bad } = current().images[i];
  if (isAlarm(m, i)) {
    return bad ? "found" : "false alarm";
  }
  return bad ? "missed" : "passed";
}

function counts(m) {
  const count = { found: 0, missed: 0, "false alarm": 0, passed: 0 };
  current().images.forEach((_, i) => {
    count[outcome(m, i)] += 1;
  });
  return count;
}

const ratio = (part, whole) => (whole ? (part / whole).toFixed(3) : "–");
const short = (value) => Number(value.toPrecision(4)).toString();

function showCounts() {
  current().methods.forEach((_, m) => {
    const count = counts(m);
    const cells = byId("thresholds").tBodies[0].rows[m].querySelectorAll("[data-count]");
    const texts = [
      count.found,
      count.missed,
      count["false alarm"],
      count.passed,
      ratio(count.found, count.found + count["false alarm"]),
      ratio(count.found, count.found + count.missed),
    ];
    cells.forEach((cell, k) => {
      cell.textContent = texts[k];
    });
  });
}

function thresholdRow(method, m) {
  const low = method.calibrated ? 0 : Math.min(...method.values);
  const high = method.calibrated ? 1 : Math.max(...method.values);
  const step = method.calibrated ? 0.001 : (high - low) / 1000 || 1;
  const limits = { min: low, max: high, step };
  const slider = element("input", { type: "range", ...limits, "aria-label": `threshold of ${method.label}` });
  const field = element("input", {
    type: "number", step: "any", "aria-label": `threshold of ${method.label} as a number`,
  });
  const reset = element("button", { type: "button", class: "reset", title: "back to where it was" }, "reset");
  const set = (value, source) => {
    state.thresholds[state.shown][m] = value;
    if (source !== slider) {
      slider.value = value;
    }
    if (source !== field) {
      field.value = short(value);
    }
    showCounts();
    update();
  };
  slider.value = threshold(m);
  field.value = short(threshold(m));
  slider.addEventListener("input", () => set(slider.valueAsNumber, slider));
  field.addEventListener("input", () => {
    if (Number.isFinite(field.valueAsNumber)) {
      set(field.valueAsNumber, field);
    }
  });
  reset.addEventListener("click", () => set(method.start, reset));
  const row = element(
    "tr", {},
    element("th", { scope: "row" }, method.label),
    element("td", { class: "threshold" }, element("div", { class: "setting" }, slider, field, reset)),
  );
  for (const label of ["found", "missed", "false alarms", "passed", "precision", "recall"]) {
    row.append(element("td", { class: "number", "data-label": label, "data-count": label }));
  }
  return row;
}

// --- Gallery --------------------------------------------------------------------------------------------------

/* `m` is a method, or -1 for the image alone. */
function frame(image, m) {
  const entry = m < 0 ? {} : image.maps[m] || {};
  const box = element("span", { class: "frame" });
  const size = image.size ? { width: image.size[0], height: image.size[1] } : {}; // the ratio, before it is decoded
  if (image.picture) {
    box.append(element("img", { src: image.picture, alt: "", ...size, class: entry.heat ? "under-heat" : "plain" }));
  }
  if (entry.heat) {
    box.append(element("img", { src: entry.heat, alt: "", ...size, class: "heat" }));
  }
  if (m >= 0 ? !entry.heat : !image.picture) {
    box.classList.add("blank");
    box.replaceChildren(element("span", { class: "empty" }, m >= 0 ? "no heat map" : "no picture"));
  } else if (image.size) {
    box.append(drawing(image.size, [["truth-line", image.truth], ["decision-line", entry.outline]]));
  }
  return box;
}

function scoreText(m, i) {
  const method = current().methods[m];
  return `score ${method.values[i].toFixed(method.calibrated ? 3 : 4)}`;
}

function areaText(image, m) {
  const entry = image.maps[m];
  if (!entry || entry.areaPx === undefined) {
    return "";
  }
  return `defect area ${entry.areaPx}\u00A0px, ${(100 * entry.areaShare).toFixed(2)}\u00A0%`;
}

function decisionText(m, i) {
  const wrong = isWrong(m, i);
  const called = isAlarm(m, i) ? "anomalous" : "normal";
  return [`${called} ${wrong ? "✗" : "✓"} ${outcome(m, i)}`, wrong ? "is-wrong" : "is-right"];
}

function description(m, i) {
  const image = current().images[i];
  const truth = image.bad ? image.type : "good";
  if (m < 0) {
    return `${image.path}, ${truth}: test image${image.truth ? " with the outline of the true defect" : ""}`;
  }
  const facts = [scoreText(m, i), decisionText(m, i)[0], areaText(image, m)].filter(Boolean).join(", ");
  return `${image.path}, ${truth}, ${current().methods[m].label}: ${facts}`;
}

const cards = new Map(); // index of an image -> its card and the parts that follow the thresholds

function card(i) {
  if (cards.has(i)) {
    return cards.get(i);
  }
  const image = current().images[i];
  const truth = element("span", { class: "badge" }, image.bad ? `defective: ${image.type}` : "good");
  const views = element("div", { class: "views" });
  const texts = [];
  for (let m = -1; m < current().methods.length; m += 1) {
    const button = element("button", { type: "button", class: "view" }, frame(image, m));
    button.addEventListener("click", () => openViewer(i, Math.max(m, 0)));
    const facts = element("span", { class: "facts" });
    if (m < 0) {
      const size = image.truthPx === undefined ? "" : `, true defect ${image.truthPx}\u00A0px`;
      facts.append(element("b", {}, "image"), image.bad ? size : "");
      button.setAttribute("aria-label", description(m, i));
    } else {
      const decision = element("span", { class: "decision-text" });
      facts.append(element("b", {}, current().methods[m].label), ` ${scoreText(m, i)}`, decision, areaText(image, m));
      texts.push({ m, decision, button });
    }
    button.append(facts);
    views.append(button);
  }
  const title = element("h3", {}, image.path, " ", truth);
  const made = { node: element("article", { class: "card", "data-image": i }, title, views), texts };
  cards.set(i, made);
  return made;
}

function refresh(i) {
  for (const { m, decision, button } of card(i).texts) {
    const [text, kind] = decisionText(m, i);
    if (decision.textContent !== text) {
      decision.textContent = text;
      decision.className = `decision-text ${kind}`;
      button.setAttribute("aria-label", description(m, i));
    }
  }
  return card(i).node;
}

/* Whether an image is to be shown, given the methods that the filter is about. */
function isWanted(i, methods) {
  const { bad } = current().images[i];
  switch (byId("show").value) {
    case "wrong": return methods.some((m) => isWrong(m, i));
    case "alarms": return !bad && methods.some((m) => isAlarm(m, i));
    case "misses": return bad && methods.some((m) => !isAlarm(m, i));
    case "split": return new Set(methods.map((m) => isAlarm(m, i))).size > 1;
    case "good": return !bad;
    case "bad": return bad;
    default: return true;
  }
}

/* The methods that filter and order are about: one, or all. */
function chosenMethods() {
  const all = current().methods.map((_, m) => m);
  const chosen = Number(byId("of").value);
  return chosen < 0 || byId("show").value === "split" ? all : [chosen];
}

/* What images are ordered by; scores of several methods have different units, so that their ranks are taken. */
function sortKey(i) {
  const { methods, images } = current();
  if (byId("sort").value === "disagreement") {
    return images[i].disagreement;
  }
  const chosen = Number(byId("of").value);
  return chosen < 0 ? images[i].rank : methods[chosen].values[i];
}

function update() {
  const methods = chosenMethods();
  const ids = current().images.map((_, i) => i).filter((i) => isWanted(i, methods));
  const order = byId("sort").value;
  if (order !== "name") {
    const sign = order === "low" ? 1 : -1;
    ids.sort((a, b) => sign * (sortKey(a) - sortKey(b)) || a - b);
  }
  state.ids = ids;
  const seen = ids.slice(0, state.limit);
  const gallery = byId("gallery");
  const nodes = seen.map(refresh);
  if (nodes.length !== gallery.children.length || nodes.some((node, k) => gallery.children[k] !== node)) {
    gallery.replaceChildren(...nodes);
  }
  const parts = [`${ids.length} of ${current().images.length} images`];
  if (ids.length > seen.length) {
    parts.push(`the first ${seen.length} shown`);
  }
  if (["score", "low"].includes(order) && Number(byId("of").value) < 0 && current().methods.length > 1) {
    parts.push("ordered by the mean of the methods' ranks");
  }
  byId("status").textContent = parts.join(", ");
  const chosen = (id) => byId(id).selectedOptions[0].text;
  byId("print-title").textContent = `Class ${current().name}: ${chosen("show")} of ${chosen("of")}, ${chosen("sort")}`;
  byId("more").hidden = ids.length <= seen.length;
}

function restart() {
  state.limit = PAGE_SIZE;
  update();
}

function notes() {
  const without = current().methods.filter((m) => !m.calibrated).map((m) => m.label);
  const lines = ["Normalised scores run from 0 to 1, with the threshold of the run at 0.5."];
  if (without.length) {
    lines.push(
      `No threshold was calibrated for ${without.join(", ")}: raw scores; the slider starts where 5 % of the good test images lie above.`,
    );
  }
  byId("threshold-note").textContent = lines.join(" ");
  const relative = current().methods.filter((m) => m.scale && !m.scale.calibrated).map((m) => m.label);
  byId("scale-note").textContent = relative.length
    ? `. For ${relative.join(", ")} no pixel threshold is stored: dark is the median pixel of the good test images, the mark the level that 5 % of these images exceed somewhere.`
    : "";
}

function selectClass(number) {
  state.shown = number;
  cards.clear();
  byId("thresholds").tBodies[0].replaceChildren(...current().methods.map(thresholdRow));
  const labels = current().methods.map((method, m) => element("option", { value: m }, method.label));
  byId("of").replaceChildren(element("option", { value: -1 }, "any method"), ...labels);
  byId("viewer-method").replaceChildren(...labels.map((label) => label.cloneNode(true)));
  notes();
  showCounts();
  restart();
}

// --- Large view -----------------------------------------------------------------------------------------------

const viewer = byId("viewer");
const large = { image: 0, method: 0 };

function drawViewer() {
  const image = current().images[large.image];
  const hasHeat = Boolean(image.maps[large.method]?.heat);
  const box = frame(image, hasHeat ? large.method : -1);
  const [width, height] = image.size || [1, 1];
  box.style.width = `min(100%, ${(64 * width) / height}dvh)`;
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", description(large.method, large.image));
  byId("stage").replaceChildren(box);
  byId("viewer-title").textContent = `${image.path} (${image.bad ? `defective: ${image.type}` : "good"})`;
  byId("viewer-method").value = large.method;
  const place = `image ${state.ids.indexOf(large.image) + 1} of ${state.ids.length}`;
  const facts = [
    current().methods[large.method].label, scoreText(large.method, large.image),
    decisionText(large.method, large.image)[0], areaText(image, large.method), hasHeat ? "" : "no heat map", place,
  ];
  byId("viewer-facts").textContent = facts.filter(Boolean).join(" · ");
  drawOverlay();
}

function drawOverlay() {
  const part = (kind) => byId("stage").querySelector(kind);
  const heat = part(".heat");
  if (heat) {
    heat.style.opacity = byId("opacity").value;
    part(".under-heat")?.style.setProperty("filter", `grayscale(${byId("opacity").value})`);
  }
  part(".decision-line")?.style.setProperty("display", byId("contour").checked ? "inline" : "none");
  part(".truth-line")?.style.setProperty("display", byId("truth").checked ? "inline" : "none");
}

function openViewer(i, m) {
  Object.assign(large, { image: i, method: m });
  drawViewer();
  viewer.showModal();
}

function turn(step) {
  const place = state.ids.indexOf(large.image);
  const count = state.ids.length;
  if (count) {
    large.image = state.ids[(place + step + count) % count];
    drawViewer();
  }
}

function changeMethod(step) {
  const count = current().methods.length;
  large.method = (large.method + step + count) % count;
  drawViewer();
}

viewer.addEventListener("keydown", (event) => {
  const uses = event.target.matches("input[type=range], select"); // these have a use of their own for arrows
  const action = { ArrowLeft: [turn, -1], ArrowRight: [turn, 1], ArrowUp: [changeMethod, -1], ArrowDown: [changeMethod, 1] }[event.key];
  if (action && !uses) {
    event.preventDefault();
    action[0](action[1]);
  }
});
viewer.addEventListener("click", (event) => {
  if (event.target === viewer) { // the backdrop
    viewer.close();
  }
});
viewer.addEventListener("close", () => {
  cards.get(large.image)?.node.querySelectorAll(".view")[large.method + 1]?.focus();
});
byId("close").addEventListener("click", () => viewer.close());
byId("previous").addEventListener("click", () => turn(-1));
byId("next").addEventListener("click", () => turn(1));
byId("viewer-method").addEventListener("change", (event) => {
  large.method = Number(event.target.value);
  drawViewer();
});
for (const id of ["opacity", "contour", "truth"]) {
  byId(id).addEventListener("input", drawOverlay);
}

// --- Tables ---------------------------------------------------------------------------------------------------

function sortTable(table, column) {
  const head = table.tHead.rows[0].cells[column];
  const descending = head.getAttribute("aria-sort") === "ascending" || (!head.hasAttribute("aria-sort") && head.classList.contains("number"));
  const isNumber = head.classList.contains("number");
  const key = (row) => row.cells[column].dataset.key;
  const rows = [...table.tBodies[0].rows].toSorted((a, b) => {
    if (!key(a) || !key(b)) {
      return Number(!key(a)) - Number(!key(b)); // blank cells last, in either direction
    }
    const difference = isNumber ? key(a) - key(b) : key(a).localeCompare(key(b), undefined, { numeric: true });
    return descending ? -difference : difference;
  });
  for (const cell of table.tHead.rows[0].cells) {
    cell.removeAttribute("aria-sort");
  }
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    cell.querySelector("button").addEventListener("click", () => sortTable(table, column));
  });
}

// --- Controls -------------------------------------------------------------------------------------------------

byId("class").append(...classes.map((c, k) => element("option", { value: k }, c.name)));
byId("class").addEventListener("change", (event) => selectClass(Number(event.target.value)));
for (const id of ["show", "of", "sort"]) {
  byId(id).addEventListener("change", restart);
}
byId("lines").addEventListener("change", (event) => {
  byId("gallery").classList.toggle("without-lines", !event.target.checked);
});
byId("more").addEventListener("click", () => {
  state.limit += PAGE_SIZE;
  update();
});
byId("print").addEventListener("click", () => window.print());

/* Paper has no "more" button: all images of the class that pass the filter are printed. */
let limitOnScreen = PAGE_SIZE;
window.addEventListener("beforeprint", () => {
  limitOnScreen = state.limit;
  state.limit = Infinity;
  update();
});
window.addEventListener("afterprint", () => {
  state.limit = limitOnScreen;
  update();
});

selectClass(0);

"""The report page in a real browser: what a person clicks, and what it then shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headless import Browser
from in_process import invoke, read_rows
from PIL import Image
from scipy.ndimage import gaussian_filter
from synthetic_runs import PIXEL_SCALE, PREPROCESSING, ground_truth, write_images, write_run

from patchcore.cli import compare_results
from patchcore.storage.run_folder import write_anomaly_maps

pytestmark = pytest.mark.slow

SIZE_LIMIT_BYTES = 25_000_000
ANSWER_LIMIT_MS = 1000  # the aim is 100 ms; a busy machine is no reason to fail


def page_of(tmp_path: Path, *folders: Path) -> Path:
    finished = invoke(compare_results, *folders, "--html", "--out", tmp_path / "out")
    assert finished.code == 0, finished.err
    return tmp_path / "out" / "report.html"


@pytest.fixture
def two_methods(tmp_path: Path) -> list[Path]:
    """Two runs on two classes with pictures; 20 images a class."""
    for category in ("plate", "rod"):
        write_images(tmp_path / "data", ground_truth(category, 8, 6)[0])
    return [
        write_run(tmp_path, "PC", ["plate", "rod"], quality=2.0, data_path=tmp_path / "data"),
        write_run(tmp_path, "FLOW", ["plate", "rod"], method="fastflow", quality=1.0, data_path=tmp_path / "data"),
    ]


def rows_of(run: Path, row_name: str = "mpdd_plate") -> dict[str, dict[str, str]]:
    return {row["path"]: row for row in read_rows(run / "anomaly_scores" / f"{row_name}.csv")}


def expected_counts(run: Path, threshold: float, row_name: str = "mpdd_plate") -> list[str]:
    """Return what a row of the page must say, from the csv alone."""
    found = missed = alarms = passed = 0
    for row in rows_of(run, row_name).values():
        bad, called = row["label"] == "1", float(row["normalized_score"]) > threshold
        found, missed = found + (bad and called), missed + (bad and not called)
        alarms, passed = alarms + (not bad and called), passed + (not bad and not called)
    precision = f"{found / (found + alarms):.3f}" if found + alarms else "\u2013"
    return [str(found), str(missed), str(alarms), str(passed), precision, f"{found / (found + missed):.3f}"]


def shown_counts(browser: Browser, method: int) -> list[str]:
    return browser.texts(f"#thresholds tbody tr:nth-child({method + 1}) [data-count]")


def shown_paths(browser: Browser) -> list[str]:
    """Return the images of the gallery in their order."""
    found: list[str] = browser.run(
        "const c = JSON.parse(document.getElementById('data').textContent)[document.getElementById('class').value];"
        "return [...document.querySelectorAll('#gallery .card')].map((e) => c.images[e.dataset.image].path)"
    )
    return found


def slider(method: int) -> str:
    return f"#thresholds tbody tr:nth-child({method + 1}) input[type=range]"


def test_counts_are_those_of_the_csv_at_three_thresholds(
    tmp_path: Path, two_methods: Sequence[Path], browser: Browser
) -> None:
    browser.open(page_of(tmp_path, *two_methods))
    for threshold in (0.5, 0.2, 0.65):
        for number, run in enumerate(two_methods):
            browser.choose(slider(number), str(threshold))
            assert shown_counts(browser, number) == expected_counts(run, threshold)
    browser.choose("#class", "1")  # a class has thresholds of its own
    for number, run in enumerate(two_methods):
        assert shown_counts(browser, number) == expected_counts(run, 0.5, "mpdd_rod")
        decisions = [row["decision"] == "1" for row in rows_of(run, "mpdd_rod").values()]
        counts = shown_counts(browser, number)
        assert int(counts[0]) + int(counts[2]) == sum(decisions)
    browser.choose("#class", "0")
    assert shown_counts(browser, 0) == expected_counts(two_methods[0], 0.65)
    browser.find("#thresholds .reset").click()
    assert shown_counts(browser, 0) == expected_counts(two_methods[0], 0.5)
    browser.choose("#thresholds input[type=number]", "0.123456")
    assert shown_counts(browser, 0) == expected_counts(two_methods[0], 0.123456)


def test_filters_follow_the_threshold(tmp_path: Path, two_methods: Sequence[Path], browser: Browser) -> None:
    browser.open(page_of(tmp_path, *two_methods))
    tables = [rows_of(run) for run in two_methods]
    paths = sorted(tables[0])
    browser.choose("#sort", "name")
    assert shown_paths(browser) == paths
    for threshold in (0.5, 0.3):
        browser.choose(slider(0), str(threshold))
        limits = (threshold, 0.5)
        called = [
            {p: float(rows[p]["normalized_score"]) > limit for p in paths}
            for rows, limit in zip(tables, limits, strict=True)
        ]
        bad = {p: tables[0][p]["label"] == "1" for p in paths}
        expected = {
            ("alarms", "0"): [p for p in paths if called[0][p] and not bad[p]],
            ("misses", "0"): [p for p in paths if not called[0][p] and bad[p]],
            ("wrong", "1"): [p for p in paths if called[1][p] != bad[p]],
            ("wrong", "-1"): [p for p in paths if any(c[p] != bad[p] for c in called)],
            ("split", "0"): [p for p in paths if called[0][p] != called[1][p]],
            ("good", "-1"): [p for p in paths if not bad[p]],
        }
        for (show, of), wanted in expected.items():
            browser.choose("#of", of)
            browser.choose("#show", show)
            assert shown_paths(browser) == wanted, (threshold, show, of)
            assert browser.find("#status").text.startswith(f"{len(wanted)} of 20 images")
        texts = browser.texts(".card .decision-text")
        assert texts and all(t.split()[0] in ("anomalous", "normal") for t in texts)


def test_order_by_score_and_by_disagreement(tmp_path: Path, two_methods: Sequence[Path], browser: Browser) -> None:
    browser.open(page_of(tmp_path, *two_methods))
    first, second = (rows_of(run) for run in two_methods)
    paths = sorted(first)
    browser.choose("#of", "1")
    assert shown_paths(browser) == sorted(paths, key=lambda p: -float(second[p]["score"]))
    browser.choose("#sort", "low")
    assert shown_paths(browser) == sorted(paths, key=lambda p: float(second[p]["score"]))
    browser.choose("#sort", "disagreement")
    ranks = [
        {p: sum(float(rows[q]["score"]) < float(rows[p]["score"]) for q in paths) for p in paths}
        for rows in (first, second)
    ]
    assert shown_paths(browser) == sorted(paths, key=lambda p: -abs(ranks[0][p] - ranks[1][p]))


def test_tables_are_sorted_by_a_click(tmp_path: Path, two_methods: Sequence[Path], browser: Browser) -> None:
    browser.open(page_of(tmp_path, *two_methods))
    cells = "#overview tbody tr td:nth-child(2)"
    values = sorted(browser.texts(cells))
    button = browser.find("#overview thead th:nth-child(2) button")
    for direction, expected in (("descending", values[::-1]), ("ascending", values)):
        button.send_keys("\n")  # from the keyboard
        assert browser.texts(cells) == expected
        assert browser.find("#overview thead th:nth-child(2)").get_attribute("aria-sort") == direction


def test_the_large_view(tmp_path: Path, two_methods: Sequence[Path], browser: Browser) -> None:
    browser.open(page_of(tmp_path, *two_methods))
    browser.choose("#sort", "name")
    paths = shown_paths(browser)
    browser.find(".card:nth-child(2) .view:nth-child(3)").click()  # the second method
    assert browser.run("return document.getElementById('viewer').open")
    assert paths[1] in browser.find("#viewer-title").text
    assert browser.find("#viewer-facts").text.startswith("FLOW · score 0.")
    right, up, left = "\ue014", "\ue013", "\ue012"
    pressed = ((right, 2, "FLOW"), (up, 2, "PC"), (left, 1, "PC"), (left, 0, "PC"), (left, 19, "PC"))
    for key, place, label in pressed:
        browser.press(key)
        assert paths[place] in browser.find("#viewer-title").text
        assert browser.find("#viewer-facts").text.startswith(label)
    style = "return getComputedStyle(document.querySelector('#stage ' + arguments[0]))[arguments[1]]"
    browser.choose("#opacity", "0.25")
    assert browser.run(style, ".heat", "opacity") == "0.25"
    browser.find("#close").click()
    defective = next(i for i, p in enumerate(paths) if "/dent/" in p)
    browser.find(f".card:nth-child({defective + 1}) .view:nth-child(2)").click()
    for box, line in (("#contour", ".decision-line"), ("#truth", ".truth-line")):
        assert browser.run(style, line, "display") == "inline"
        browser.find(box).click()
        assert browser.run(style, line, "display") == "none"
    browser.find("#next").click()
    assert paths[defective + 1] in browser.find("#viewer-title").text
    browser.press("\ue00c")
    assert not browser.run("return document.getElementById('viewer').open")


def test_keyboard_alone_reaches_an_image(tmp_path: Path, two_methods: Sequence[Path], browser: Browser) -> None:
    browser.open(page_of(tmp_path, *two_methods))
    browser.run("document.querySelector('.card .view').focus()")
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    browser.press("\t")
    assert browser.run("return document.activeElement.className") == "view"
    assert browser.run(outline) != "none"
    browser.press("\n")
    assert browser.run("return document.getElementById('viewer').open")
    names = browser.run(
        "return [...document.querySelectorAll('input, select, button, img')].filter((e) => e.offsetParent && !("
        "e.getAttribute('aria-label') || e.labels?.length || e.textContent.trim() || e.hasAttribute('alt'))).length"
    )
    assert names == 0  # every control has a name


def test_a_phone_shows_it_all_without_scrolling_sideways(
    tmp_path: Path, two_methods: Sequence[Path], browser: Browser
) -> None:
    browser.resize(390, 844, mobile=True)
    browser.open(page_of(tmp_path, *two_methods))
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    browser.find(".card .view:nth-child(2)").click()
    assert browser.run("return document.getElementById('viewer').getBoundingClientRect().right") <= 390


def test_paper_has_every_image_of_the_filter(tmp_path: Path, browser: Browser) -> None:
    run = write_run(tmp_path, "PC", num_good=40)
    browser.open(page_of(tmp_path, run))
    assert len(shown_paths(browser)) == 24
    browser.run(
        "window.printed = 0; addEventListener('beforeprint',"
        "() => { window.printed = document.querySelectorAll('.card').length; })"
    )
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    frame = browser.find(".view:nth-child(2) .frame").size
    assert frame["height"] == pytest.approx(frame["width"], abs=2)
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert browser.printed().startswith(b"%PDF")
    assert browser.run("return window.printed") == 52
    assert len(shown_paths(browser)) == 24
    browser.find("#more").click()
    assert len(shown_paths(browser)) == 48


def test_hostile_names_run_nothing(tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = '<\\script><script>window.hacked=1<\\script><img src=x onerror="window.hacked=1">'
    monkeypatch.setattr("synthetic_runs.DEFECT_TYPES", (hostile, '"><svg onload="window.hacked=1">'))
    browser.open(page_of(tmp_path, write_run(tmp_path, hostile, [hostile], command=f"</script>{hostile}")))
    browser.find(".card .view").click()
    assert browser.run("return window.hacked") is None
    assert hostile in browser.find("#viewer-title").text
    assert browser.texts("#class option") == [f"mpdd_{hostile}"]


def write_large_runs(root: Path, num_images: int, num_methods: int) -> list[Path]:
    """Write runs with maps and pictures of the size that the commands give by default, 224 px."""
    num_good = num_images // 3
    paths, _, small = ground_truth("plate", num_good, (num_images - num_good) // 2)
    rng = np.random.default_rng(0)
    for path in paths:  # as hard to compress as photographs of metal
        texture = gaussian_filter(rng.normal(0, 1, (256, 256)), 1.5) * 60 + rng.normal(0, 6, (256, 256)) + 120
        (root / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(texture, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(root / "data" / path, format="PNG", compress_level=1)
    masks = np.kron(small, np.ones((7, 7), np.uint8))
    folders = []
    for number in range(num_methods):
        folder = write_run(
            root,
            f"M{number}",
            method_config={"num_nn": number},
            num_good=num_good,
            num_per_type=(num_images - num_good) // 2,
            quality=1.0 + number / 3,
            save_maps=False,
            preprocessing={**PREPROCESSING, "resize_px": 256, "imagesize_px": 224},
            data_path=root / "data",
        )
        maps = [gaussian_filter(rng.normal(0, 10, mask.shape) + 4 * mask, 4) for mask in masks]
        path = folder / "anomaly_scores" / "mpdd_plate.npz"
        write_anomaly_maps(path, np.array(maps, np.float32), masks, paths, pixel_scale=PIXEL_SCALE)
        folders.append(folder)
    return folders


ANSWER_TIME = """
const done = arguments[arguments.length - 1];
const e = document.querySelector(arguments[0]);
const started = performance.now();
e.value = arguments[1];
e.dispatchEvent(new Event("input", {bubbles: true}));
e.dispatchEvent(new Event("change", {bubbles: true}));
document.body.getBoundingClientRect();  // with the layout
const script = performance.now() - started;
requestAnimationFrame(() => setTimeout(() => done([script, performance.now() - started])));  // until it is painted
"""


def test_300_images_and_five_methods(
    tmp_path: Path, browser: Browser, record_property: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchcore.comparison.measurement.NUM_RESAMPLES", 10)  # intervals are not looked at
    page = page_of(tmp_path, *write_large_runs(tmp_path, 300, 5))
    size = page.stat().st_size
    assert size < SIZE_LIMIT_BYTES
    classes = json.loads(page.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0])
    assert all("picture" in image and len(image["maps"]) == 5 for image in classes[0]["images"])
    browser.open(page)
    times = {}
    for name, selector, value in (
        ("slider", slider(0), "0.4"),
        ("slider back", slider(0), "0.5"),
        ("filter", "#show", "misses"),
        ("all", "#show", "all"),
        ("sort", "#sort", "disagreement"),
    ):
        times[name] = browser.driver.execute_async_script(ANSWER_TIME, selector, value)
    shown = ", ".join(f"{name} {script:.0f} ms ({painted:.0f} ms painted)" for name, (script, painted) in times.items())
    print(f"\nreport of 300 images and 5 methods: {size / 1e6:.1f} MB; {shown}")
    record_property("report", shown)
    assert max(painted for _, painted in times.values()) < ANSWER_LIMIT_MS, shown

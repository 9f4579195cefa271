"""The report page without a browser: its data, its pictures, and that nothing in a file name becomes markup."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, small_run
from in_process import invoke, read_rows
from PIL import Image
from synthetic_runs import PIXEL_SCALE, THRESHOLD, ground_truth, write_images, write_run

from patchcore.cli import compare_results, run_patchcore
from patchcore.comparison import compare
from patchcore.configs import PreprocessingConfig
from patchcore.evaluation.plots.pictures import HeatScale
from patchcore.report_html import gallery as gallery_module
from patchcore.report_html.gallery import GalleryClass, GalleryMethod, MethodMaps, gallery_data
from patchcore.report_html.pictures import (
    MAX_OUTLINE_CHARS,
    ImageFolder,
    display_scale,
    heat_bytes,
    image_bytes,
    outline_path,
)

STYLE = REPOSITORY / "src" / "patchcore" / "report_html" / "report.css"
HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">\u202e\n'


@pytest.fixture(autouse=True)
def blank_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a second, and the plots have tests of their own."""
    for name in (n for n in vars(compare) if n.endswith("_picture")):
        monkeypatch.setattr(compare, name, lambda *_: Image.new("RGB", (8, 8)))


class Page(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        elif self.cdata_elem is None:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def classes(self) -> list[dict[str, Any]]:
        loaded: list[dict[str, Any]] = json.loads(self.scripts[0])
        return loaded


def report_of(tmp_path: Path, *folders: Path) -> Page:
    finished = invoke(compare_results, *folders, "--html", "--out", tmp_path / "out")
    assert finished.code == 0, finished.err
    assert f"report: {tmp_path / 'out' / 'report.html'}" in finished.out
    return Page(tmp_path / "out" / "report.html")


def decoded(uri: str) -> np.ndarray:
    assert uri.startswith("data:image/webp;base64,")
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        return np.asarray(picture.convert("RGB"))


def polygons(path: str) -> list[np.ndarray]:
    """Return the corners (x, y) of each closed polygon of an SVG path."""
    pieces = re.findall(r"M([^MZ]*)Z", path)
    return [np.array([[float(n) for n in p.split()] for p in piece.split("L")]) for piece in pieces]


def area(path: str) -> float:
    """Return the enclosed area by the shoelace formula, holes taken off by their opposite direction."""
    total = 0.0
    for corners in polygons(path):
        x, y = corners.T
        total += 0.5 * float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))
    return abs(total)


# --- The page ---------------------------------------------------------------------------------------------------------


def test_the_page_holds_the_scores_the_pictures_and_the_runs(tmp_path: Path) -> None:
    paths, types, masks = ground_truth("plate", 8, 6)
    write_images(tmp_path / "data", paths)
    runs = [
        write_run(tmp_path, "PC", data_path=tmp_path / "data", command="bin/run_patchcore.py --seed 0 'a b'"),
        write_run(tmp_path, "FLOW", method="fastflow", quality=1.0, data_path=tmp_path / "data"),
        write_run(tmp_path, "KNN", method="resnet_knn", maps=False, data_path=tmp_path / "data"),
    ]
    page = report_of(tmp_path, *runs)
    (shown,) = page.classes
    assert [m["label"] for m in shown["methods"]] == ["PC", "FLOW", "KNN"]
    order = sorted(range(len(paths)), key=lambda i: paths[i])
    assert [image["path"] for image in shown["images"]] == [paths[i] for i in order]
    assert [image["type"] for image in shown["images"]] == [types[i] for i in order]
    for run, method in zip(runs, shown["methods"], strict=True):
        stored = {row["path"]: row for row in read_rows(run / "anomaly_scores" / "mpdd_plate.csv")}
        for image, value, score in zip(shown["images"], method["values"], method["scores"], strict=True):
            row = stored[image["path"]]
            assert value == float(row["normalized_score"]) and score == float(row["score"])
            assert (value > method["start"]) == (row["decision"] == "1")
    with np.load(runs[0] / "anomaly_scores" / "mpdd_plate.npz") as content:
        for image, i in zip(shown["images"], order, strict=True):
            assert decoded(image["picture"]).shape == (32, 32, 3)
            assert image["truthPx"] == masks[i].sum()
            above = content["maps"][i] > PIXEL_SCALE[1]
            assert image["maps"]["0"]["areaPx"] == above.sum()
            assert image["maps"]["0"]["areaShare"] == pytest.approx(above.mean())
            assert decoded(image["maps"]["0"]["heat"]).shape == (32, 32, 3)
            assert set(image["maps"]) == {"0", "1"}
    assert shown["methods"][0]["scale"] == {"low": 0.0, "threshold": PIXEL_SCALE[1], "calibrated": True}
    assert shown["methods"][2]["noMaps"] and "KNN (mpdd_plate): no heat maps" in page.text
    assert "bin/run_patchcore.py --seed 0 'a b'" in page.text
    assert f'"path": "{tmp_path / "data"}"' in page.text  # the configuration
    assert page.text.count("Quality against latency") == 1
    alts = [attributes.get("alt") for tag, attributes in page.tags if tag == "img"]
    assert alts and all(alts)


def test_the_page_loads_nothing_and_runs_its_own_script_alone(tmp_path: Path) -> None:
    page = report_of(tmp_path, write_run(tmp_path, "PC"))
    assert [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "base")] == []
    for _, attributes in page.tags:
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "#").startswith(("data:", "#"))
        assert not [name for name in attributes if name.startswith("on")]
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None and "default-src 'none'" in policy
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "url(http" not in page.source and "@import" not in page.source


def test_hostile_names_stay_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synthetic_runs.DEFECT_TYPES", (HOSTILE.replace("/", "\\"), "{{ 7 * 7 }}"))
    name = HOSTILE.replace("/", "\\").strip()
    run = write_run(tmp_path, name, [name], command=HOSTILE, method_config={"k": HOSTILE})
    page = report_of(tmp_path, run)
    assert len(page.scripts) == 2 and "window.hacked" not in page.scripts[1]
    assert not [a for t, a in page.tags if t == "img" and a.get("src") == "x"]
    assert not [a for _, a in page.tags if "onerror" in a]
    assert "\u202e" not in page.source  # turns around what stands beside it
    image = page.classes[0]["images"][0]
    assert "window.hacked=1" in image["path"] and "<" not in page.scripts[0]
    assert "49" not in {image["type"] for image in page.classes[0]["images"]}
    assert "<script>window.hacked=1" in page.text  # shown as it is


def test_names_that_are_no_utf8_are_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synthetic_runs.DEFECT_TYPES", ("d\udcff", "scratch"))
    page = report_of(tmp_path, write_run(tmp_path, "PC"))
    assert "d\\xff" in {image["type"] for image in page.classes[0]["images"]} or "d\\udcff" in {
        image["type"] for image in page.classes[0]["images"]
    }


def test_an_earlier_report_goes_with_its_comparison(tmp_path: Path) -> None:
    run = write_run(tmp_path, "PC")
    report_of(tmp_path, run)
    files = json.loads((tmp_path / "out" / "summary.json").read_text())["files"]
    assert "report.html" in files
    assert invoke(compare_results, run, "--out", tmp_path / "out").code == 0
    assert not (tmp_path / "out" / "report.html").exists()


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, f"PC_S{seed}", seed=seed, save_maps=False, calibrated=False) for seed in (0, 1)]
    page = report_of(tmp_path, *runs)
    (shown,) = page.classes
    (method,) = shown["methods"]
    assert (method["calibrated"], method["seed"], method["scale"]) == (False, 0, None)
    assert method["values"] == method["scores"]
    good = [score for score, image in zip(method["scores"], shown["images"], strict=True) if not image["bad"]]
    assert method["start"] == max(good)  # 5 % of 8 images are none
    assert all("picture" not in image and image["maps"] == {} for image in shown["images"])
    for sentence in (
        "first seed of each method",
        "20 of 20 test images are not in /data",
        "without --save_anomaly_scores",
    ):
        assert sentence in page.text


def test_damaged_maps_are_named_in_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path, "PC")
    (run / "anomaly_scores" / "mpdd_plate.npz").write_bytes(b"PK")
    finished = invoke(compare_results, run, "--image_metrics_only", "--html", "--out", tmp_path / "out")
    assert finished.code == 0  # no metric needed them
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "no heat maps: their file is damaged" in text
    again = invoke(compare_results, run, "--html", "--out", tmp_path / "out")
    assert again.code == 1 and again.err.count("mpdd_plate.npz is damaged") == 1


def test_a_real_run_stores_the_scale_of_its_maps(tmp_path: Path, small_dataset: Path, one_thread: None) -> None:
    typed = ["--device", "cpu", "--save_anomaly_scores", "--save_patchcore_model", str(tmp_path / "results")]
    assert invoke(run_patchcore, *typed, *small_run(small_dataset, "plate")).code == 0
    run = tmp_path / "results" / "project" / "group"
    calibration = json.loads((run / "models" / "mpdd_plate" / "model.json").read_text())["calibration"]
    with np.load(run / "anomaly_scores" / "mpdd_plate.npz") as content:
        assert tuple(content["pixel_scale"]) == (calibration["pixel_floor"], calibration["pixel"]["threshold"])
    (shown,) = report_of(tmp_path, run).classes
    assert shown["methods"][0]["scale"]["calibrated"]
    first = shown["images"][0]
    expected = np.asarray(Image.open(small_dataset / first["path"]).convert("RGB")).astype(float)
    assert np.abs(decoded(first["picture"]) - expected).mean() < 8  # the noise that the encoder takes away


# --- Pictures ---------------------------------------------------------------------------------------------------------


def test_the_outline_encloses_what_lies_above() -> None:
    mask = np.zeros((20, 30), bool)
    mask[4:10, 6:18] = True
    (corners,) = polygons(outline_path(mask, 0.5))
    assert np.allclose([corners.min(0), corners.max(0)], [[6, 4], [18, 10]], atol=0.51)  # x, y of the edges
    assert area(outline_path(mask, 0.5)) == pytest.approx(72, abs=1)  # the corners are cut off
    mask[6:8, 8:10] = False
    assert len(polygons(outline_path(mask, 0.5))) == 2
    assert area(outline_path(mask, 0.5)) == pytest.approx(68, abs=2)
    assert outline_path(np.zeros((5, 5)), 0.5) == ""


def test_the_outline_is_closed_at_the_border() -> None:
    assert area(outline_path(np.ones((10, 16), bool), 0.5)) == pytest.approx(160, rel=0.01)
    values = np.zeros((10, 16))
    values[:, :8] = -5.0
    assert area(outline_path(values, -1.0)) == pytest.approx(77, rel=0.05)


def test_ragged_outlines_get_coarser_and_keep_small_regions() -> None:
    noise = np.random.default_rng(0).normal(size=(256, 256))
    assert 0 < len(outline_path(noise, 1.0)) <= 10 * MAX_OUTLINE_CHARS
    dots = np.zeros((512, 512))
    dots[::16, ::16] = 1  # 1024 single pixels
    dots[:, 256:] = 0
    corners = np.concatenate(polygons(outline_path(dots, 0.5)))
    assert corners[:, 0].max() < 280


def test_heat_maps_keep_values_on_their_scale() -> None:
    rows = np.repeat(np.linspace(-1, 4, 64)[:, None], 64, axis=1)
    gray = decoded(f"data:image/webp;base64,{base64.b64encode(heat_bytes(rows, HeatScale(0, 3, 2))).decode()}")
    expected = np.clip(rows / 3, 0, 1) * 255
    assert np.abs(gray[..., 0] - expected).max() < 12
    assert gray.shape[:2] == (64, 64)


def test_pictures_are_scaled_down_and_never_up() -> None:
    for shape, size in (((512, 1024), (256, 128)), ((30, 20), (20, 30))):
        content = image_bytes(np.zeros((*shape, 3), np.uint8))
        assert Image.open(io.BytesIO(content)).size == size


def test_the_scale_without_threshold_is_that_of_the_good_images() -> None:
    maps = [np.full((8, 8), float(i)) for i in range(5)]
    scale = display_scale(maps, np.array([True, True, True, False, False]), 0.5)
    assert (scale.low, scale.threshold) == (1.0, 1.0)
    nothing_good = display_scale(maps, np.zeros(5, bool), 0.5)
    assert (nothing_good.low, nothing_good.high, nothing_good.threshold) == (0.0, 4.0, None)


@pytest.mark.parametrize("path", ["../secret.png", "/secret.png", "a/../../secret.png", "missing.png", "text.txt"])
def test_only_images_of_the_data_set_are_read(tmp_path: Path, path: str) -> None:
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "data" / "text.txt").write_text("no image")
    folder = ImageFolder(tmp_path / "data", PreprocessingConfig(64, 64))
    named = str(tmp_path / "secret.png") if path.startswith("/") else path
    assert folder.crop(named) is None


# --- Gallery ----------------------------------------------------------------------------------------------------------


def made_class(scores: list[list[float]], labels: list[bool], **changes: Any) -> GalleryClass:
    """Return a class of methods with these scores and with maps whose pixels all have the score."""
    methods = []
    for number, own in enumerate(scores):
        maps = np.repeat(np.array(own, np.float32), 64).reshape(-1, 8, 8)
        found = MethodMaps(maps, None, changes.get("sizes"), (0.0, 1.0))
        methods.append(GalleryMethod(f"m{number}", 0, np.array(own), None, lambda found=found: found, ""))
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    names = [f"{i}.png" for i in range(len(labels))]
    types = ["dent" if bad else "good" for bad in labels]
    return GalleryClass("mpdd_plate", names, types, np.array(labels), methods, lambda _: picture, "data")


def test_disagreement_and_rank_by_hand() -> None:
    shown = made_class([[1, 2, 3, 4], [40, 20, 20, 10]], [False, False, True, True])
    images = gallery_data([shown], 10**6)[0]["images"]
    # ranks 0, 1, 2, 3 and 3, 1.5, 1.5, 0 of 3
    assert [i["disagreement"] for i in images] == pytest.approx([1, 0.5 / 3, 0.5 / 3, 1])
    assert [i["rank"] for i in images] == pytest.approx([0.5, 1.25 / 3, 1.75 / 3, 0.5])


def test_pictures_beyond_the_limit_go_and_scores_stay() -> None:
    labels = [False] * 20 + [True] * 4
    scores = [[*np.linspace(0, 1, 20), 0.1, 2, 2, 2]]  # the first defect is missed
    whole = gallery_data([made_class(scores, labels)], 10**6)[0]
    one = len(whole["images"][0]["picture"]) * 2
    row = gallery_data([made_class(scores, labels)], one)[0]
    kept = [i for i, image in enumerate(row["images"]) if "picture" in image]
    assert kept and 20 in kept and len(json.dumps(row)) < len(json.dumps(whole)) / 3
    assert row["methods"] == whole["methods"]
    for i, image in enumerate(row["images"]):
        assert ("left_out" in image) == (i not in kept)
        assert image["maps"]["0"]["areaPx"] == whole["images"][i]["maps"]["0"]["areaPx"]


def test_images_of_their_own_size_have_maps_of_that_size() -> None:
    shown = made_class([[0.0, 2.0]], [False, True], sizes=np.array([[8, 8], [4, 6]]))
    shown = replace(shown, crop=lambda _: None)
    first, second = gallery_data([shown], 10**6)[0]["images"]
    assert (first["size"], second["size"]) == ([8, 8], [6, 4])
    assert second["maps"]["0"]["areaPx"] == 24 and second["maps"]["0"]["areaShare"] == 1
    assert first["maps"]["0"]["areaPx"] == 0


def test_padding_is_no_area() -> None:
    maps, masks = np.full((1, 8, 8), 2.0, np.float32), np.full((1, 8, 8), 255, np.uint8)
    masks[0, :4] = 1
    method = GalleryMethod("m", 0, np.array([1.0]), None, lambda: MethodMaps(maps, masks, None, (0.0, 1.0)), "")
    shown = GalleryClass("c", ["a.png"], ["dent"], np.array([True]), [method], lambda _: None, "data")
    entry = gallery_data([shown], 10**6)[0]["images"][0]
    assert (entry["truthPx"], entry["maps"]["0"]["areaPx"], entry["maps"]["0"]["areaShare"]) == (32, 32, 1.0)


def test_the_first_threshold_is_that_of_the_run_or_a_quantile_of_the_good() -> None:
    scores, labels = np.arange(40.0), np.arange(40) >= 20
    plain = GalleryMethod("m", 0, scores, None, lambda: None, "")
    assert plain.start(labels) == 19 and (scores[:20] > plain.start(labels)).mean() <= 0.05
    assert plain.start(np.ones(40, bool)) == np.quantile(scores, gallery_module.GOOD_QUANTILE, method="higher")
    calibrated = GalleryMethod("m", 0, scores, scores / (scores + THRESHOLD), lambda: None, "")
    assert calibrated.start(labels) == 0.5


# --- Style ------------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_texts_have_the_contrast_of_wcag_aa_in_both_schemes() -> None:
    blocks = re.findall(r":root \{(.*?)\}", STYLE.read_text(encoding="utf-8"), flags=re.DOTALL)
    light, dark = (dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block)) for block in blocks[:2])
    for scheme in (light, {**light, **dark}):
        for ground in ("ground", "panel"):
            for ink in ("ink", "muted", "link", "alarm", "right"):
                low, high = sorted((luminance(scheme[ground]), luminance(scheme[ink])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)

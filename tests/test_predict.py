"""A stored model on new images: what it says in the frame of the image, from Python and as a command."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, RunCommand, small_run, write_category, write_texture
from in_process import Finished, invoke, read_rows
from PIL import Image
from test_detectors import CPU, EXAMPLES, PREPROCESSING, Batches, anomalous_images, random_images

from patchcore import load_detector
from patchcore.cli import predict, run_patchcore
from patchcore.configs import PreprocessingConfig, RuntimeConfig, TrainingSource
from patchcore.datasets.images import Placement, place, read_image
from patchcore.detector import DETECTORS, AnomalyDetector, Prediction
from patchcore.errors import ConfigurationError, DataError
from patchcore.inference.detector import LoadedDetector, as_rgb
from patchcore.inference.outputs import OutputNames, heat_levels
from patchcore.inference.results import ImageResult, Region
from patchcore.prediction import open_detector
from patchcore.scoring.anomaly_map import image_scores, patches_inside
from patchcore.scoring.calibration import MapStatistics, ScoreScale, calibrate

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("autoencoder", "patchcore", "resnet_knn")  # one with maps by network, one with patches, one without maps
METHODS = [pytest.param(method, marks=[] if method in QUICK else [pytest.mark.slow]) for method in sorted(EXAMPLES)]
HOSTILE = '=1+1,"<b>\n..\\é.png'


def fitted(method: str, config: object = None) -> AnomalyDetector:
    """Return a small detector of any method, with thresholds from normal images that it has not seen."""
    build = DETECTORS[method].prepare(config or EXAMPLES[method], PREPROCESSING, RuntimeConfig())
    detector = build(TrainingSource("folder", "part", seed=3), CPU)
    detector.fit(Batches(random_images(6, 1)))
    detector.release_training_data()
    if detector.can_calibrate:  # not out of fold: some methods would be trained six times more
        unseen = detector.predict(random_images(6, 7))
        maps = MapStatistics.of([unseen.maps]) if unseen.maps is not None else None
        detector.calibration_ = calibrate("split", 1, unseen.scores, maps)
    return detector


@functools.lru_cache
def example(method: str) -> AnomalyDetector:
    """Return the detector of a method that no test changes."""
    return fitted(method)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run with a stored model whose crop leaves a border out, and its data."""
    root = tmp_path_factory.mktemp("run")
    write_category(root / "data", "plate")
    finished = invoke(run_patchcore, "--device", "cpu", "--threads", 1, "--save_patchcore_model", root / "results",
                      *small_run(root / "data", "plate", reading=("--resize", "72")))  # fmt: skip
    assert finished.code == 0, finished.err
    return root / "results" / "project" / "group", root / "data"


@pytest.fixture(scope="module")
def model(run_folder: tuple[Path, Path]) -> Path:
    return run_folder[0] / "models" / "mpdd_plate"


@pytest.fixture
def images(run_folder: tuple[Path, Path], tmp_path: Path) -> Path:
    """Two good parts, of the training so that no chance makes them anomalous, and one with a defect, in folders."""
    known = run_folder[1] / "plate" / "train" / "good"
    deep = tmp_path / "in" / "line 1" / "deep"
    deep.mkdir(parents=True)
    Image.open(known / "000.png").save(tmp_path / "in" / "a.png")
    Image.open(known / "002.png").save(deep / "c.bmp")
    pixels = np.array(Image.open(known / "001.png"))
    pixels[20:36, 24:40] = (250, 240, 20)
    Image.fromarray(pixels).save(tmp_path / "in" / "line 1" / "b.png")
    return tmp_path / "in"


def run(*args: object) -> Finished:
    return invoke(predict, *args, "--device", "cpu", "--threads", 1)


# --- mathematics of a region ---


@pytest.mark.parametrize(("kind", "expected"), [("max", 3.0), ("mean", 2.0), ("topk", 3.0)])
def test_scores_of_a_region_are_those_of_its_patches(kind: str, expected: float) -> None:
    scores = torch.tensor([[[1.0, 9.0], [2.0, 3.0]]])
    inside = torch.tensor([[[True, False], [True, True]]])
    assert float(image_scores(scores, kind, inside)) == expected
    everywhere = torch.ones_like(inside)
    assert torch.equal(image_scores(scores, kind, everywhere), image_scores(scores, kind))


def test_topk_of_a_region_counts_the_percent_of_the_region() -> None:
    scores = torch.arange(400.0).view(1, 20, 20)
    inside = scores < 200
    assert float(image_scores(scores, "topk", inside)) == (199 + 198) / 2  # 1 % of 200, of 400 it would be 4


def test_a_patch_belongs_to_a_region_by_half_of_its_area() -> None:
    inside = torch.zeros(1, 8, 8, dtype=torch.bool)
    inside[0, :4, :6] = True  # patches of 4 px: one whole, one half, the others nothing
    assert patches_inside(inside, (2, 2)).tolist() == [[[True, True], [False, False]]]
    thin = torch.zeros(1, 8, 8, dtype=torch.bool)
    thin[0, 5, 4:] = True
    assert patches_inside(thin, (2, 2)).tolist() == [[[False, False], [False, True]]]


@pytest.mark.parametrize("method", METHODS)
def test_region_of_every_method(method: str) -> None:
    loaded = LoadedDetector(example(method))
    image = anomalous_images(1, 2)[0].permute(1, 2, 0).numpy().copy()  # a bright square at 20 to 44 of 64
    everything, without = np.ones((64, 64), bool), np.ones((64, 64), bool)
    without[8:56, 8:56] = False
    if not loaded.has_maps:
        with pytest.raises(ConfigurationError, match="scores whole images"):
            loaded.predict(image, roi=everything)
        return
    (plain,), (same,) = loaded.predict(image), loaded.predict(image, roi=everything)
    assert (same.score, same.is_anomalous) == (plain.score, plain.is_anomalous)
    assert plain.is_anomalous
    (outside,) = loaded.predict(image, roi=without)
    assert outside.score < plain.score
    assert outside.anomaly_map is not None and np.isnan(outside.anomaly_map[8:56, 8:56]).all()
    assert outside.defect_mask is not None and not outside.defect_mask[8:56, 8:56].any()


def test_reweighted_score_of_a_region_looks_for_the_worst_patch_inside() -> None:
    config = replace(EXAMPLES["patchcore"], score_reweighting=3)
    detector = fitted("patchcore", config)
    images = anomalous_images(1, 2)
    inside = torch.zeros(1, 64, 64, dtype=torch.bool)
    inside[:, :, :8] = True
    weighted = float(detector.predict_inside(images, inside).scores[0])
    unweighted = example("patchcore").predict_inside(images, inside)
    assert 0 < weighted < float(unweighted.scores[0]) < float(example("patchcore").predict(images).scores[0])


# --- one result ---


def result(model_map: np.ndarray, placement: Placement, size: tuple[int, int], threshold: float | None) -> ImageResult:
    return ImageResult(None, *size, 1.0, None, None, None, threshold, model_map, placement)


def test_regions_by_hand() -> None:
    anomaly_map = np.zeros((6, 8), np.float32)
    anomaly_map[1:3, 2:4] = 5  # four pixels, and one that touches them at a corner
    anomaly_map[3, 4] = 7
    anomaly_map[5, 0] = 2
    anomaly_map[0, 7] = 1  # at the threshold, not above
    found = result(anomaly_map, Placement(6, 8, 0, 0, 6, 8), (6, 8), 1.0).findings()
    assert found is not None
    assert found.regions == (Region(2, 1, 3, 3, 5, 7.0), Region(0, 5, 1, 1, 1, 2.0))
    assert (found.defect_px, found.inspected_px, found.defect_share) == (6, 48, 6 / 48)


@pytest.mark.parametrize("size", [(64, 64), (301, 173), (97, 640), (65, 64)])
@pytest.mark.parametrize("mode", ["shorter", "square", "letterbox"])
def test_place_in_the_whole_image(size: tuple[int, int], mode: str) -> None:
    """A spot that lies on known pixels of the whole image is found there, with crop and resize undone."""
    height, width = size
    placement = place(height, width, PreprocessingConfig(80, 64, mode))
    row, column = height // 2, width // 2 + (width // 20 if mode != "shorter" else 0)
    top = round(row * placement.height / height) - placement.top
    left = round(column * placement.width / width) - placement.left
    anomaly_map = np.zeros((64, 64), np.float32)
    anomaly_map[top - 3 : top + 3, left - 3 : left + 3] = 1
    found = result(anomaly_map, placement, size, 0.5).findings()
    assert found is not None and found.regions is not None and len(found.regions) == 1
    (region,) = found.regions
    assert abs(region.top + region.height / 2 - row) <= 0.5 + height / placement.height
    assert abs(region.left + region.width / 2 - column) <= 0.5 + width / placement.width
    expected = 36 * (height / placement.height) * (width / placement.width)
    assert 0.5 * expected < region.area_px < 1.6 * expected
    assert found.anomaly_map.shape == size


def test_16_bit_levels_are_the_normalised_scores() -> None:
    scale = ScoreScale(mean=1.0, std=0.5, threshold=2.0)
    values = np.array([[np.nan, 1.0, 2.0], [1.9999, 2.0001, 1e9]], np.float32)
    levels, meaning = heat_levels(values, scale)
    assert levels.dtype == np.uint16 and levels[0, 0] == 0 and "normalised" in meaning
    expected = scale.normalized(values[~np.isnan(values)])
    assert np.abs(levels[~np.isnan(values)] / 65535 - expected).max() < 1e-5
    assert levels[1, 0] < 32767.5 < levels[1, 1] and levels[1, 2] == 65535
    levels, meaning = heat_levels(values, None)
    assert levels.min() == 0 and levels[0, 1] == 1 and levels[1, 2] == 65535 and "1e+09" in meaning


def test_names_of_outputs_are_safe_and_differ() -> None:
    names = OutputNames(["a"])
    claimed = [
        names.claim(label) for label in ("a.png", "A.jpg", "../x/y.png", "x/y.png", HOSTILE, "a_1.png", "é" * 300)
    ]
    assert len({name.casefold() for name in claimed}) == len(claimed)
    assert "a" not in claimed
    for name in claimed:
        assert not set(name) & set('/\\<>"\n=') and not name.startswith(".") and len(name.encode()) < 200
    assert names.claim("a\udcff.png").encode("utf-8")  # bytes of names that are no UTF-8
    names.release("a_1")
    assert names.claim("A.png").casefold() == "a_1"


# --- from Python ---


@pytest.mark.parametrize("method", METHODS)
def test_load_detector_gives_what_the_method_gives(method: str, tmp_path: Path) -> None:
    detector = example(method)
    detector.save(tmp_path / "m")
    images = torch.cat([random_images(2, 5), anomalous_images(1, 2)])
    expected = detector.predict(images)
    arrays = [image.permute(1, 2, 0).numpy().copy() for image in images]
    loaded = load_detector(str(tmp_path / "m"), "cpu", batch_size=2)
    results = loaded.predict(arrays)
    assert [r.score for r in results] == pytest.approx(expected.scores.tolist(), rel=1e-5)
    assert results[2].is_anomalous and results[2].normalized is not None and results[2].normalized > 0.5
    assert results[2].threshold is not None
    for number, found in enumerate(results):
        if expected.maps is None:
            assert found.anomaly_map is None and found.defect_mask is None and found.regions is None
        else:
            assert found.anomaly_map is not None
            np.testing.assert_allclose(found.anomaly_map, expected.maps[number], rtol=1e-4, atol=1e-5)


def test_all_kinds_of_images_at_once(model: Path, tmp_path: Path) -> None:
    write_texture(tmp_path / "a.png", 900, defect=True)
    picture = Image.open(tmp_path / "a.png")
    pixels = np.asarray(picture)
    loaded = load_detector(model, "cpu")
    mixture = [tmp_path / "a.png", str(tmp_path / "a.png"), picture, pixels, pixels[..., 0]]
    scores = [r.score for r in loaded.predict(mixture)]
    assert scores[:4] == pytest.approx([scores[0]] * 4, rel=1e-6) and scores[4] != pytest.approx(scores[0])
    assert [r.path for r in loaded.predict(mixture)][:3] == [tmp_path / "a.png", tmp_path / "a.png", None]
    for single in (tmp_path / "a.png", pixels, picture):
        assert [r.score for r in loaded.predict(single)] == pytest.approx([scores[0]], rel=1e-6)
    assert loaded.predict([]) == []
    for wrong in (pixels.astype(np.float32), pixels[None], pixels[..., :2], np.empty((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="expected uint8"):
            loaded.predict([wrong])
    with pytest.raises(TypeError, match="found int"):
        loaded.predict([3])  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"missing\.png"):
        loaded.predict([pixels, tmp_path / "missing.png"])


def test_pil_images_of_any_depth_are_read_like_their_files(tmp_path: Path) -> None:
    gray = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    clear = rgb.convert("P")
    clear.info["transparency"] = 3
    stored = {
        "16.png": Image.fromarray((gray * 65535).astype(np.uint16)),
        "16.tif": Image.fromarray((gray * 65535).astype(np.uint16)),
        "32.tif": Image.fromarray((gray * (2**31 - 1)).astype(np.int32)),
        "float.tif": Image.fromarray(gray.astype(np.float32)),
        "cmyk.tif": rgb.convert("CMYK"),
        "palette.png": clear,
        "alpha.png": rgb.convert("LA"),
        "rgba.png": rgb.convert("RGBA"),
    }
    for name, image in stored.items():
        image.save(tmp_path / name)
        expected = np.asarray(read_image(tmp_path / name))
        with Image.open(tmp_path / name) as opened:
            assert np.array_equal(as_rgb(opened), expected), name
        if name != "32.tif":  # in memory nothing tells its depth
            assert np.array_equal(as_rgb(image), expected), name
    assert np.ptp(np.asarray(as_rgb(stored["16.png"]))) == np.ptp(np.asarray(as_rgb(stored["float.tif"]))) == 255
    refused = {
        "values up to 2147483647": stored["32.tif"],
        "values from 0 to 255": Image.fromarray(gray.astype(np.float32) * 255),
        "mode 'La'": Image.new("La", (8, 8)),
    }
    for message, image in refused.items():
        with pytest.raises(DataError, match=message) as error:
            as_rgb(image)
        assert "\n" not in str(error.value)


def test_threads_get_the_same_results(model: Path, images: Path) -> None:
    loaded = load_detector(model, "cpu", batch_size=2)
    paths = sorted(images.rglob("*.*"))
    expected = [r.score for r in loaded.predict(paths)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda shift: loaded.predict(paths[shift:] + paths[:shift]), [0, 1, 2] * 6))
    for shift, answer in zip([0, 1, 2] * 6, answers, strict=True):
        assert [r.score for r in answer] == pytest.approx(expected[shift:] + expected[:shift], rel=1e-5)


def test_models_without_scores_of_single_images_are_refused(tmp_path: Path) -> None:
    detector = fitted("ensemble", replace(EXAMPLES["ensemble"], score_normalization="minmax"))
    detector.save(tmp_path / "m")
    with pytest.raises(ConfigurationError, match="minmax"):
        load_detector(tmp_path / "m", "cpu")
    finished = run(tmp_path / "m", REPOSITORY / "docs", "--out", tmp_path / "out")
    assert finished.code == 2 and len(finished.error_lines) == 1 and not (tmp_path / "out").exists()


def test_images_of_their_own_resolution(tmp_path: Path) -> None:
    config = replace(EXAMPLES["autoencoder"])
    preprocessing = PreprocessingConfig(64, 64, max_side_px=128)
    detector = DETECTORS["autoencoder"].prepare(config, preprocessing, RuntimeConfig())(TrainingSource(), CPU)
    detector.fit(Batches(random_images(4, 1)))
    loaded = LoadedDetector(detector)
    wide, tall = np.full((64, 200, 3), 120, np.uint8), np.full((96, 64, 3), 120, np.uint8)
    maps = [r.anomaly_map for r in loaded.predict([wide, tall, wide])]
    assert [m.shape for m in maps if m is not None] == [(64, 200), (96, 64), (64, 200)]
    assert not any(np.isnan(m).any() for m in maps if m is not None)


# --- the command ---


def test_scores_are_those_of_the_run(run_folder: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    folder, data = run_folder
    finished = run(model, data / "plate" / "test", "--out", tmp_path / "out", "--batch_size", 4, "--num_workers", 2)
    assert finished.code == 0, finished.err
    rows = {Path(row["path"]).relative_to(data).as_posix(): row for row in read_rows(tmp_path / "out/predictions.csv")}
    expected = {row["path"]: row for row in read_rows(folder / "anomaly_scores" / "mpdd_plate.csv")}
    assert rows.keys() == expected.keys() and len(rows) == 6
    for path, row in rows.items():
        assert float(row["score"]) == pytest.approx(float(expected[path]["score"]), rel=1e-5)
        assert float(row["normalized_score"]) == pytest.approx(float(expected[path]["normalized_score"]), rel=1e-4)
        assert row["decision"] == expected[path]["decision"]


def test_outputs(model: Path, images: Path, tmp_path: Path) -> None:
    Image.open(images / "line 1" / "b.png").resize((200, 130)).save(images / "odd.png")
    out = images / "out"  # inside of what is read
    for _ in range(2):  # the second call reads no output of the first
        finished = run(model, images, "--out", out, "--mm_per_px", 0.5)
        assert finished.code == 0, finished.err
        assert "4 images scored, 2 anomalous" in finished.out
        rows = {Path(row["path"]).name: row for row in read_rows(out / "predictions.csv")}
        assert list(rows) == ["a.png", "odd.png", "b.png", "c.bmp"]
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == [
        "heat_maps", "masks", "overlays", "predictions.csv"]  # fmt: skip
    odd = rows["odd.png"]
    assert (odd["image_width"], odd["image_height"], odd["overlay"]) == ("200", "130", "overlays/odd.png")
    overlay, mask, heat = (Image.open(out / odd[kind]) for kind in ("overlay", "mask", "heat_map"))
    assert overlay.size == mask.size == heat.size == (200, 130)
    flags, levels = np.asarray(mask) == 255, np.asarray(heat)
    assert heat.mode == "I;16" and int(odd["defect_px"]) == flags.sum() > 0
    assert np.array_equal(flags, levels > 32767.5)
    assert int(odd["inspected_px"]) == (levels > 0).sum() < 200 * 130  # the crop leaves a border out
    assert float(odd["defect_share"]) == pytest.approx(flags.sum() / (levels > 0).sum())
    assert float(odd["defect_mm2"]) == flags.sum() / 4
    rows_, columns = np.nonzero(flags)
    boxes = json.loads(odd["boxes"])
    assert min(b[0] for b in boxes) == columns.min() and min(b[1] for b in boxes) == rows_.min()
    assert max(b[0] + b[2] for b in boxes) == columns.max() + 1
    assert abs(columns.mean() - 32 / 64 * 200) < 12 and abs(rows_.mean() - 28 / 64 * 130) < 8  # the bright square
    changed = (np.asarray(overlay) != np.asarray(Image.open(images / "odd.png").convert("RGB"))).any(axis=2)
    assert not changed[40:90][flags[40:90]].any(), "the line runs outside of the defect"
    assert (np.asarray(overlay) == (0, 229, 255)).all(axis=2).any()
    assert rows["a.png"]["decision"] == "0"


def test_turned_images_are_told_upright(model: Path, tmp_path: Path) -> None:
    write_texture(tmp_path / "a.png", 901, defect=True)
    upright = Image.open(tmp_path / "a.png").resize((160, 100))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise for viewing
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "in.png", exif=exif)
    upright.save(tmp_path / "flat.png")
    finished = run(model, tmp_path / "in.png", tmp_path / "flat.png", "--out", tmp_path / "out")
    assert finished.code == 0, finished.err
    turned, flat = read_rows(tmp_path / "out" / "predictions.csv")
    assert (turned["image_width"], turned["image_height"]) == ("160", "100") and turned["boxes"] == flat["boxes"]
    assert Image.open(tmp_path / "out" / turned["overlay"]).size == (160, 100)


def test_choice_of_outputs(model: Path, images: Path, tmp_path: Path) -> None:
    finished = run(model, images / "line 1" / "b.png", "--out", tmp_path / "out", "--no_overlays", "--no_masks",
                   "--heat_maps", "npy")  # fmt: skip
    assert finished.code == 0, finished.err
    (row,) = read_rows(tmp_path / "out" / "predictions.csv")
    assert row["overlay"] == row["mask"] == "" and "defect_mm2" not in row
    raw = np.load(tmp_path / "out" / row["heat_map"])
    assert raw.dtype == np.float32 and raw.shape == (64, 64)
    assert raw[24:32, 28:36].mean() > 1.2 * np.nanmean(raw)
    run(model, images / "a.png", "--out", tmp_path / "bare", "--no_overlays", "--no_masks", "--heat_maps", "none")
    assert [p.name for p in (tmp_path / "bare").iterdir() if not p.name.startswith(".")] == ["predictions.csv"]


def test_files_folders_and_globs_each_once(model: Path, images: Path, tmp_path: Path) -> None:
    Image.open(images / "a.png").save(images / "line 1" / "a.png")
    Image.open(images / "a.png").save(images / "[1].png")
    (images / "notes.txt").write_text("no image")
    (images / ".hidden.png").write_bytes(b"no image")
    arguments = [images / "line 1" / "a.png", f"{images}/**/*.png", images, images / "[1].png"]
    finished = run(model, *arguments, "--out", tmp_path / "out")
    assert finished.code == 0, finished.err
    rows = read_rows(tmp_path / "out" / "predictions.csv")
    paths = [Path(row["path"]).relative_to(images).as_posix() for row in rows]
    assert sorted(paths) == ["[1].png", "a.png", "line 1/a.png", "line 1/b.png", "line 1/deep/c.bmp"]
    assert len({row["overlay"] for row in rows}) == 5 and all(
        (tmp_path / "out" / row["overlay"]).exists() for row in rows
    )


def test_broken_files_and_hostile_names(model: Path, images: Path, tmp_path: Path) -> None:
    write_texture(images / HOSTILE, 903, defect=True)
    (images / "b roken.png").write_bytes((images / "a.png").read_bytes()[:200])
    (images / "empty.jpg").write_bytes(b"")
    finished = run(model, images, "--out", tmp_path / "out", "--json")
    assert finished.code == 1
    told = [json.loads(line) for line in finished.out.splitlines()]
    rows = read_rows(tmp_path / "out" / "predictions.csv")
    assert len(told) == len(rows) == 6
    by_name = {Path(row["path"]).name: row for row in rows}
    assert "not a readable image" in by_name["b roken.png"]["error"] and "empty" in by_name["empty.jpg"]["error"]
    assert by_name["b roken.png"]["score"] == by_name["empty.jpg"]["decision"] == ""
    assert str(images / HOSTILE) in {row["path"] for row in rows} & {record["path"] for record in told}
    for row, record in zip(rows, told, strict=True):
        assert row["path"] == record["path"] and row["error"] == (record["error"] or "")
        if not row["error"]:
            assert float(row["score"]) == record["score"] and int(row["decision"]) == record["decision"]
            assert [[r["left"], r["top"], r["width"], r["height"]] for r in record["regions"]] == json.loads(
                row["boxes"]
            )
    written = {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*") if p.is_file()}
    assert written == {"in", "out"}
    assert finished.err.count("warning") == 2 and "4 images scored" in finished.err


def change_predictions(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor, Prediction], None]) -> None:
    """Let a function look at the images of each batch and the prediction of them, and change it or fail."""
    method = DETECTORS["patchcore"]
    honest = method.predict

    def changed(self: AnomalyDetector, images: torch.Tensor) -> Prediction:
        prediction = honest(self, images)
        change(images, prediction)
        return prediction

    monkeypatch.setattr(method, "predict", changed)


@pytest.mark.parametrize("kind", ["scores", "maps"])
def test_what_is_not_finite_is_an_error_and_never_normal(
    kind: str, model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(pixels: torch.Tensor, prediction: Prediction) -> None:
        values = getattr(prediction, kind)
        values[(pixels.float().mean(dim=(1, 2, 3)) > 250).numpy()] = math.nan

    white = tmp_path / "in" / "white.png"
    Image.new("RGB", (64, 64), "white").save(white)
    change_predictions(monkeypatch, spoil)
    finished = run(model, white, images / "a.png", "--out", tmp_path / "out")
    spoiled, healthy = read_rows(tmp_path / "out" / "predictions.csv")
    assert finished.code == 1 and "not finite" in spoiled["error"] and healthy["error"] == ""
    assert spoiled["score"] == spoiled["decision"] == spoiled["overlay"] == "" and healthy["decision"] == "0"
    with pytest.raises(DataError, match=r"white\.png: .*not finite"):
        load_detector(model, "cpu").predict([images / "a.png", white])


def test_too_little_memory_halves_the_batch_and_changes_no_score(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    room = 2

    def count(pixels: torch.Tensor, prediction: Prediction) -> None:
        sizes.append(len(pixels))
        if len(pixels) > room:
            raise RuntimeError("CUDA out of memory")

    files = sorted(images.rglob("*.*")) * 2
    expected = [r.score for r in load_detector(model, "cpu").predict(files)]
    change_predictions(monkeypatch, count)
    assert [r.score for r in load_detector(model, "cpu").predict(files)] == pytest.approx(expected, rel=1e-5)
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    room = 0
    finished = run(model, images, "--out", tmp_path / "out")
    assert finished.code == 1 and "Traceback" not in finished.err
    rows = read_rows(tmp_path / "out" / "predictions.csv")
    assert len(rows) == 3 and all("out of memory for this image alone" in row["error"] for row in rows)


def test_a_model_that_fails_is_one_line(model: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(pixels: torch.Tensor, prediction: Prediction) -> None:
        raise RuntimeError("cuDNN error:\nNOT_SUPPORTED")

    change_predictions(monkeypatch, fail)
    finished = run(model, images / "a.png", "--json")
    assert finished.code == 1 and "Traceback" not in finished.err
    assert json.loads(finished.out)["error"] == "the model failed (RuntimeError: cuDNN error: NOT_SUPPORTED)"


def test_exit_codes(model: Path, images: Path) -> None:
    good, defect = images / "a.png", images / "line 1" / "b.png"
    (images / "broken.png").write_bytes(b"x")
    assert run(model, good, "--json", "--fail_on_defect").code == 0
    assert run(model, good, images / "broken.png", "--json", "--fail_on_defect").code == 1
    assert run(model, images / "broken.png", defect, "--json", "--fail_on_defect").code == 3, "a defect that was found"


def test_wrong_arguments(model: Path, images: Path, tmp_path: Path) -> None:
    out, write_nothing = tmp_path / "out", ("--out", tmp_path / "out")
    (tmp_path / "nothing").mkdir()
    Image.new("L", (64, 64)).save(tmp_path / "black.png")
    wrong: list[tuple[tuple[object, ...], str]] = [
        ((model, images), "type --out"),
        ((model, images / "missing", *write_nothing), "missing' not found"),
        ((model, f"{images}/*.tif", *write_nothing), "not found"),
        ((model, tmp_path / "nothing", *write_nothing), "no images in"),
        ((model, "", *write_nothing), "empty path"),
        ((tmp_path / "no model", images, *write_nothing), "no model' not found"),
        ((model, images, "--out", images), "choose another --out"),
        ((model, images / "line 1", "--out", images), "choose another --out"),
        ((model, images, "--out", images / "a.png"), "no folder"),
        ((model, images, "--roi", tmp_path / "none.png", *write_nothing), "region of interest"),
        ((model, images, "--roi", tmp_path / "black.png", *write_nothing), "black everywhere"),
        ((model, images, "--mm_per_px", "0", *write_nothing), "--mm_per_px"),
        ((model, images, "--mm_per_px", "nan", *write_nothing), "--mm_per_px"),
        ((model, images, "--mm_per_px", "1e300", *write_nothing), "--mm_per_px"),
        ((model, images, "--patience", "nan", *write_nothing), "--patience"),
        ((model, images, "--batch_size", "0", *write_nothing), "--batch_size"),
        ((model, images, "--num_workers", "0", *write_nothing), "--num_workers"),
        ((model, images, "--watch", "--json"), "type --out"),
    ]
    for args, message in wrong:
        finished = run(*args)
        assert finished.code == 2 and message in finished.err and len(finished.error_lines) == 1, (args, finished.err)
        assert not out.exists()


@pytest.mark.parametrize("watch", [(), ("--watch",)])
def test_folder_that_cannot_be_written_is_found_before_the_model_is_loaded(
    watch: tuple[str, ...], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc").is_dir():
        pytest.skip("no /proc here")
    monkeypatch.setattr("patchcore.inference.run.load_with", lambda *_: pytest.fail("the model was loaded"))
    finished = run("model", images, "--out", "/proc/patchcore/out", *watch)
    assert finished.code == 2 and "cannot be written" in finished.err and len(finished.error_lines) == 1


def test_a_call_that_is_ended_leaves_no_table_of_an_older_one(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run(model, images, "--out", out).code == 0
    unfinished = [out / ".predictions.part", out / "overlays" / ".0.part"]
    kept = [out / "other" / ".0.part", out / ".notes"]  # of the user
    kept[0].parent.mkdir()
    for path in (*unfinished, *kept):
        path.touch()

    def interrupt(pixels: torch.Tensor, prediction: Prediction) -> None:
        raise KeyboardInterrupt

    change_predictions(monkeypatch, interrupt)
    assert run(model, images, "--out", out).code == 130
    assert not (out / "predictions.csv").exists() and not any(path.exists() for path in unfinished)
    assert all(path.exists() for path in kept)


def test_region_of_interest(model: Path, images: Path, tmp_path: Path) -> None:
    roi = np.full((64, 64), 255, np.uint8)
    Image.fromarray(roi).save(tmp_path / "all.png")
    roi[:52] = 0  # the defect, and what the patches at the lower border do not see
    Image.fromarray(roi).save(tmp_path / "border.png")
    Image.new("L", (32, 64), 255).save(tmp_path / "small.png")
    defect = images / "line 1" / "b.png"

    def row(*args: object) -> dict[str, str]:
        finished = run(model, defect, "--out", tmp_path / "out", *args)
        return {**read_rows(tmp_path / "out" / "predictions.csv")[0], "code": str(finished.code)}

    plain, everything, border = row(), row("--roi", tmp_path / "all.png"), row("--roi", tmp_path / "border.png")
    assert plain == everything and plain["decision"] == "1"
    assert border["decision"] == "0" and float(border["score"]) < float(plain["score"])
    assert int(border["inspected_px"]) < int(plain["inspected_px"]) and border["boxes"] == "[]"
    mismatch = row("--roi", tmp_path / "small.png")
    assert mismatch["code"] == "1" and "same size" in mismatch["error"]
    roi[:] = 0
    roi[0, :] = 255  # cut off by the crop
    Image.fromarray(roi).save(tmp_path / "cut.png")
    assert "outside of the part" in row("--roi", tmp_path / "cut.png")["error"]


def test_without_calibration_or_maps(images: Path, tmp_path: Path) -> None:
    bare = fitted("patchcore")
    bare.calibration_ = None
    bare.save(tmp_path / "bare")
    example("resnet_knn").save(tmp_path / "mapless")
    finished = run(tmp_path / "bare", images, "--out", tmp_path / "out")
    assert finished.code == 0 and "without calibration" in finished.out
    row = read_rows(tmp_path / "out" / "predictions.csv")[0]
    assert row["score"] and row["overlay"] and row["heat_map"] and row["inspected_px"]
    assert row["normalized_score"] == row["decision"] == row["boxes"] == row["defect_px"] == row["mask"] == ""
    refused = run(tmp_path / "bare", images, "--json", "--fail_on_defect")
    assert refused.code == 2 and "without calibration" in refused.err and not refused.out

    finished = run(tmp_path / "mapless", images, "--out", tmp_path / "flat")
    assert finished.code == 0 and "no anomaly maps" in finished.out
    row = read_rows(tmp_path / "flat" / "predictions.csv")[0]
    assert row["decision"] and row["overlay"] == row["heat_map"] == row["boxes"] == row["defect_share"] == ""
    assert run(tmp_path / "mapless", images, "--json", "--roi", images / "a.png").code == 2


def test_few_images_are_held_at_once(model: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LoadedDetector(open_detector(model, CPU), batch_size=2, num_workers=2)
    taken = 0

    def many() -> object:
        nonlocal taken
        for _ in range(30):
            taken += 1
            yield images / "a.png"

    with loaded.workers() as pool:
        ahead = []
        for done, _ in enumerate(loaded.stream(many(), None, pool), 1):  # type: ignore[arg-type]
            ahead.append(taken - done)
    assert taken == 30 and max(ahead) <= 3 * 2 + 2


@pytest.mark.slow
def test_as_a_user_types_it(run_command: RunCommand, model: Path, images: Path, tmp_path: Path) -> None:
    finished = run_command("predict.py", model, "in/**/*.png", "--out", "out here", "--device", "cpu",
                           "--fail_on_defect", cwd=tmp_path)  # fmt: skip
    assert finished.returncode == 3, finished.stderr
    rows = read_rows(tmp_path / "out here" / "predictions.csv")
    assert [row["path"] for row in rows] == ["in/a.png", "in/line 1/b.png"]
    assert "2 images scored, 1 anomalous: out here/predictions.csv" in finished.stdout
    assert not math.isnan(float(rows[0]["score"]))

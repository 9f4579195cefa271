"""Images at their own resolution, from the file to the tables: a class whose images all differ in size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from in_process import read_rows
from PIL import Image
from sklearn import metrics as sklearn_metrics

from patchcore import class_run, class_scoring
from patchcore.configs import (
    BackboneConfig,
    DatasetConfig,
    FastFlowConfig,
    OutputConfig,
    PreprocessingConfig,
    RunConfig,
    RuntimeConfig,
    TileConfig,
    TrainingConfig,
    TrainingSource,
)
from patchcore.datasets.images import IGNORED
from patchcore.datasets.inspection import DatasetSplit, InspectionDataset
from patchcore.datasets.loader import ImageLoader
from patchcore.detector import (
    DETECTORS,
    AnomalyDetector,
    DetectorBuilder,
    ImageBatches,
    Prediction,
    require_images,
)
from patchcore.evaluation.metrics import pixel_metrics
from patchcore.evaluation.plots.pictures import FAST_COMPRESSION, Caption, HeatScale, png_bytes, segmentation_picture
from patchcore.pipeline import load_and_evaluate, train_and_evaluate
from patchcore.prediction import open_detector
from patchcore.scoring.calibration import Calibration

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_SIDE = 96
WHOLE = PreprocessingConfig(64, 64, max_side_px=MAX_SIDE)
# Test image: size in the file, size to be scored. Only what is longer than 96 px is scaled, and to 96 px.
SIZES = {
    "dent/000": ((64, 64), (64, 64)),
    "good/000": ((40, 100), (38, 96)),
    "good/001": ((90, 60), (90, 60)),
    "good/002": ((64, 64), (64, 64)),
    "spot/000": ((150, 70), (96, 45)),
    "spot/001": ((33, 120), (26, 96)),
    "spot/002": ((70, 48), (70, 48)),
}
ALL_OUTPUTS = OutputConfig(segmentation_images=True, models=True, anomaly_maps=True)
TRAINING_SIZES = [(50, 80), (80, 50), (64, 64), (120, 192)]


@dataclass(frozen=True)
class RednessConfig:
    """Nothing to configure."""


class Redness(AnomalyDetector):
    """Takes for anomalous what is redder than the training images, pixel by pixel: exact on images of any size."""

    method = "redness"
    config_class = RednessConfig

    def fit(self, loader: ImageBatches) -> Redness:
        images = [batch["image"] for batch in loader]
        self.trained_on_ = [tuple(image.shape) for image in images]
        self.mean_ = torch.cat([redness(image).flatten() for image in images]).mean()
        return self

    def out_of_fold_calibration(self) -> Calibration | None:
        return None

    def predict(self, images: torch.Tensor) -> Prediction:
        require_images(images, self.preprocessing)
        maps = (redness(images) - self.mean_).numpy()
        return Prediction(maps.max(axis=(1, 2)), maps)

    def configuration(self) -> dict[str, Any]:
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"mean": self.mean_}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.mean_ = tensors["mean"]

    @classmethod
    def prepare(cls, config: Any, preprocessing: PreprocessingConfig, runtime: RuntimeConfig) -> DetectorBuilder:
        return lambda source, device: cls(preprocessing, source)


def redness(images: torch.Tensor) -> torch.Tensor:
    return images[:, 0].float() - images[:, 2].float()  # [B, H, W]


def write_image(path: Path, size: tuple[int, int], seed: int) -> np.ndarray:
    """Write noise, below the folder of a defect with a red rectangle and its mask; returns the mask."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(90, 160, (*size, 3), dtype=np.uint8)
    pixels[..., 0] += np.uint8(10 * (seed % 3))  # each image has another lowest value, some above zero
    mask = np.zeros(size, dtype=np.uint8)
    if path.parent.name != "good":
        top, left = size[0] // 3, size[1] // 4
        mask[top : top + 14, left : left + 11] = 1
        pixels[mask == 1, 0] = rng.integers(110, 210, int(mask.sum()))
        truth = path.parents[2] / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
        truth.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask * 255).save(truth)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return mask


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The class `part` with images of the sizes above, and `bare` without ground truth."""
    root = tmp_path_factory.mktemp("high_resolution")
    for category in ("part", "bare"):
        for i, size in enumerate(TRAINING_SIZES):
            write_image(root / category / "train" / "good" / f"{i:03d}.png", size, 50 + i)
        for i, (name, (size, _)) in enumerate(SIZES.items()):
            write_image(root / category / "test" / f"{name}.png", size, i)
    (root / "bare" / "ground_truth").rename(root / "ground_truth_of_bare")
    return root


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DETECTORS, Redness.method, Redness)
        yield


def run(
    data: Path, out: Path, category: str = "part", preprocessing: PreprocessingConfig = WHOLE, **options: Any
) -> Path:
    """Train and evaluate the detector above on one class; returns the run folder."""
    calibration = options.pop("calibration", "split")
    dataset = DatasetConfig("folder", str(data), (category,), 0.5, 4, 0, preprocessing)
    config = RunConfig(str(out), calibration=calibration, outputs=ALL_OUTPUTS, runtime=RuntimeConfig("cpu"))
    assert train_and_evaluate("redness", lambda _: RednessConfig(), config, dataset, lambda _: None)
    return out / "project" / "group"


@pytest.fixture(scope="module")
def finished(data: Path, registered: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(data, tmp_path_factory.mktemp("finished"))


@dataclass(frozen=True)
class Expected:
    """What is to be found for one test image, worked out from its files alone."""

    image: np.ndarray  # uint8 [h, w, 3]
    mask: np.ndarray  # uint8 [h, w]
    anomaly_map: np.ndarray  # float32 [h, w]


@pytest.fixture(scope="module")
def expected(data: Path, finished: Path) -> dict[str, Expected]:
    """Each test image by hand: read, scaled by Pillow where it is too long, scored."""
    with open(finished / "models" / "folder_part" / "model.json", encoding="utf-8") as file:
        assert json.load(file)["preprocessing"]["max_side_px"] == MAX_SIDE
    train = InspectionDataset(data, "part", DatasetSplit.TRAIN, WHOLE, train_val_split=0.5)
    mean = torch.cat([redness(train[i]["image"][None]).flatten() for i in range(len(train))]).mean().numpy()
    images = {}
    for name, (_, (height, width)) in SIZES.items():
        with Image.open(data / "part" / "test" / f"{name}.png") as image:
            pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        mask = np.zeros((height, width), dtype=np.uint8)
        if not name.startswith("good"):
            with Image.open(data / "part" / "ground_truth" / f"{name}_mask.png") as truth:
                mask = np.asarray(truth.resize((width, height), Image.Resampling.NEAREST)) // 255
        images[name] = Expected(pixels, mask, pixels[..., 0].astype(np.float32) - pixels[..., 2] - mean)
    return images


def stored_maps(folder: Path, category: str = "part") -> dict[str, np.ndarray]:
    with np.load(folder / "anomaly_scores" / f"folder_{category}.npz", allow_pickle=False) as stored:
        return dict(stored)


# ---------------------------------------------------------------- reading


def test_each_image_is_whole_and_alone_in_its_batch(data: Path, expected: dict[str, Expected]) -> None:
    dataset = InspectionDataset(data, "part", DatasetSplit.TEST, WHOLE)
    dataset.check_files()
    batches = list(ImageLoader(dataset, batch_size=4))
    assert len(batches) == len(SIZES)
    for batch, image in zip(batches, expected.values(), strict=True):
        np.testing.assert_array_equal(batch["image"][0].permute(1, 2, 0).numpy(), image.image)
        np.testing.assert_array_equal(batch["mask"][0].numpy(), image.mask)


def test_which_sizes_a_detector_takes() -> None:
    fixed = replace(WHOLE, max_side_px=None)
    for shape in ((1, 3, 30, 50), (4, 3, 64, 64)):
        require_images(torch.zeros(shape, dtype=torch.uint8), WHOLE)
    require_images(torch.zeros(4, 3, 64, 64), fixed)
    for shape, preprocessing, wanted in (
        ((1, 3, 30, 50), fixed, "64, 64"),
        ((1, 4, 30, 50), WHOLE, "H, W"),
        ((3, 30, 50), WHOLE, "H, W"),
    ):
        with pytest.raises(ValueError, match=rf"expected \[B, 3, {wanted}\]"):
            require_images(torch.zeros(shape), preprocessing)


# ---------------------------------------------------------------- numbers


def test_metrics_are_those_of_the_pixels_of_the_images(finished: Path, expected: dict[str, Expected]) -> None:
    row = read_rows(finished / "results.csv")[0]
    values = np.concatenate([e.anomaly_map.ravel() for e in expected.values()])
    labels = np.concatenate([e.mask.ravel() for e in expected.values()])
    beside = [e for e in expected.values() if e.mask.any()]
    by_hand = {
        "full_pixel_auroc": sklearn_metrics.roc_auc_score(labels, values),
        "pixel_ap": sklearn_metrics.average_precision_score(labels, values),
        "anomaly_pixel_auroc": sklearn_metrics.roc_auc_score(
            np.concatenate([e.mask.ravel() for e in beside]), np.concatenate([e.anomaly_map.ravel() for e in beside])
        ),
        "instance_auroc": sklearn_metrics.roc_auc_score(
            [not name.startswith("good") for name in expected], [e.anomaly_map.max() for e in expected.values()]
        ),
        "full_pro": pro_by_hand(list(expected.values())),
    }
    for column, value in by_hand.items():
        assert float(row[column]) == pytest.approx(value, abs=2e-6), column
        assert 0.1 < value < 1, "a case that everything passes shows nothing"


def pro_by_hand(images: list[Expected]) -> float:
    """Return PRO, with one region in each defective image: mean recall of regions over the false-positive rate."""
    normal = np.sort(np.concatenate([e.anomaly_map[e.mask == 0] for e in images]))
    regions = [np.sort(e.anomaly_map[e.mask == 1]) for e in images if e.mask.any()]
    thresholds = np.unique(np.concatenate([normal, *regions]))[::-1]
    rates = 1 - np.searchsorted(normal, thresholds) / len(normal)
    recalls = np.mean([1 - np.searchsorted(r, thresholds) / len(r) for r in regions], axis=0)
    rates, recalls = np.append(0, rates), np.append(0, recalls)
    kept = rates <= 0.3
    x = np.append(rates[kept], 0.3)
    y = np.append(recalls[kept], np.interp(0.3, rates, recalls))
    return float(np.diff(x) @ (y[1:] + y[:-1]) / 2 / 0.3)


def test_every_metric_is_blind_to_the_margin(finished: Path, expected: dict[str, Expected]) -> None:
    # On a canvas where each image lies elsewhere and nothing around it is a number.
    maps = np.full((len(SIZES), 120, 130), np.nan, dtype=np.float32)
    masks = np.full(maps.shape, IGNORED, dtype=np.uint8)
    for i, e in enumerate(expected.values()):
        height, width = e.mask.shape
        place = (i, slice(2 * i, 2 * i + height), slice(5 * i, 5 * i + width))
        maps[place], masks[place] = e.anomaly_map, e.mask
    metrics = pixel_metrics(maps, masks)
    row = read_rows(finished / "results.csv")[0]
    for column, value in (
        ("full_pro", metrics.pro),
        ("anomaly_pro", metrics.anomaly_pro),
        ("full_pixel_auroc", metrics.auroc),
        ("pixel_f1_max", metrics.f1_max),
    ):
        assert row[column] == f"{value:.6f}"


def test_defect_types(finished: Path, expected: dict[str, Expected]) -> None:
    rows = read_rows(finished / "results_by_defect.csv")
    assert [(r["defect_type"], r["num_images"], r["num_regions"], r["num_regions_lost"]) for r in rows] == [
        ("dent", "1", "1", "0"),
        ("spot", "3", "3", "0"),
    ]
    for row in rows:
        chosen = [e for name, e in expected.items() if name.split("/")[0] in ("good", row["defect_type"])]
        value = sklearn_metrics.roc_auc_score(
            np.concatenate([e.mask.ravel() for e in chosen]), np.concatenate([e.anomaly_map.ravel() for e in chosen])
        )
        assert float(row["full_pixel_auroc"]) == pytest.approx(value, abs=2e-6)


def test_a_stored_model_gives_the_same_table(data: Path, finished: Path, tmp_path: Path) -> None:
    model = finished / "models" / "folder_part"
    dataset = DatasetConfig("folder", str(data), ("part",), num_workers=2)
    complete = load_and_evaluate(
        ["redness"], [str(model)], dataset, str(tmp_path / "again"), OutputConfig(),
        RuntimeConfig("cpu"), lambda _: None,
    )  # fmt: skip
    assert complete
    assert (tmp_path / "again" / "results.csv").read_bytes() == (finished / "results.csv").read_bytes()


def test_held_out_images_of_many_sizes_give_the_thresholds(data: Path, finished: Path) -> None:
    with open(finished / "models" / "folder_part" / "model.json", encoding="utf-8") as file:
        calibration = json.load(file)["calibration"]
    held_out = InspectionDataset(data, "part", DatasetSplit.VAL, WHOLE, train_val_split=0.5)
    train = InspectionDataset(data, "part", DatasetSplit.TRAIN, WHOLE, train_val_split=0.5)
    detector = Redness(WHOLE, TrainingSource()).fit(ImageLoader(train, 4))
    assert all(shape[0] == 1 and max(shape[2:]) <= MAX_SIDE for shape in detector.trained_on_)
    maps = [detector.predict(held_out[i]["image"][None]).maps[0] for i in range(2)]
    assert maps[0].shape != maps[1].shape
    assert calibration["map_maxima"] == pytest.approx([m.max() for m in maps])
    assert calibration["pixel_floor"] == pytest.approx(np.mean([m.mean() for m in maps]), rel=1e-5)


# ---------------------------------------------------------------- files


def test_stored_maps_say_what_belongs_to_each_image(finished: Path, expected: dict[str, Expected]) -> None:
    stored = stored_maps(finished)
    assert stored["maps"].shape == stored["masks"].shape == (7, 96, 96)  # the highest and the widest image
    assert [tuple(size) for size in stored["sizes"].tolist()] == [size for _, size in SIZES.values()]
    for i, e in enumerate(expected.values()):
        height, width = stored["sizes"][i]
        inside = np.zeros((96, 96), dtype=bool)
        inside[:height, :width] = True
        np.testing.assert_allclose(stored["maps"][i, :height, :width], e.anomaly_map, atol=1e-4)
        np.testing.assert_array_equal(stored["masks"][i, :height, :width], e.mask)
        assert (stored["masks"][i][~inside] == IGNORED).all()
        assert (stored["maps"][i][~inside] == stored["maps"][i][inside].min()).all()


def test_pictures_show_each_image_without_margin(finished: Path, expected: dict[str, Expected]) -> None:
    stored = stored_maps(finished)
    with open(finished / "models" / "folder_part" / "model.json", encoding="utf-8") as file:
        calibration = json.load(file)["calibration"]
    low, threshold = calibration["pixel_floor"], calibration["pixel"]["threshold"]
    scale = HeatScale(low, low + 1.5 * (threshold - low), threshold)
    for i, (name, e) in enumerate(expected.items()):
        height, width = e.mask.shape
        anomaly_map = stored["maps"][i, :height, :width]
        truth = name.split("/")[0]
        caption = Caption(f"{name}.png", truth, float(anomaly_map.max()), calibration["image"]["threshold"])
        picture = segmentation_picture(e.image, e.mask, anomaly_map, scale, caption)
        written = finished / "segmentation_images" / "folder_part" / f"{name.replace('/', '_')}.png"
        assert written.read_bytes() == png_bytes(picture, FAST_COMPRESSION)


def test_without_ground_truth_and_calibration(
    data: Path, registered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales = []
    draw = class_run.segmentation_picture
    monkeypatch.setattr(class_run, "segmentation_picture", lambda *args: scales.append(args[3]) or draw(*args))
    folder = run(data, tmp_path, "bare", calibration="none")
    row = read_rows(folder / "results.csv")[0]
    assert float(row["instance_auroc"]) > 0.4
    assert row["full_pixel_auroc"] == row["full_pro"] == ""
    stored = stored_maps(folder, "bare")
    assert set(stored) == {"maps", "paths", "sizes"}
    inside = np.concatenate(
        [m[:height, :width].ravel() for m, (height, width) in zip(stored["maps"], stored["sizes"], strict=True)]
    )
    assert set(scales) == {HeatScale(float(inside.min()), float(inside.max()), None)}


def test_resized_and_cropped_images_have_no_sizes(data: Path, registered: None, tmp_path: Path) -> None:
    folder = run(data, tmp_path, preprocessing=replace(WHOLE, max_side_px=None), calibration="none")
    stored = stored_maps(folder)
    assert set(stored) == {"maps", "masks", "paths"}
    assert stored["maps"].shape == (7, 64, 64)


def test_maps_of_one_size_are_not_copied() -> None:
    maps = np.zeros((2, 5, 7), dtype=np.float32)
    assert class_scoring.extended(maps, (5, 7), 0) is maps


def test_tiles_of_fastflow(data: Path, tmp_path: Path) -> None:
    backbone = BackboneConfig("efficientnet_lite0", ("blocks.1",), weights="random")
    training = TrainingConfig(epochs=1)
    config = FastFlowConfig(backbone, flow_steps=1, training=training, tiles=TileConfig(24, 24))
    preprocessing = PreprocessingConfig(32, 32, max_side_px=MAX_SIDE)
    dataset = DatasetConfig("folder", str(data), ("part",), 0.5, 4, 0, preprocessing)
    run_config = RunConfig(str(tmp_path), calibration="kfold", outputs=ALL_OUTPUTS, runtime=RuntimeConfig("cpu"))
    assert train_and_evaluate("fastflow", lambda _: config, run_config, dataset, lambda _: None)
    folder = tmp_path / "project" / "group"
    stored = stored_maps(folder)
    detector = open_detector(folder / "models" / "folder_part", torch.device("cpu"))
    scores = read_rows(folder / "anomaly_scores" / "folder_part.csv")
    test = InspectionDataset(data, "part", DatasetSplit.TEST, preprocessing)
    for i, (height, width) in enumerate(size for _, size in SIZES.values()):
        prediction = detector.predict(test[i]["image"][None])
        np.testing.assert_allclose(stored["maps"][i, :height, :width], prediction.maps[0], rtol=1e-5)
        assert float(scores[i]["score"]) == pytest.approx(prediction.scores[0], rel=1e-5)


# ---------------------------------------------------------------- latency


@pytest.mark.parametrize(("seconds", "calls"), [(0.1, 2 + 7), (4.0, 2 + 3), (100.0, 2 + 3), (2.1, 2 + 5)])
def test_slow_detectors_are_measured_on_fewer_images(
    data: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, calls: int
) -> None:
    now, scored = 0.0, 0

    def predict(images: torch.Tensor) -> None:
        nonlocal now, scored
        now, scored = now + seconds, scored + 1

    monkeypatch.setattr(class_scoring, "time", SimpleNamespace(perf_counter=lambda: now))
    test = InspectionDataset(data, "part", DatasetSplit.TEST, WHOLE)
    timings = class_scoring.latency(SimpleNamespace(predict=predict), test)  # type: ignore[arg-type]
    assert scored == calls
    assert timings == {"latency_p50_ms": pytest.approx(1000 * seconds), "latency_p95_ms": pytest.approx(1000 * seconds)}

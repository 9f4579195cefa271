"""One class of a run: train, calibrate, score, measure, write its files."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchcore.batch_halving import PredictInMemory, call_in_memory
from patchcore.class_data import count_lost_regions, open_dataset, open_validation
from patchcore.class_shares import Crew
from patchcore.configs import DatasetConfig, EpochConfig, OutputConfig, RunConfig, TrainingSource
from patchcore.datasets.images import IGNORED
from patchcore.datasets.inspection import GOOD, DatasetSplit, InspectionDataset
from patchcore.datasets.loader import ImageLoader
from patchcore.detector import (
    AnomalyDetector,
    DetectorBuilder,
    ImageShares,
    Prediction,
    TrainingArtifacts,
    TrainingPlan,
)
from patchcore.errors import ConfigurationError, DataError
from patchcore.evaluation.false_alarms import image_false_alarms, pixel_false_alarms
from patchcore.evaluation.metrics import DEFECT
from patchcore.evaluation.plots.curves import training_picture
from patchcore.evaluation.plots.pictures import (
    FAST_COMPRESSION,
    Caption,
    HeatScale,
    picture_names,
    png_bytes,
    segmentation_picture,
)
from patchcore.evaluation.summary import class_metrics, defect_metrics
from patchcore.resuming import checkpoint_path, read_checkpoint, remove_checkpoint
from patchcore.runtime import in_threads, peak_memory_megabytes, progress, reset_peak_memory
from patchcore.scoring.calibration import Calibration, MapStatistics, calibrate
from patchcore.scoring.thresholds import LabelledScores, ValidationScores, with_rule
from patchcore.storage import run_folder
from patchcore.storage.files import write_bytes, write_csv
from patchcore.storage.run_folder import ClassResult
from patchcore.storage.torch_export import state_bytes

LOGGER = logging.getLogger(__name__)

PIXELS_PER_PASS = 2**19  # ten images of 224 px: networks take longer per image with fewer, and not less with more
LATENCY_IMAGES = 20
LATENCY_WARMUP = 2
LATENCY_SECONDS = 10  # of measuring, after which LATENCY_IMAGES_AT_LEAST are enough
LATENCY_IMAGES_AT_LEAST = 3
EPOCH_METRICS = ("instance_auroc", "full_pixel_auroc")


@dataclass(frozen=True)
class ClassTask:
    """What the processing of every class of a run has in common."""

    folder: Path
    dataset: DatasetConfig
    outputs: OutputConfig
    device: torch.device
    epochs: EpochConfig = field(default_factory=EpochConfig)
    log_group: str = ""

    def row_name(self, category: str) -> str:
        return run_folder.row_name(self.dataset.name, category)

    def checkpoint(self, category: str) -> Path:
        return checkpoint_path(self.folder, self.row_name(category))

    @property
    def images_per_pass(self) -> int:
        """Images that the model gets at once: --batch_size, or more where that is too few to keep it busy."""
        return max(self.dataset.batch_size, PIXELS_PER_PASS // self.dataset.preprocessing.imagesize_px**2)


@dataclass(frozen=True)
class _TestResult:
    """Raw results on the test images of one class, in the order of the records.

    Images may differ in size: maps and masks are as high and as wide as the highest and the widest one, and those of
    an image lie at the top left. The margin holds the map's minimum, which moves no extreme of the class, and IGNORED.
    """

    scores: np.ndarray  # float32 [N]
    maps: np.ndarray | None  # float32 [N, H, W]
    masks: np.ndarray | None  # uint8 [N, H, W]
    images: list[np.ndarray] | None  # uint8 [3, h, w] each, kept for pictures alone
    sizes: np.ndarray  # int64 [N, 2], height and width of each image
    timings: dict[str, float | int | None]

    def of_image(self, arrays: np.ndarray, index: int) -> np.ndarray:
        """Return what `maps` or `masks` hold of one image, [h, w], without the margin."""
        height, width = self.sizes[index]
        return arrays[index, :height, :width]


def train_class(
    task: ClassTask,
    category: str,
    seed: int,
    builders: Mapping[str, DetectorBuilder],
    run: RunConfig,
    crew: Crew | None = None,
) -> ClassResult:
    """Train, calibrate and evaluate one class, and write its files.

    Args:
        task: The run.
        category: The class.
        seed: The seed.
        builders: What makes the detector of each class.
        run: What was asked for.
        crew: What reads the training images in shares; None where this process reads them.
    """
    reset_peak_memory()
    train, held_out, test = (open_dataset(task.dataset, category, split, seed) for split in DatasetSplit)
    validation = (
        open_validation(task.dataset, run.validation_path, category) if run.validation_path is not None else None
    )
    detector = builders[category](TrainingSource(task.dataset.name, category, seed), task.device)
    for part in (train, held_out, test, *([validation] if validation else [])):
        part.check_files(detector.smallest_side_px)
    shares = crew.shares(task, train, seed, task.images_per_pass) if crew is not None else None
    detector.plan = _training_plan(task, category, detector, held_out, test, shares)
    history_folder = task.folder / "training" / task.row_name(category)
    started = time.perf_counter()
    try:
        if shares is not None:
            detector.fit(_loader(task, train))  # which the shares read
        else:
            batch_size = min(_loader(task, train).batch_size, len(train))
            call_in_memory(detector.fit, lambda size: _loader(task, train, size), batch_size, category)
    except ConfigurationError as error:
        if detector.plan.resume_from is None:
            raise
        raise DataError(f"{task.checkpoint(category)}: {error}") from error  # the fault of this class alone
    finally:  # the history matters most where training failed
        _write_history(history_folder, category, detector.training_artifacts(task.log_group))
    trained = time.perf_counter()
    calibration = _calibrate(detector, run.calibration, held_out, task)
    if calibration is not None:
        labelled = _validation_scores(detector, _loader(task, validation)) if validation else None
        detector.calibration_ = with_rule(calibration, run.threshold_rule, labelled)
    detector.release_training_data()
    calibrated = time.perf_counter()
    if task.outputs.models:
        exports = detector.training_artifacts(task.log_group).exports
        folder = task.folder / "models" / task.row_name(category)
        detector.save(folder, {name: content() for name, content in exports.items()})
    LOGGER.debug(
        "%s: %d training images, %s", category, len(train), detector.calibration_ and detector.calibration_.image
    )
    timings = {
        "train_images": len(train),
        "train_seconds": trained - started,
        "calibration_seconds": calibrated - trained,
    }
    result = evaluate_class(task, category, detector, test, timings)
    remove_checkpoint(task.checkpoint(category))  # last: who resumes an evaluation needs no training again
    return result


def _training_plan(
    task: ClassTask,
    category: str,
    detector: AnomalyDetector,
    held_out: InspectionDataset,
    test: InspectionDataset,
    shares: ImageShares | None,
) -> TrainingPlan:
    """Return what surrounds the training of a class: held-out images, checkpoints, numbers that select nothing."""
    path = task.checkpoint(category)
    every = task.epochs

    def after_epoch(epoch: int, state: Callable[[], dict[str, Any]]) -> None:
        if every.checkpoint_every is not None and epoch % every.checkpoint_every == 0:
            write_bytes(path, state_bytes(state()))
        if every.eval_every is not None and epoch % every.eval_every == 0:
            _announce_epoch(task, epoch, detector, test)

    return TrainingPlan(
        held_out=_loader(task, held_out) if len(held_out) else None,
        resume_from=read_checkpoint(path, category) if path.exists() else None,
        after_epoch=after_epoch if every != EpochConfig(None, None) else None,
        scratch_folder=task.folder,
        shares=shares,
    )


def _announce_epoch(task: ClassTask, epoch: int, detector: AnomalyDetector, test: InspectionDataset) -> None:
    """Log the test metrics of an epoch, marked as what they are."""
    result = _predict(detector, _loader(task, test), keep_images=False)
    labels = np.array([r.is_anomalous for r in test.records])
    metrics = class_metrics(result.scores, labels, result.maps, result.masks, None)
    shown = ", ".join(f"{name} {metrics[name]:.4f}" for name in EPOCH_METRICS if metrics[name] is not None)
    LOGGER.info("%s: epoch %d on TEST images, which select nothing: %s", test.category, epoch, shown or "no metrics")


def _write_history(folder: Path, category: str, artifacts: TrainingArtifacts) -> None:
    """Write the table and the curve of a training in epochs."""
    if not artifacts.history:
        return
    columns = list(artifacts.history[0])
    rows = [[run_folder.format_number(row[name]) for name in columns] for row in artifacts.history]
    write_csv(folder / "training_log.csv", columns, rows)
    write_bytes(
        folder / "training_curve.png", png_bytes(training_picture(artifacts.history, category, artifacts.loss_unit))
    )


def _loader(task: ClassTask, dataset: InspectionDataset, images_per_pass: int | None = None) -> ImageLoader:
    pin_memory = task.device.type == "cuda"
    return ImageLoader(dataset, images_per_pass or task.images_per_pass, task.dataset.num_workers, pin_memory)


def _calibrate(
    detector: AnomalyDetector, method: str, held_out: InspectionDataset, task: ClassTask
) -> Calibration | None:
    """Calibrate on normal images that the scores' model has not seen; None where there are too few."""
    if method == "none" or not detector.can_calibrate:
        return None
    if method == "kfold":
        calibration = detector.out_of_fold_calibration()
        if calibration is None:
            LOGGER.warning("%s: one training image gives no threshold: calibration left out", held_out.category)
        return calibration
    if len(held_out) < 2:
        raise DataError(f"{len(held_out)} image(s) held out, calibration needs 2: lower --train_val_split")
    result = _predict(detector, _loader(task, held_out), keep_images=False)
    maps = result.maps
    chunks = [result.of_image(maps, i)[None] for i in range(len(maps))] if maps is not None else []
    return calibrate("split", 1, result.scores, MapStatistics.of(chunks) if chunks else None)


def _validation_scores(detector: AnomalyDetector, loader: ImageLoader) -> ValidationScores:
    """Score labelled images and, where there are maps and masks, their pixels."""
    result = _predict(detector, loader, keep_images=False)
    images = LabelledScores(result.scores, np.array([r.is_anomalous for r in loader.dataset.records]))
    if result.maps is None or result.masks is None:
        return ValidationScores(images, None)
    inside = result.masks != IGNORED
    return ValidationScores(images, LabelledScores(result.maps[inside], result.masks[inside] == DEFECT))


def _predict(detector: AnomalyDetector, loader: ImageLoader, keep_images: bool) -> _TestResult:
    """Score all images of a loader, and time it."""
    predictions: list[Prediction] = []
    masks: list[np.ndarray] = []
    images: list[np.ndarray] = []
    sizes: list[tuple[int, int]] = []
    predict = PredictInMemory(detector)
    started = time.perf_counter()
    for batch in progress(loader, f"{loader.dataset.category}: scoring", total=len(loader)):
        predictions += predict(batch["image"])
        sizes += [tuple(image.shape[1:]) for image in batch["image"]]
        # Copies: what a worker sent keeps a file open as long as it is held, and systems allow about a thousand.
        if "mask" in batch:
            masks.append(batch["mask"].numpy().copy())
        if keep_images:
            images += list(batch["image"].numpy().copy())
    largest = max(height for height, _ in sizes), max(width for _, width in sizes)
    for i, prediction in enumerate(predictions):  # one after the other: all maps may be large
        if prediction.maps is not None and prediction.maps.shape[1:] != largest:
            lowest = prediction.maps.min(axis=(1, 2), keepdims=True)
            predictions[i] = replace(prediction, maps=_extended(prediction.maps, largest, lowest))
    joined = detector.join(predictions)
    seconds = time.perf_counter() - started
    timings: dict[str, float | int | None] = {
        "test_images": loader.num_images,
        "images_per_second": loader.num_images / seconds,
    }
    return _TestResult(
        joined.scores,
        joined.maps,
        np.concatenate([_extended(mask, largest, IGNORED) for mask in masks]) if masks else None,
        images if keep_images else None,
        np.array(sizes),
        timings,
    )


def _extended(arrays: np.ndarray, size: tuple[int, int], fill: np.ndarray | int) -> np.ndarray:
    """Give arrays [B, h, w] a margin at the bottom and on the right, so that they have `size`.

    Args:
        arrays: Maps or masks; they come back as they are if they have that size.
        size: Height and width, at least those of the arrays.
        fill: Value of the margin: one number, or [B, 1, 1].
    """
    height, width = arrays.shape[1:]
    if (height, width) == size:
        return arrays
    extended = np.empty((len(arrays), *size), arrays.dtype)
    extended[:] = fill
    extended[:, :height, :width] = arrays
    return extended


def _latency(detector: AnomalyDetector, test: InspectionDataset) -> dict[str, float | int | None]:
    """Return the median and 95th percentile of the time for one image that is in memory, ms."""
    images = [test[i]["image"][None] for i in range(min(LATENCY_IMAGES, len(test)))]
    for image in images[:LATENCY_WARMUP]:
        detector.predict(image)
    milliseconds: list[float] = []
    for image in progress(images, f"{test.category}: latency"):
        started = time.perf_counter()
        detector.predict(image)
        milliseconds.append(1000 * (time.perf_counter() - started))
        if len(milliseconds) >= LATENCY_IMAGES_AT_LEAST and sum(milliseconds) > 1000 * LATENCY_SECONDS:
            break
    p50, p95 = np.percentile(milliseconds, [50, 95])
    return {"latency_p50_ms": float(p50), "latency_p95_ms": float(p95)}


def evaluate_class(
    task: ClassTask,
    category: str,
    detector: AnomalyDetector,
    test: InspectionDataset,
    timings: dict[str, Any],
) -> ClassResult:
    """Score the test images of one class, compute its numbers, and write its files; the record comes last."""
    row_name = task.row_name(category)
    result = _predict(detector, _loader(task, test), keep_images=task.outputs.segmentation_images)
    peak_memory = peak_memory_megabytes()  # of the method, before metrics and pictures
    calibration = detector.calibration_
    threshold = calibration.image.threshold if calibration else None
    defect_types = [r.defect_type for r in test.records]
    labels = np.array([r.is_anomalous for r in test.records])
    metrics = class_metrics(result.scores, labels, result.maps, result.masks, threshold)
    by_defect = defect_metrics(result.scores, defect_types, result.maps, result.masks, threshold, GOOD)
    count_lost_regions(test, by_defect)
    timings = {
        "train_images": None,
        "train_seconds": None,
        "calibration_seconds": None,
        **timings,
        **result.timings,
        **_latency(detector, test),
        "peak_memory_mb": peak_memory,
        "model_mb": sum(t.nbytes for t in detector.tensors().values()) / 1e6,
    }
    _write_scores(task, row_name, test, result, calibration)
    if task.outputs.segmentation_images:
        _write_pictures(task.folder / "segmentation_images" / row_name, test, result, calibration)
    false_alarms = _false_alarms(result, np.flatnonzero(~labels), calibration) if calibration else []
    record = ClassResult(row_name, metrics, by_defect, timings, false_alarms)
    run_folder.save_class_result(task.folder, record)
    LOGGER.debug("%s finished: %s %s", category, metrics, timings)
    return record


def _false_alarms(result: _TestResult, good: np.ndarray, calibration: Calibration) -> list[dict[str, Any]]:
    """Return the rows of false_alarms.csv: what the thresholds flag of the good test images, by their numbers."""
    counts = [image_false_alarms(result.scores[good], calibration.image.threshold)]
    if result.maps is not None and calibration.pixel is not None:
        maps, masks = result.maps, result.masks
        pairs = ((result.of_image(maps, i), None if masks is None else result.of_image(masks, i)) for i in good)
        counts += pixel_false_alarms(pairs, calibration.pixel.threshold)
    return [count.row(str(calibration.rule), calibration.rule.aimed_rate) for count in counts]


def _write_scores(
    task: ClassTask, row_name: str, test: InspectionDataset, result: _TestResult, calibration: Calibration | None
) -> None:
    """Write the csv of image scores, and the raw maps if they were asked for."""
    paths = [r.path.relative_to(test.root).as_posix() for r in test.records]
    rows: list[list[run_folder.Cell]] = []
    normalized = calibration.image.normalized(result.scores) if calibration else None
    for i, record in enumerate(test.records):
        score = float(result.scores[i])
        decision = int(score > calibration.image.threshold) if calibration else None
        level = float(normalized[i]) if normalized is not None else None
        defect_px = int((result.masks[i] == 1).sum()) if result.masks is not None else None
        rows.append([paths[i], record.defect_type, int(record.is_anomalous), score, level, decision, defect_px])
    run_folder.write_image_scores(task.folder / "anomaly_scores" / f"{row_name}.csv", rows)
    if task.outputs.anomaly_maps and result.maps is not None:
        path = task.folder / "anomaly_scores" / f"{row_name}.npz"
        own_sizes = result.sizes if test.preprocessing.max_side_px is not None else None
        run_folder.write_anomaly_maps(path, result.maps, result.masks, paths, own_sizes, _pixel_scale(calibration))


def _write_pictures(
    folder: Path, test: InspectionDataset, result: _TestResult, calibration: Calibration | None
) -> None:
    """Write one picture per test image, all on one colour scale."""
    assert result.images is not None
    maps, images = result.maps, result.images
    if maps is None:
        LOGGER.warning("%s: this method has no anomaly maps: no pictures are written", test.category)
        return
    scale = _heat_scale(maps, calibration)
    names = picture_names([(r.defect_type, r.path.stem) for r in test.records])
    threshold = calibration.image.threshold if calibration else None

    def write(i: int) -> None:
        record = test.records[i]
        name = f"{record.defect_type}/{record.path.name}"
        caption = Caption(name, record.defect_type, float(result.scores[i]), threshold)
        mask = result.of_image(result.masks, i) if result.masks is not None else None
        image, anomaly_map = images[i].transpose(1, 2, 0), result.of_image(maps, i)
        picture = segmentation_picture(image, mask, anomaly_map, scale, caption)
        write_bytes(folder / names[i], png_bytes(picture, FAST_COMPRESSION))

    written = in_threads(write, range(len(test.records)))
    for _ in progress(written, f"{test.category}: pictures", total=len(test.records)):
        pass


def _pixel_scale(calibration: Calibration | None) -> tuple[float, float] | None:
    """Return the map values of an ordinary normal pixel and of the pixel threshold; None without calibration."""
    if calibration is None or calibration.pixel is None or calibration.pixel_floor is None:
        return None
    return calibration.pixel_floor, calibration.pixel.threshold


def _heat_scale(maps: np.ndarray, calibration: Calibration | None) -> HeatScale:
    """Return the colour scale of a class; without calibration there is no threshold, and it spans the maps shown."""
    scale = _pixel_scale(calibration)
    return HeatScale(float(maps.min()), float(maps.max()), None) if scale is None else HeatScale.up_to_threshold(*scale)

"""One class of a run: train, calibrate, score, measure, write its files."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchcore.batch_halving import call_in_memory
from patchcore.class_data import count_lost_regions, open_dataset, open_validation
from patchcore.class_scoring import ScoredImages, latency, score_images
from patchcore.class_shares import Crew
from patchcore.configs import DatasetConfig, EpochConfig, OutputConfig, RunConfig, TrainingSource
from patchcore.datasets.images import IGNORED
from patchcore.datasets.inspection import GOOD, DatasetSplit, InspectionDataset
from patchcore.datasets.loader import ImageLoader
from patchcore.detector import (
    AnomalyDetector,
    DetectorBuilder,
    ImageShares,
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
from patchcore.process_group import ALONE, Processes
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
    processes: Processes = ALONE

    def row_name(self, category: str) -> str:
        return run_folder.row_name(self.dataset.name, category)

    def checkpoint(self, category: str) -> Path:
        return checkpoint_path(self.folder, self.row_name(category))

    @property
    def images_per_pass(self) -> int:
        """Images that the model gets at once: --batch_size, or more where that is too few to keep it busy."""
        return max(self.dataset.batch_size, PIXELS_PER_PASS // self.dataset.preprocessing.imagesize_px**2)


@dataclass(frozen=True)
class Learned:
    """What the training of a class leaves.

    Attributes:
        detector: Fitted.
        calibration: From the training images by folds; None where that was not asked for.
        held_out: Normal images that were kept from the gradients.
        test: The test images.
        validation: The images that choose thresholds, where the rule needs any.
        num_images: Training images.
        train_seconds: Time of the training.
        calibration_seconds: Time of the folds.
    """

    detector: AnomalyDetector
    calibration: Calibration | None
    held_out: InspectionDataset
    test: InspectionDataset
    validation: InspectionDataset | None
    num_images: int
    train_seconds: float
    calibration_seconds: float


def learn_class(
    task: ClassTask, category: str, seed: int, builder: DetectorBuilder, run: RunConfig, crew: Crew | None = None
) -> Learned:
    """Train one class and score its folds: all that the processes of a training do together.

    The first of them alone reads what is not trained on, and writes files.

    Args:
        task: The run.
        category: The class.
        seed: The seed.
        builder: What makes its detector.
        run: What was asked for.
        crew: As for `train_class`.
    """
    processes = task.processes
    with processes.together():
        train, held_out, test = (open_dataset(task.dataset, category, split, seed) for split in DatasetSplit)
        validation = None
        detector = builder(TrainingSource(task.dataset.name, category, seed), task.device)
        if processes.is_first:
            if run.validation_path is not None:
                validation = open_validation(task.dataset, run.validation_path, category)
            for part in (train, held_out, test, *([validation] if validation else [])):
                part.check_files(detector.smallest_side_px)
        shares = crew.shares(task, train, seed, task.images_per_pass) if crew is not None else None
        plan = _training_plan(task, category, detector, held_out, test, shares)
    _require_same_images(processes.gathered((len(train), len(held_out))), category)
    own = processes.share(len(train))
    detector.plan = replace(plan, resume_from=processes.from_first(plan.resume_from), first_image=own.start)
    started = time.perf_counter()
    _fit(detector, task, train.subset(own))
    trained = time.perf_counter()
    calibration = _fold_calibration(detector, category) if run.calibration == "kfold" else None
    seconds = time.perf_counter() - trained
    return Learned(detector, calibration, held_out, test, validation, len(train), trained - started, seconds)


def _fit(detector: AnomalyDetector, task: ClassTask, train: InspectionDataset) -> None:
    """Fit a detector to the images of this process, and write its history, however that ends."""
    category = detector.source.category
    try:
        if detector.plan.shares is not None:
            detector.fit(_loader(task, train))  # which the shares read
        else:
            batch_size = max(1, min(_loader(task, train).batch_size, len(train)))
            call_in_memory(detector.fit, lambda size: _loader(task, train, size), batch_size, category)
    except ConfigurationError as error:
        if detector.plan.resume_from is None:
            raise
        raise DataError(f"{task.checkpoint(category)}: {error}") from error  # the fault of this class alone
    finally:  # the history matters most where training failed
        if task.processes.is_first:
            folder = task.folder / "training" / task.row_name(category)
            _write_history(folder, category, detector.training_artifacts(task.log_group))


def _require_same_images(found: Sequence[tuple[int, int]], category: str) -> None:
    """Raise DataError unless all processes, which may be on several machines, see as many images."""
    if len(set(found)) > 1:
        counts = ", ".join(str(train + held_out) for train, held_out in found)
        raise DataError(f"{category}: the processes find {counts} training images: give each machine the same data set")


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
    with task.processes.in_step():
        task.processes.from_first((category, seed))  # the others wait for it
        learned = learn_class(task, category, seed, builders[category], run, crew)
    detector, test = learned.detector, learned.test
    started = time.perf_counter()
    calibration = learned.calibration
    if run.calibration == "split":
        calibration = _split_calibration(detector, learned.held_out, task)
    if calibration is not None:
        validation = learned.validation
        labelled = _validation_scores(detector, _loader(task, validation)) if validation else None
        detector.calibration_ = with_rule(calibration, run.threshold_rule, labelled)
    detector.release_training_data()
    calibration_seconds = learned.calibration_seconds + time.perf_counter() - started
    if task.outputs.models:
        exports = detector.training_artifacts(task.log_group).exports
        folder = task.folder / "models" / task.row_name(category)
        detector.save(folder, {name: content() for name, content in exports.items()})
    calibrated = detector.calibration_
    LOGGER.debug("%s: %d training images, %s", category, learned.num_images, calibrated and calibrated.image)
    timings = {
        "train_images": learned.num_images,
        "train_seconds": learned.train_seconds,
        "calibration_seconds": calibration_seconds,
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
    processes = task.processes

    def after_epoch(epoch: int, state: Callable[[], dict[str, Any]]) -> None:
        if processes.is_first and every.checkpoint_every is not None and epoch % every.checkpoint_every == 0:
            write_bytes(path, state_bytes(state()))
        if every.eval_every is not None and epoch % every.eval_every == 0:
            detector.tensors()  # completes them, which takes all processes
            if processes.is_first:
                _announce_epoch(task, epoch, detector, test)

    own = processes.share(len(held_out))
    return TrainingPlan(
        held_out=_loader(task, held_out.subset(own)) if len(held_out) else None,
        resume_from=read_checkpoint(path, category) if processes.is_first and path.exists() else None,
        after_epoch=after_epoch if every != EpochConfig(None, None) else None,
        scratch_folder=task.folder,
        shares=shares,
        processes=processes,
        first_held_out=own.start,
    )


def _announce_epoch(task: ClassTask, epoch: int, detector: AnomalyDetector, test: InspectionDataset) -> None:
    """Log the test metrics of an epoch, marked as what they are."""
    result = score_images(detector, _loader(task, test), keep_images=False)
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


def _fold_calibration(detector: AnomalyDetector, category: str) -> Calibration | None:
    """Calibrate on training images, each scored by a model that has not seen it; None where there are too few."""
    if not detector.can_calibrate:
        return None
    calibration = detector.out_of_fold_calibration()
    if calibration is None:
        LOGGER.warning("%s: one training image gives no threshold: calibration left out", category)
    return calibration


def _split_calibration(detector: AnomalyDetector, held_out: InspectionDataset, task: ClassTask) -> Calibration | None:
    """Calibrate on the held-out images."""
    if not detector.can_calibrate:
        return None
    if len(held_out) < 2:
        raise DataError(f"{len(held_out)} image(s) held out, calibration needs 2: lower --train_val_split")
    result = score_images(detector, _loader(task, held_out), keep_images=False)
    maps = result.maps
    chunks = [result.of_image(maps, i)[None] for i in range(len(maps))] if maps is not None else []
    return calibrate("split", 1, result.scores, MapStatistics.of(chunks) if chunks else None)


def _validation_scores(detector: AnomalyDetector, loader: ImageLoader) -> ValidationScores:
    """Score labelled images and, where there are maps and masks, their pixels."""
    result = score_images(detector, loader, keep_images=False)
    images = LabelledScores(result.scores, np.array([r.is_anomalous for r in loader.dataset.records]))
    if result.maps is None or result.masks is None:
        return ValidationScores(images, None)
    inside = result.masks != IGNORED
    return ValidationScores(images, LabelledScores(result.maps[inside], result.masks[inside] == DEFECT))


def evaluate_class(
    task: ClassTask,
    category: str,
    detector: AnomalyDetector,
    test: InspectionDataset,
    timings: dict[str, Any],
) -> ClassResult:
    """Score the test images of one class, compute its numbers, and write its files; the record comes last."""
    row_name = task.row_name(category)
    result = score_images(detector, _loader(task, test), keep_images=task.outputs.segmentation_images)
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
        **latency(detector, test),
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


def _false_alarms(result: ScoredImages, good: np.ndarray, calibration: Calibration) -> list[dict[str, Any]]:
    """Return the rows of false_alarms.csv: what the thresholds flag of the good test images, by their numbers."""
    counts = [image_false_alarms(result.scores[good], calibration.image.threshold)]
    if result.maps is not None and calibration.pixel is not None:
        maps, masks = result.maps, result.masks
        pairs = ((result.of_image(maps, i), None if masks is None else result.of_image(masks, i)) for i in good)
        counts += pixel_false_alarms(pairs, calibration.pixel.threshold)
    return [count.row(str(calibration.rule), calibration.rule.aimed_rate) for count in counts]


def _write_scores(
    task: ClassTask, row_name: str, test: InspectionDataset, result: ScoredImages, calibration: Calibration | None
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
    folder: Path, test: InspectionDataset, result: ScoredImages, calibration: Calibration | None
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

"""The images that thresholds come from: whether there are enough, and of the right kind, before any work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from patchcore.class_data import open_dataset, open_validation
from patchcore.configs import DatasetConfig, RunConfig
from patchcore.datasets.inspection import DatasetSplit, ImageRecord, InspectionDataset, require_images
from patchcore.datasets.overlap import shared_file
from patchcore.errors import ConfigurationError, DataError
from patchcore.scoring.thresholds import highest_quantile, images_needed


def require_calibration_images(run: RunConfig, dataset: DatasetConfig, has_maps: bool) -> None:
    """Check what calibration and threshold rule ask of the data.

    A class whose files are at fault is passed over: it fails by name when its turn comes.

    Args:
        run: Calibration and threshold rule.
        dataset: What to read, with its classes named.
        has_maps: Whether the method has anomaly maps, and thus a pixel threshold.

    Raises:
        ConfigurationError: A class has too few images for them, or they are of the wrong kind.
    """
    if run.calibration == "split":
        _require_held_out(dataset)
    if run.threshold_rule.quantile is not None:
        _require_supported_quantile(run, dataset, run.threshold_rule.quantile)
    if run.validation_path is not None:
        _require_validation(run.validation_path, dataset, has_maps)


def _sound_classes(dataset: DatasetConfig, split: DatasetSplit) -> Iterator[tuple[str, InspectionDataset]]:
    """Yield each class with the images of a split, but for classes whose files are at fault."""
    for category in dataset.categories:
        try:
            yield category, open_dataset(dataset, category, split, seed=0)  # which images depends on it, not how many
        except DataError:
            continue


def _require_held_out(dataset: DatasetConfig) -> None:
    """Raise ConfigurationError if too few images are held out for a standard deviation."""
    for category, held_out in _sound_classes(dataset, DatasetSplit.VAL):
        num_images = len(_all_training_images(dataset, category))
        if num_images < 3:
            raise ConfigurationError(
                f"--calibration split holds 2 images of each class out, {category!r} has {num_images} for training: "
                "use --calibration kfold or none"
            )
        if len(held_out) < 2:
            raise ConfigurationError(
                f"--calibration split needs 2 held-out images of each class, --train_val_split "
                f"{dataset.train_val_split} holds out {len(held_out)} of {category!r}: give a smaller share, such as "
                "0.8"
            )


def _require_supported_quantile(run: RunConfig, dataset: DatasetConfig, quantile: float) -> None:
    """Raise ConfigurationError if a class has too few normal images for a quantile."""
    split, kind = (DatasetSplit.VAL, "held out") if run.calibration == "split" else (DatasetSplit.TRAIN, "to train on")
    needed = max(2, images_needed(quantile))  # a single image cannot be scored by a model of the others
    for category, images in _sound_classes(dataset, split):
        if len(images) < needed:
            lower = f"use quantile:{highest_quantile(len(images)):g} or lower, or " if len(images) >= 2 else ""
            raise ConfigurationError(
                f"--threshold_rule {run.threshold_rule} needs the scores of {needed} good images, {category!r} has "
                f"{len(images)} {kind}: {lower}give more images"
            )


def _require_validation(path: str, dataset: DatasetConfig, has_maps: bool) -> None:
    """Raise ConfigurationError unless each class has good and defective validation images that are nobody else's."""
    if not Path(path).is_dir():
        what = "is a file" if Path(path).exists() else "does not exist"
        raise ConfigurationError(f"--validation_data {path!r} {what}: expected the folder that holds the classes")
    for category in dataset.categories:
        try:
            require_images(Path(path), category, needs_training=False)
            validation = open_validation(dataset, path, category)
            known = [*_all_training_images(dataset, category), *_test_images(dataset, category)]
        except ConfigurationError as error:
            raise ConfigurationError(f"--validation_data: {error}") from error
        except DataError:
            continue
        _require_both_kinds(validation, has_maps)
        shared = shared_file(
            [r.path for r in validation.records], [r.path for r in known], f"{category}: comparing validation images"
        )
        if shared is not None:
            same = "" if shared[0].resolve() == shared[1].resolve() else f" as {str(shared[1])!r}"
            raise ConfigurationError(
                f"--validation_data: {str(shared[0])!r} is also trained or tested on{same}: a threshold is chosen on "
                "images that are neither, give others"
            )


def _require_both_kinds(validation: InspectionDataset, has_maps: bool) -> None:
    """Raise ConfigurationError if F1 is not defined for images or, where the method has maps, for pixels."""
    folder = str(validation.root / validation.category)
    num_defective = sum(r.is_anomalous for r in validation.records)
    if num_defective in (0, len(validation)):
        raise ConfigurationError(
            f"--validation_data: {folder!r} has {len(validation) - num_defective} good and {num_defective} defective "
            "images below test/, --threshold_rule f1 needs both: add them or use another rule"
        )
    if has_maps and not validation.has_masks:
        raise ConfigurationError(
            f"--validation_data: {folder!r} has no ground_truth, from which --threshold_rule f1 takes the pixel "
            "threshold: add the masks or use another rule"
        )


def _all_training_images(dataset: DatasetConfig, category: str) -> list[ImageRecord]:
    """Return the records of trained and held-out images together."""
    whole = replace(dataset, train_val_split=1.0, limit_train=None)
    return open_dataset(whole, category, DatasetSplit.TRAIN, seed=0).records


def _test_images(dataset: DatasetConfig, category: str) -> list[ImageRecord]:
    return open_dataset(replace(dataset, limit_test=None), category, DatasetSplit.TEST, seed=0).records

"""What a run folder holds for a comparison, read and checked."""

from __future__ import annotations

import csv
import logging
import math
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from patchcore.comparison.folders import StoredConfig, no_run_folder, read_stored_config
from patchcore.configs import ThresholdRule, TrainingSource
from patchcore.errors import ConfigurationError, DataError
from patchcore.storage import run_folder
from patchcore.storage.files import read_csv
from patchcore.storage.model_folder import read_model_header
from patchcore.storage.run_folder import ClassResult

LOGGER = logging.getLogger(__name__)

# What numpy and zipfile raise for bytes that are no archive of arrays; RuntimeError: encrypted, or an odd compression.
UNREADABLE_ARCHIVE = (
    *(OSError, ValueError, KeyError, IndexError, AttributeError, TypeError, EOFError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)
NOT_KNOWN = "not known"  # how many images a stored model was trained on, where its run folder is gone
DEFAULT_RULE = str(ThresholdRule())  # also of runs and models from before there was a choice
NO_IMAGE = 255  # mask value of padding


@dataclass(frozen=True)
class Setting:
    """What makes two runs of a class runs of the same method.

    Attributes:
        method: Name in the registry of detectors.
        method_config: Configuration of the method for the class; None where it is not known.
        calibration: How thresholds were found: the scores and, other than by default, the rule.
        preprocessing: Resize and crop.
        train_val_split: Share of the training images used for training, or NOT_KNOWN.
        limit_train: Number of training images that was asked for, or NOT_KNOWN; None asks for all.
    """

    method: str
    method_config: Mapping[str, Any] | None
    calibration: str
    preprocessing: Mapping[str, Any]
    train_val_split: float | str
    limit_train: int | str | None


@dataclass(frozen=True)
class Run:
    """What config.json says of one run folder.

    Attributes:
        folder: The run folder.
        settings: Per row name of its classes, in order: how it was made.
        seeds: Per row name: the seed; None for a stored model that is no longer where it was.
        environment: What it ran on.
        config: All that was asked for.
    """

    folder: Path
    settings: dict[str, Setting]
    seeds: dict[str, int | None]
    environment: Mapping[str, Any]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class ImageScores:
    """The image scores of one class of one run, in the order of the paths.

    Attributes:
        paths: [N] relative to the data set.
        defect_types: [N].
        labels: bool [N], True for defective.
        scores: float64 [N], raw.
        normalized: float64 [N], the threshold at 0.5; None without calibration.
        decisions: bool [N], above the threshold; None without calibration.
        defect_px: int64 [N], defect pixels after resize and crop; None in older runs and without masks.
    """

    paths: tuple[str, ...]
    defect_types: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    normalized: np.ndarray | None
    decisions: np.ndarray | None
    defect_px: np.ndarray | None

    def of(self, paths: Sequence[str]) -> ImageScores:
        """Return the scores of some of the images, in the order given."""
        position = {path: i for i, path in enumerate(self.paths)}
        chosen = np.array([position[path] for path in paths], np.int64)
        arrays = {
            name: value[chosen]
            for name, value in vars(self).items()
            if isinstance(value, np.ndarray)
        }  # fmt: skip
        return replace(self, paths=tuple(paths), **arrays)


@dataclass(frozen=True)
class StoredMaps:
    """The raw maps of one class of one run, in the order of its image scores.

    Attributes:
        maps: float32 [N, H, W].
        masks: uint8 [N, H, W] in {0, 1, 255}: normal, defect, no part of the image; None without ground truth.
        sizes: int64 [N, 2], height and width of each image, px; None where all have the size of the maps.
        pixel_scale: Map values of an ordinary normal pixel and of the pixel threshold; None without calibration, and
            in older runs.
    """

    maps: np.ndarray
    masks: np.ndarray | None
    sizes: np.ndarray | None
    pixel_scale: tuple[float, float] | None


@dataclass(frozen=True)
class ClassRun:
    """One finished class of one run."""

    run: Run
    row_name: str
    result: ClassResult
    images: ImageScores

    @property
    def setting(self) -> Setting:
        return self.run.settings[self.row_name]

    @property
    def seed(self) -> int | None:
        return self.run.seeds[self.row_name]

    @property
    def maps_path(self) -> Path:
        return self.run.folder / "anomaly_scores" / f"{self.row_name}.npz"

    def stored_maps(self) -> StoredMaps | None:
        """Read the maps of `images`, in their order; None where there are none.

        Raises:
            DataError: The file is damaged, or of other images.
        """
        return _read_maps(self.maps_path, self.images.paths)

    def maps_and_masks(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Read maps float32 [N, H, W] and masks uint8 [N, H, W]; None where one is missing; raises as `stored_maps`."""
        stored = self.stored_maps()
        return None if stored is None or stored.masks is None else (stored.maps, stored.masks)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the configurations of run folders.

    Tables over seeds, which lie beside run folders and which `project/*` names as well, are passed over.

    Raises:
        ConfigurationError: A folder holds no run, or is given twice.
    """
    if not folders:
        raise ConfigurationError("no run folder is named, expected at least one")
    folders = [f for f in folders if not (re.search(r"_seeds(_\d+)?\.csv$", f.name) and f.is_file())]
    if not folders:
        raise ConfigurationError("only tables over seeds are named, expected run folders")
    seen: dict[Path, Path] = {}
    for folder in folders:
        resolved = folder.resolve()
        if resolved in seen:
            raise ConfigurationError(f"{str(folder)!r} is given twice (first as {str(seen[resolved])!r}): name it once")
        seen[resolved] = folder
    return [_read_run(folder) for folder in folders]


def _read_run(folder: Path) -> Run:
    stored = read_stored_config(folder)
    reading = _trained if stored.seed is not None else _stored_models
    try:
        settings, seeds = reading(stored)
    except (KeyError, TypeError, AttributeError) as error:
        missing = f"has no {error.args[0]!r}" if isinstance(error, KeyError) else "is damaged"
        raise no_run_folder(folder, f"its config.json {missing}") from error
    for setting in settings.values():
        _require_sound_setting(setting, folder / "config.json")
    by_row = {stored.row_names[c]: setting for c, setting in settings.items()}
    return Run(
        folder, by_row, {stored.row_names[c]: seed for c, seed in seeds.items()}, stored.environment, stored.config
    )


def _trained(stored: StoredConfig) -> tuple[dict[str, Setting], dict[str, int | None]]:
    """Return settings and seeds per class of a run that trained."""
    config, dataset = stored.config, stored.config["dataset"]
    of_class = config.get("method_config_of_class") or dict.fromkeys(stored.row_names, config.get("method_config"))
    settings = {
        category: Setting(
            config["method"],
            of_class[category],
            _calibration(config["calibration"], config.get("threshold_rule", DEFAULT_RULE)),
            dataset["preprocessing"],
            dataset["train_val_split"],
            stored.limit_train,
        )
        for category in stored.row_names
    }
    return settings, dict.fromkeys(stored.row_names, stored.seed)


def _stored_models(stored: StoredConfig) -> tuple[dict[str, Setting], dict[str, int | None]]:
    """Return settings and seeds per class of a run that evaluated stored models, as far as these are still there."""
    settings: dict[str, Setting] = {}
    seeds: dict[str, int | None] = {}
    for category in stored.row_names:
        method, method_config, calibration = stored.config["methods"][category], None, "stored"
        model = Path(stored.config["models"][category])
        seeds[category] = None
        share: float | str = NOT_KNOWN
        limit: int | str | None = NOT_KNOWN
        try:
            header = read_model_header(model)
        except ConfigurationError as error:
            LOGGER.debug("model of %s: %s", category, error)
        else:
            method_config, seeds[category] = header.config, header.source.seed
            scores = header.calibration
            calibration = _calibration(scores.method, str(scores.rule)) if scores else "none"
            share, limit = _training_images(model, header.source)
        preprocessing = stored.config["dataset"]["preprocessing"]
        settings[category] = Setting(method, method_config, calibration, preprocessing, share, limit)
    return settings, seeds


def _calibration(scores: Any, rule: Any) -> Any:
    """Join where the normal scores come from and the rule that made a threshold of them."""
    return scores if rule == DEFAULT_RULE else f"{scores} {rule}"


def _training_images(model: Path, source: TrainingSource) -> tuple[float | str, int | str | None]:
    """Return train_val_split and limit_train of a stored model, which only the run folder it lies in knows."""
    try:
        run = read_stored_config(model.resolve().parent.parent)
    except ConfigurationError as error:
        LOGGER.debug("training run of %s: %s", model, error)
        return NOT_KNOWN, NOT_KNOWN
    if (run.seed, run.dataset) != (source.seed, source.dataset) or source.category not in run.row_names:
        return NOT_KNOWN, NOT_KNOWN  # the model was copied to another run
    return run.config["dataset"].get("train_val_split", NOT_KNOWN), run.limit_train


def _require_sound_setting(setting: Setting, path: Path) -> None:
    """Raise ConfigurationError for values of config.json that are not of their kind."""
    kinds: dict[str, tuple[type, ...]] = {
        "method": (str,),
        "method_config": (dict, type(None)),
        "calibration": (str,),
        "preprocessing": (dict,),
        "train_val_split": (int, float, str),
    }
    for name, kind in kinds.items():
        value = getattr(setting, name)
        if not isinstance(value, kind):
            raise ConfigurationError(f"{path}: {name} {value!r} is damaged: run the class again")


def read_classes(run: Run) -> tuple[list[ClassRun], list[str]]:
    """Read the finished classes of a run.

    Returns:
        The finished classes, and one sentence for each class that is left out.
    """
    found, left_out = [], []
    for row_name in run.settings:
        try:
            result = run_folder.load_class_result(run.folder, row_name)
            if result is None:
                raise DataError("not finished (failures.csv may say why): finish the run with --skip_existing")
            images = _read_scores(run.folder / "anomaly_scores" / f"{row_name}.csv")
            found.append(ClassRun(run, row_name, result, images))
        except DataError as error:
            left_out.append(f"{row_name} of {run.folder} is left out: {error}")
    return found, left_out


def _read_scores(path: Path) -> ImageScores:
    """Read a csv of image scores.

    Raises:
        DataError: It is missing or damaged.
    """
    try:
        rows = read_csv(path)
        if not rows:
            raise ValueError("it has no image")
        images = ImageScores(
            paths=tuple(row["path"] for row in rows),
            defect_types=np.array([row["defect_type"] for row in rows], dtype=object),
            labels=np.array([{"0": False, "1": True}[row["label"]] for row in rows]),
            scores=np.array([float(row["score"]) for row in rows]),
            normalized=_column(rows, "normalized_score", np.float64),
            decisions=_column(rows, "decision", np.int64),
            defect_px=_column(rows, "defect_px", np.int64),
        )
        _require_sound(images)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: evaluate the class again") from error
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(f"{path} is damaged ({error}): evaluate the class again") from error
    return images


def _column(rows: Sequence[Mapping[str, str]], name: str, dtype: type) -> np.ndarray | None:
    """Return a column of numbers, None where a cell of it is blank or the column is not there."""
    cells = [row.get(name) for row in rows]
    return None if any(cell in ("", None) for cell in cells) else np.array(cells).astype(dtype)


def _require_sound(images: ImageScores) -> None:
    """Raise ValueError for numbers that cannot be, and for images that occur twice."""
    numbers = [images.scores] if images.normalized is None else [images.scores, images.normalized]
    if not all(math.isfinite(value) for values in numbers for value in values):
        raise ValueError("a score is no finite number")
    if images.normalized is not None and not np.all((images.normalized >= 0) & (images.normalized <= 1)):
        raise ValueError("a normalized_score is not in [0, 1]")
    if images.decisions is not None and not np.isin(images.decisions, (0, 1)).all():
        raise ValueError("a decision is neither 0 nor 1")
    if images.defect_px is not None and (images.defect_px < 0).any():
        raise ValueError("a defect_px is negative")
    if len(set(images.paths)) < len(images.paths):
        raise ValueError("an image occurs twice")


def _read_maps(path: Path, image_paths: Sequence[str]) -> StoredMaps | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as content:
            names = [name.decode("utf-8", "surrogateescape") for name in content["paths"].tolist()]
            position = {name: i for i, name in enumerate(names)}
            chosen = np.array([position[name] for name in image_paths])
            maps = content["maps"][chosen]
            masks, sizes = (content[name][chosen] if name in content else None for name in ("masks", "sizes"))
            scale = None
            if "pixel_scale" in content:
                ordinary, threshold = map(float, content["pixel_scale"])
                scale = ordinary, threshold
        stored = StoredMaps(maps, masks, sizes, scale)
        _require_sound_maps(stored)
    except UNREADABLE_ARCHIVE as error:
        raise DataError(
            f"{path} is damaged or of other images ({_one_line(error)}): evaluate the class again"
        ) from error
    return _without_padding(stored)


def _require_sound_maps(stored: StoredMaps) -> None:
    """Raise ValueError for arrays that do not belong together, and for maps that are no numbers."""
    maps, masks, sizes = stored.maps, stored.masks, stored.sizes
    if maps.ndim != 3 or maps.dtype.kind != "f":
        raise ValueError(f"maps {maps.dtype} {maps.shape}")
    if masks is not None and (masks.shape != maps.shape or masks.dtype != np.uint8):
        raise ValueError(f"maps {maps.shape}, masks {masks.dtype} {masks.shape}")
    if not np.isfinite(maps if masks is None else maps[masks != NO_IMAGE]).all():
        raise ValueError("a value of a map is no finite number")
    if sizes is not None and (sizes.shape != (len(maps), 2) or sizes.dtype.kind not in "iu" or sizes.min() < 1):
        raise ValueError(f"sizes {sizes.dtype} {sizes.shape}")


def _without_padding(stored: StoredMaps) -> StoredMaps:
    """Crop maps and masks to the largest of their images.

    Files are padded to the largest image of their own run; of the same images all runs then have the same shape.
    """
    if stored.sizes is None:
        return stored
    height, width = stored.sizes.max(axis=0)
    masks = None if stored.masks is None else stored.masks[:, :height, :width]
    return replace(stored, maps=stored.maps[:, :height, :width], masks=masks)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]

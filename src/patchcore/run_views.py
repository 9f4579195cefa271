"""What one run folder shows a person: its table, and the pictures that are worth a look."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from patchcore.errors import ConfigurationError, DataError
from patchcore.evaluation.plots.pictures import picture_names
from patchcore.evaluation.report import text_table
from patchcore.storage.files import read_csv
from patchcore.storage.run_folder import ROW_NAMES, load_class_result

LOGGER = logging.getLogger(__name__)

RESULT_COLUMNS = (ROW_NAMES, "instance_auroc", "full_pixel_auroc", "full_pro", "image_f1_max", "precision", "recall")
DEFECT_COLUMNS = (ROW_NAMES, "defect_type", "num_images", "instance_auroc", "full_pixel_auroc", "full_pro", "recall")
TIMING_COLUMNS = (ROW_NAMES, "train_seconds", "images_per_second", "latency_p50_ms", "peak_memory_mb", "model_mb")
NAME_COLUMNS = (ROW_NAMES, "defect_type")


def result_table(run: Path) -> str:
    """Return the metrics of a run per class, and their mean, as an aligned table.

    Raises:
        ConfigurationError: The folder holds no finished run.
    """
    return _table(run / "results.csv", RESULT_COLUMNS)


def defect_table(run: Path) -> str:
    """Return the metrics of a run per class and defect type; raises as `result_table` does."""
    return _table(run / "results_by_defect.csv", DEFECT_COLUMNS)


def timing_table(run: Path) -> str:
    """Return times and sizes of a run per class; raises as `result_table` does."""
    return _table(run / "timings.csv", TIMING_COLUMNS)


def scored_classes(run: Path) -> list[str]:
    """Return the row names of the classes of a run that have scores."""
    return sorted(path.stem for path in (run / "anomaly_scores").glob("*.csv"))


def hardest_pictures(run: Path, row_name: str, number: int = 2) -> list[Path]:
    """Return the pictures of the good images with the highest scores, then of the anomalous ones with the lowest.

    Args:
        run: Folder of a run with --save_segmentation_images.
        row_name: Class, as `scored_classes` names it.
        number: How many of either.

    Returns:
        The pictures; none, and a warning, where the class has no pixel metrics and hence nothing to be drawn.

    Raises:
        ConfigurationError: The class has no scores, or no pictures were saved.
    """
    path = run / "anomaly_scores" / f"{row_name}.csv"
    rows = _rows(path)
    folder = run / "segmentation_images" / row_name
    if not folder.is_dir() and not _has_pixel_metrics(run, row_name):
        LOGGER.warning("there are no pictures of %s in %s: its method has no anomaly maps", row_name, run)
        return []
    try:
        names = picture_names([(row["defect_type"], PurePosixPath(row["path"]).stem) for row in rows])
        figures = [(float(row["score"]), row["label"]) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{path} is damaged ({error}): evaluate the class again") from error
    scored = sorted((score, label, folder / name) for (score, label), name in zip(figures, names, strict=True))
    good = [path for _, label, path in reversed(scored) if label == "0"]
    anomalous = [path for _, label, path in scored if label == "1"]
    chosen = good[:number] + anomalous[:number]
    missing = [path for path in chosen if not path.is_file()]
    if missing:
        raise ConfigurationError(f"{missing[0]} is not there: run with --save_segmentation_images")
    return chosen


def _has_pixel_metrics(run: Path, row_name: str) -> bool:
    """Return whether a class has pixel metrics; assumed where its record cannot be read."""
    try:
        result = load_class_result(run, row_name)
    except DataError:
        return True
    return result is None or result.metrics["full_pixel_auroc"] is not None


def _table(path: Path, columns: Sequence[str]) -> str:
    try:
        rows = [[row[c] if c in NAME_COLUMNS else _short(row[c]) for c in columns] for row in _rows(path)]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{path} is damaged ({error}): name the folder of a run that has ended") from error
    return text_table(columns, rows)


def _short(figure: str) -> str:
    """Return a figure with three decimals; whole numbers and blank cells as they are."""
    return f"{float(figure):.3f}" if "." in figure else figure


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        return read_csv(path)
    except (OSError, ValueError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigurationError(
            f"{path} cannot be read ({reason}): name the folder of a run that has ended"
        ) from error

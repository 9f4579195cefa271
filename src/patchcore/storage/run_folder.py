"""Run folders: their names, their life, and the tables in them.

<results>/<project>/<group>/     config.json  run.log  results.csv  results_by_defect.csv  timings.csv
    class_results/  anomaly_scores/  segmentation_images/  models/
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from patchcore.config_json import config_from_dict
from patchcore.errors import ConfigurationError, DataError
from patchcore.storage.files import write_bytes, write_csv, write_json

METRIC_COLUMNS = (
    "instance_auroc",
    "full_pixel_auroc",
    "full_pro",
    "anomaly_pixel_auroc",
    "anomaly_pro",
    "image_ap",
    "image_f1_max",
    "pixel_ap",
    "pixel_f1_max",
    "precision",
    "recall",
    "f1",
)
DEFECT_COLUMNS = (
    "defect_type",
    "num_images",
    "instance_auroc",
    "full_pixel_auroc",
    "full_pro",
    "image_ap",
    "pixel_ap",
    "recall",
    "num_regions",
    "num_regions_lost",
)
TIMING_COLUMNS = (
    "train_images",
    "train_seconds",
    "calibration_seconds",
    "test_images",
    "images_per_second",
    "latency_p50_ms",
    "latency_p95_ms",
    "peak_memory_mb",
    "model_mb",
)
FALSE_ALARM_COLUMNS = (
    "level",
    "rule",
    "aimed_rate",
    "num_good",
    "num_flagged",
    "rate",
    "interval_low",
    "interval_high",
)
TEXT_COLUMNS = ("defect_type", "level", "rule")
SHARE_COLUMNS = (*METRIC_COLUMNS, "aimed_rate", "rate", "interval_low", "interval_high")
IMAGE_COLUMNS = ("path", "defect_type", "label", "score", "normalized_score", "decision", "defect_px")
ROW_NAMES = "Row Names"
MEAN_ROW = "Mean"
MAX_IMAGES = 2**31  # more than a data set has, and far from where the arithmetic of a curve overflows
MAX_FIGURE = 1e15  # of seconds, images and MB, for the same reason
ROUNDING = 1e-9  # an area that is 1 may have been summed up to a little more

Cell = str | int | float | None


@dataclass(frozen=True)
class ClassResult:
    """Everything the tables say of one class.

    Attributes:
        row_name: Name of its row, `<data set>_<category>`.
        metrics: One value for each of METRIC_COLUMNS; None is a blank cell.
        by_defect: One value for each of DEFECT_COLUMNS, per defect type.
        timings: One value for each of TIMING_COLUMNS.
        false_alarms: One value for each of FALSE_ALARM_COLUMNS, per level; none without calibration, and in records of
            older versions.
    """

    row_name: str
    metrics: dict[str, Any]
    by_defect: list[dict[str, Any]]
    timings: dict[str, Any]
    false_alarms: list[dict[str, Any]] = field(default_factory=list)


def claim_folder(parent: Path, name: str) -> Path:
    """Create `parent/name`, or `name_0`, `name_1`, ... if it exists, as the original does.

    The folder is created exclusively, so that two runs started together get two folders.

    Raises:
        ConfigurationError: Nothing can be written there.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for candidate in _numbered_names(name):
            try:
                (parent / candidate).mkdir()
            except FileExistsError:
                continue
            return parent / candidate
    except OSError as error:
        raise ConfigurationError(f"results path {str(parent)!r} cannot be written ({error.strerror})") from error
    raise AssertionError("unreachable: the names never end")


def _numbered_names(name: str) -> Iterator[str]:
    """Yield `name`, `name_0`, `name_1`, ... without end."""
    yield name
    number = 0
    while True:
        yield f"{name}_{number}"
        number += 1


def free_file(parent: Path, stem: str, suffix: str) -> Path:
    """Return `stem` + `suffix`, or the first of `stem_0`, `stem_1`, ... that does not exist yet."""
    return next(p for p in (parent / f"{name}{suffix}" for name in _numbered_names(stem)) if not p.exists())


def require_writable(folder: Path) -> None:
    """Raise ConfigurationError unless `folder` exists or can be created, and can be written; leaves no trace."""
    try:
        with write_probe(folder):
            pass
    except OSError as error:
        raise ConfigurationError(f"results path {str(folder)!r} cannot be written ({error.strerror})") from error


@contextmanager
def write_probe(folder: Path) -> Iterator[Path]:
    """Make an empty folder in `folder` or the nearest folder above it that exists, for as long as the context lasts.

    Whoever sees it under the same path writes to the same place.
    """
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    probe = Path(tempfile.mkdtemp(dir=existing, prefix=".write_test"))
    try:
        yield probe
    finally:
        probe.rmdir()


def require_output_folder(out: Path) -> None:
    """Raise ConfigurationError unless `out` is a folder or can become one, and can be written; leaves no trace."""
    for path in (out, *out.parents):
        if os.path.lexists(path) and not os.path.isdir(path):
            raise ConfigurationError(
                f"--out {str(out)!r}: {str(path)!r} is no folder, expected one or a name that is free"
            )
    require_writable(out)


def is_unused(folder: Path) -> bool:
    """Return whether nothing of a run is there: no folder, or one without a visible file.

    A run that is killed while it writes its first file leaves an empty folder or a hidden temporary file.
    """
    return not folder.exists() or (folder.is_dir() and all(p.name.startswith(".") for p in folder.iterdir()))


def seed_group(group: str, seed: int) -> str:
    """Return the group's name for one of several seeds: a trailing `_S<number>` is replaced or added."""
    return f"{group_without_seed(group)}_S{seed}"


def group_without_seed(group: str) -> str:
    """Return the group's name without a trailing `_S<number>`."""
    return re.sub(r"_S\d+$", "", group)


def write_run_config(folder: Path, config: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
    """Write config.json: what was asked for, and what it ran on."""
    write_json(folder / "config.json", {"config": dict(config), "environment": dict(environment)})


def require_same_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ConfigurationError with the differences unless the folder's run had this configuration."""
    path = folder / "config.json"
    try:
        stored = dict(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigurationError(
            f"--skip_existing (or --resume): {str(folder)!r} holds no readable config.json: choose another --log_group"
        ) from error
    wanted = json.loads(json.dumps(config))
    found = [f"{name}: {old!r} there, {new!r} now" for name, old, new in differences(stored, wanted)]
    if found:
        raise ConfigurationError(
            f"--skip_existing (or --resume): the run in {str(folder)!r} differs ({'; '.join(found)}): "
            "choose another --log_group or the same options"
        )


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return (dotted name, old, new) of the leaves in which two nested dictionaries differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [(prefix, old, new)] if old != new else []
    rows = []
    for name in sorted({*old, *new}):
        rows += differences(old.get(name), new.get(name), f"{prefix}.{name}" if prefix else name)
    return rows


def row_name(dataset: str, category: str) -> str:
    """Return the name that a class has in every table and file of a run folder."""
    return f"{dataset}_{category}"


def class_result_path(folder: Path, row_name: str) -> Path:
    """Return where a finished class is recorded; written last, it says that everything else is there."""
    return folder / "class_results" / f"{row_name}.json"


def save_class_result(folder: Path, result: ClassResult) -> None:
    """Record a finished class."""
    write_json(class_result_path(folder, result.row_name), asdict(result))


def remove_class_result(folder: Path, row_name: str) -> None:
    """Let a class count as unfinished."""
    class_result_path(folder, row_name).unlink(missing_ok=True)


def load_class_result(folder: Path, row_name: str) -> ClassResult | None:
    """Return the record of a finished class, or None if there is none.

    Raises:
        DataError: The record is damaged.
    """
    path = class_result_path(folder, row_name)
    if not path.exists():
        return None
    try:
        result = config_from_dict(ClassResult, json.loads(path.read_text(encoding="utf-8")), path.name)
        _require_possible_values(result)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({error}): remove it to have the class done anew") from error
    return result


def _require_possible_values(result: ClassResult) -> None:
    """Raise ValueError unless a record has None or a value that can be for every column of the tables."""
    tables = [(METRIC_COLUMNS, result.metrics), (TIMING_COLUMNS, result.timings)]
    tables += [(DEFECT_COLUMNS, row) for row in result.by_defect]
    tables += [(FALSE_ALARM_COLUMNS, row) for row in result.false_alarms]
    impossible = []
    for columns, values in tables:
        for column in columns:
            if column not in values:
                raise ValueError(f"column {column!r} is missing")
            expected = _expected(column, values[column])
            if expected:
                impossible.append(f"{column} is {values[column]!r}, expected {expected}")
    if impossible:
        raise ValueError("; ".join(impossible))


def _expected(column: str, value: Any) -> str:
    """Say what a column holds if it is not this value, "" if it may be; written so that NaN may not."""
    if column in TEXT_COLUMNS:
        return "" if isinstance(value, str) else "a text"
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "a number"
    if column in SHARE_COLUMNS:
        return "" if -ROUNDING <= value <= 1 + ROUNDING else "a number in [0, 1]"
    if column == "train_images":
        whole = 1 <= value <= MAX_IMAGES and value == int(value)
        return "" if whole else "a whole number from 1 up"
    return "" if 0 <= value <= MAX_FIGURE else "a number from 0 up"


def format_number(value: Cell) -> str:
    """Return a cell: six decimals for numbers, empty for None."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def write_tables(folder: Path, outcomes: Mapping[str, ClassResult | str]) -> None:
    """Write results.csv, results_by_defect.csv and timings.csv; false_alarms.csv and failures.csv where there are any.

    Args:
        folder: The run folder.
        outcomes: Per row name, in order: the result, or why the class failed; a failed class has blank cells and
            does not enter the mean.
    """
    results = [outcome for outcome in outcomes.values() if isinstance(outcome, ClassResult)]
    failures = [[name, outcome] for name, outcome in outcomes.items() if isinstance(outcome, str)]
    rows = []
    for name, outcome in outcomes.items():
        metrics = outcome.metrics if isinstance(outcome, ClassResult) else dict.fromkeys(METRIC_COLUMNS)
        rows.append([name, *(format_number(metrics[c]) for c in METRIC_COLUMNS)])
    rows.append([MEAN_ROW, *(format_number(v) for v in mean_metrics(results).values())])
    write_csv(folder / "results.csv", (ROW_NAMES, *METRIC_COLUMNS), rows)
    defect_rows = [[r.row_name, *(format_number(d[c]) for c in DEFECT_COLUMNS)] for r in results for d in r.by_defect]
    write_csv(folder / "results_by_defect.csv", (ROW_NAMES, *DEFECT_COLUMNS), defect_rows)
    timing_rows = [[r.row_name, *(format_number(r.timings[c]) for c in TIMING_COLUMNS)] for r in results]
    write_csv(folder / "timings.csv", (ROW_NAMES, *TIMING_COLUMNS), timing_rows)
    alarm_rows = [
        [r.row_name, *(format_number(a[c]) for c in FALSE_ALARM_COLUMNS)] for r in results for a in r.false_alarms
    ]
    if alarm_rows:
        write_csv(folder / "false_alarms.csv", (ROW_NAMES, *FALSE_ALARM_COLUMNS), alarm_rows)
    else:  # a class that has failed since would still be in an older one
        (folder / "false_alarms.csv").unlink(missing_ok=True)
    if failures:
        write_csv(folder / "failures.csv", (ROW_NAMES, "reason"), failures)
    else:
        (folder / "failures.csv").unlink(missing_ok=True)


def mean_metrics(results: Sequence[ClassResult]) -> dict[str, float | None]:
    """Return the mean of each column over the classes that have a value there."""
    means: dict[str, float | None] = {}
    for column in METRIC_COLUMNS:
        values = [r.metrics[column] for r in results if r.metrics[column] is not None]
        means[column] = float(np.mean(values)) if values else None
    return means


@dataclass(frozen=True)
class SeedStatistics:
    """One row over the runs of several seeds.

    Attributes:
        row_name: The class, or MEAN_ROW.
        num_seeds: Runs in which it finished; for the mean, runs with a class that finished in all of them.
        columns: Mean and standard deviation (n - 1) of each of METRIC_COLUMNS; None is a blank cell.
    """

    row_name: str
    num_seeds: int
    columns: dict[str, tuple[float | None, float | None]]


def seed_statistics(runs: Sequence[Sequence[ClassResult]]) -> list[SeedStatistics]:
    """Average the finished classes of each seed; the mean, last, is over those that finished in every run."""
    names = list(dict.fromkeys(r.row_name for run in runs for r in run))
    common = {name for name in names if all(name in [r.row_name for r in run] for run in runs)}
    metrics = {name: [r.metrics for run in runs for r in run if r.row_name == name] for name in names}
    metrics[MEAN_ROW] = [mean_metrics([r for r in run if r.row_name in common]) for run in runs if common]
    return [
        SeedStatistics(name, len(rows), {c: _mean_and_std([row[c] for row in rows]) for c in METRIC_COLUMNS})
        for name, rows in metrics.items()
    ]


def write_seed_table(path: Path, statistics: Sequence[SeedStatistics]) -> None:
    """Write mean and standard deviation over seeds as `<column>_mean` and `<column>_std`."""
    header = [ROW_NAMES, "num_seeds", *(f"{c}_{s}" for c in METRIC_COLUMNS for s in ("mean", "std"))]
    rows = [
        [s.row_name, str(s.num_seeds), *(format_number(v) for c in METRIC_COLUMNS for v in s.columns[c])]
        for s in statistics
    ]
    write_csv(path, header, rows)


def _mean_and_std(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [v for v in values if v is not None]
    if not known:
        return None, None
    return float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None


def write_image_scores(path: Path, rows: Sequence[Sequence[Cell]]) -> None:
    """Write one row per test image.

    Args:
        path: The csv file.
        rows: (path relative to the data set, defect type, label 0/1, score, normalised score or None, decision 0/1
            or None, defect pixels that resize and crop have left in the mask or None) per image.
    """
    # All digits: rounding would tie scores that differ, and move them across the threshold.
    write_csv(path, IMAGE_COLUMNS, [["" if c is None else str(c) for c in row] for row in rows])


def write_anomaly_maps(
    path: Path,
    maps: np.ndarray,
    masks: np.ndarray | None,
    image_paths: Sequence[str],
    sizes: np.ndarray | None = None,
    pixel_scale: tuple[float, float] | None = None,
) -> None:
    """Write raw anomaly maps as `.npz`.

    Args:
        path: The file.
        maps: `maps` float32 [N, H, W]. Where images differ in size, those of image i are `maps[i, :h, :w]` with
            `h, w = sizes[i]`; beyond, the map repeats its minimum and the mask is 255.
        masks: `masks` uint8 [N, H, W] in {0, 1, 255}: normal, defect, no part of the image; None without ground truth.
        image_paths: `paths` [N], as bytes.
        sizes: `sizes` int64 [N, 2], height and width of each image, px; None where all have the size of the maps.
        pixel_scale: `pixel_scale` float64 [2], the mean over the pixels of normal images and the pixel threshold; None
            without calibration.
    """
    buffer = io.BytesIO()
    names = np.array([p.encode("utf-8", "surrogateescape") for p in image_paths])
    arrays: dict[str, Any] = {"maps": maps, "masks": masks, "paths": names, "sizes": sizes, "pixel_scale": pixel_scale}
    np.savez(buffer, **{name: values for name, values in arrays.items() if values is not None})
    write_bytes(path, buffer.getvalue())

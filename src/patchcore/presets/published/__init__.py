"""Published results, as data files that a researcher may add to.

`sources.json` says of each csv file which data set it is of, where its numbers come from, and which column holds what:
one row per class and run with a column per metric, or, with `metric_column` and `value_column`, one row per number.
Means over classes are left out: they are over other classes than a comparison shows.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchcore.errors import ConfigurationError

FOLDER = Path(__file__).parent
SOURCES_FILE = FOLDER / "sources.json"
MEAN_CLASS = "mean"
TEXTS = ("dataset", "name", "source", "remark")
OPTIONAL_COLUMNS = ("run_column", "note_column", "metric_column", "value_column")


@dataclass(frozen=True)
class PublishedNumber:
    """One number that others have published.

    Attributes:
        method: Whose and which run, for example "original PatchCore IM224_...".
        row_name: `<data set>_<class>`.
        metric: Column of results.csv; "original_full_pro" and "original_anomaly_pro" are no columns of ours.
        value: In [0, 1].
        source: Where the number stands.
        remark: What makes it another number than ours; "" for nothing known.
    """

    method: str
    row_name: str
    metric: str
    value: float
    source: str
    remark: str


def published_numbers(folder: Path = FOLDER) -> list[PublishedNumber]:
    """Read all files that sources.json of a folder names.

    Raises:
        ConfigurationError: A file is missing or damaged, or a value is no number in [0, 1].
    """
    path = folder / SOURCES_FILE.name
    try:
        sources = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} cannot be read ({_reason(error)}), expected JSON") from error
    if not isinstance(sources, dict):
        raise ConfigurationError(f"{path} holds no table, expected a description of each csv file by its name")
    for name, source in sources.items():
        _require_sound_source(source, f"{path}, {name!r}")
    return [number for name, source in sources.items() for number in _read(folder / name, source)]


def _require_sound_source(source: object, where: str) -> None:
    """Raise ConfigurationError unless the description of a csv file has the fields that reading it takes."""
    if not isinstance(source, dict):
        raise ConfigurationError(f"{where}: {source!r}, expected the fields {', '.join((*TEXTS, 'columns'))}")
    for field in TEXTS:
        if not isinstance(source.get(field), str):
            raise ConfigurationError(f"{where}: field {field!r} is {source.get(field)!r}, expected a text")
    columns = source.get("columns")
    if not isinstance(columns, dict) or not columns or not all(isinstance(v, str) for v in columns.values()):
        raise ConfigurationError(f"{where}: field 'columns' is {columns!r}, expected the metric of each column")
    for field in OPTIONAL_COLUMNS:
        if not isinstance(source.get(field, ""), str):
            raise ConfigurationError(f"{where}: field {field!r} is {source[field]!r}, expected the name of a column")
    if ("metric_column" in source) != ("value_column" in source):
        raise ConfigurationError(f"{where}: one of 'metric_column' and 'value_column', expected both or neither")


def _read(path: Path, source: Mapping[str, Any]) -> Iterator[PublishedNumber]:
    named = [source[field] for field in OPTIONAL_COLUMNS if field in source]
    for where, row in _rows(path, ["class", *named, *([] if "metric_column" in source else source["columns"])]):
        if row["class"].lower() == MEAN_CLASS:
            continue
        run = row[source["run_column"]] if "run_column" in source else ""
        note = row[source["note_column"]] if "note_column" in source else ""
        for metric, column, cell in _cells(row, source):
            if metric not in source["columns"]:
                expected = ", ".join(source["columns"])
                raise ConfigurationError(
                    f"{where}, column {source['metric_column']!r}: {metric!r}, expected {expected}"
                )
            yield PublishedNumber(
                method=f"{source['name']} {run}".strip(),
                row_name=f"{source['dataset']}_{row['class']}",
                metric=source["columns"][metric],
                value=_share(cell, f"{where}, column {column!r}"),
                source=source["source"],
                remark="; ".join(text for text in (source["remark"], note) if text),
            )


def _rows(path: Path, columns: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Return the rows of a csv file that has the columns, each with its place for error messages."""
    rows = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in columns if column not in (reader.fieldnames or [])]
            if missing:
                raise ConfigurationError(f"{path} has no column {missing[0]!r}, which {SOURCES_FILE.name} names")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise ConfigurationError(
                        f"{where}: expected {len(reader.fieldnames or [])} cells, as in the header"
                    )
                rows.append((where, row))
    except ConfigurationError:  # which is a ValueError, but says what is wrong already
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigurationError(f"{path} cannot be read ({_reason(error)}), expected a csv file") from error
    return rows


def _cells(row: Mapping[str, str], source: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield metric, column and text of the numbers in a row."""
    if "metric_column" in source:
        yield row[source["metric_column"]], source["value_column"], row[source["value_column"]]
        return
    for column in source["columns"]:
        if row[column]:
            yield column, column, row[column]


def _share(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:  # as NaN is not
        raise ConfigurationError(f"{where}: {cell!r}, expected a number in [0, 1]")
    return value


def _reason(error: Exception) -> str:
    return str(error.strerror) if isinstance(error, OSError) else " ".join(str(error).split())[:120]

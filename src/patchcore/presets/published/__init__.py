"""Published results, as data files that a researcher may add to.

`sources.json` says of each csv file which data set it is of, where its numbers come from, and which column holds what:
one row per class and run with a column per metric, or, with `metric_column` and `value_column`, one row per number.
Means over classes are left out: they are over other classes than a comparison shows.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
SOURCES_FILE = FOLDER / "sources.json"
MEAN_CLASS = "mean"


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


def published_numbers() -> list[PublishedNumber]:
    """Read all files that sources.json names."""
    sources = json.loads(SOURCES_FILE.read_text(encoding="utf-8"))
    return [number for name, source in sources.items() for number in _read(FOLDER / name, source)]


def _read(path: Path, source: Mapping[str, Any]) -> Iterator[PublishedNumber]:
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["class"].lower() == MEAN_CLASS:
                continue
            run = row[source["run_column"]] if "run_column" in source else ""
            note = row[source["note_column"]] if "note_column" in source else ""
            for column, cell in _cells(row, source):
                yield PublishedNumber(
                    method=f"{source['name']} {run}".strip(),
                    row_name=f"{source['dataset']}_{row['class']}",
                    metric=source["columns"][column],
                    value=float(cell),
                    source=source["source"],
                    remark="; ".join(text for text in (source["remark"], note) if text),
                )


def _cells(row: Mapping[str, str], source: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield column and text of the numbers in a row."""
    if "metric_column" in source:
        yield row[source["metric_column"]], row[source["value_column"]]
        return
    for column in source["columns"]:
        if row[column]:
            yield column, row[column]

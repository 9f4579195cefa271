"""Rows of the benchmark: what was measured, where it is kept, how it is shown."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from patchcore.errors import ConfigurationError
from patchcore.storage.files import write_bytes, write_json

RESULTS = Path(__file__).with_name("results.json")
README = Path(__file__).with_name("README.md")
VERSIONED = ("faiss-cpu", "numpy", "scikit-learn", "timm", "torch")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: What `--rows` calls it.
        stage: What is measured.
        unit: Of `ours` and `reference`, such as "s" or "images/s".
        ours: Median of the toolkit.
        reference: Median of what it is compared with.
        compared_with: What that is.
        ratio: How the two compare, in the direction that the goal speaks of.
        at_least: Smallest ratio that meets the goal.
        at_most: Largest ratio that meets the goal.
        condition: What must hold beside the speed, in words with its limit.
        measured: What was found for the condition.
        holds: Whether the condition holds.
        note: What a reader has to know of the numbers, such as an extrapolation.
    """

    name: str
    stage: str
    unit: str
    ours: float
    reference: float
    compared_with: str
    ratio: float
    at_least: float | None = None
    at_most: float | None = None
    condition: str = ""
    measured: str = ""
    holds: bool = True
    note: str = ""

    @property
    def meets_goal(self) -> bool:
        """Whether the ratio is as fast as it should be; True where there is no goal."""
        return (self.at_least is None or self.ratio >= self.at_least) and (
            self.at_most is None or self.ratio <= self.at_most
        )


def environment(data: str, threads: int) -> dict[str, Any]:
    """Return where and when the rows are measured.

    Args:
        data: Name of the data set and class.
        threads: Of torch and faiss.
    """
    return {
        "date": datetime.date.today().isoformat(),
        "data": data,
        "machine": f"{_processor()}, {os.cpu_count()} logical cores, {torch.backends.cpu.get_cpu_capability()}",
        "system": platform.platform(),
        "python": platform.python_version(),
        "threads": threads,
        "versions": {name: version(name) for name in VERSIONED},
    }


def _processor() -> str:
    """Return the processor's name; Python does not tell it on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def read_results(path: Path = RESULTS) -> dict[str, Any]:
    """Return the rows measured so far by name; none where there is no file.

    Raises:
        ConfigurationError: The file is none of ours.
    """
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path}: not the results of an earlier benchmark ({type(error).__name__}): remove it"
        ) from error


def update_results(rows: Iterable[Row], where: Mapping[str, Any], path: Path = RESULTS) -> dict[str, Any]:
    """Put rows into the file, those of the same name replaced, and return all of them.

    Args:
        rows: What was measured now.
        where: Of `environment`.
        path: The file, which appears whole or stays as it was.
    """
    measured = {row.name: {**_finite(asdict(row)), "meets_goal": row.meets_goal, "on": dict(where)} for row in rows}
    known = {**read_results(path), **measured}
    write_json(path, {"rows": known})
    return known


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a row, refusing numbers that JSON does not know."""
    bad = [key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        raise ValueError(f"row {values['name']!r} has no finite {', '.join(bad)}")
    return dict(values)


def markdown_table(rows: Mapping[str, Any], order: Sequence[str]) -> str:
    """Return the rows as a Markdown table, and below it where they were measured.

    Args:
        rows: Of `read_results`.
        order: Names in the order of the table; others follow by name.
    """
    names = [name for name in order if name in rows] + sorted(set(rows) - set(order))
    places = list(dict.fromkeys(environment_line(rows[name]["on"]) for name in names))
    lines = ["| stage | ours | compared with | ratio | goal | condition | measured |", "|---|---|---|---|---|---|---|"]
    for name in names:
        row = rows[name]
        mark = f" [{places.index(environment_line(row['on'])) + 1}]" if len(places) > 1 else ""
        cells = [
            _with_note(row["stage"], row["note"]) + mark,
            f"{row['ours']:.3g} {row['unit']}",
            f"{row['reference']:.3g} {row['unit']} ({row['compared_with']})",
            f"{row['ratio']:.3g}x{'' if row['meets_goal'] else ', **missed**'}",
            _goal(row),
            row["condition"],
            f"{row['measured']}{'' if row['holds'] else ', **does not hold**'}",
        ]
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    numbers = [f"[{number}] " if len(places) > 1 else "" for number in range(1, len(places) + 1)]
    return "\n".join([*lines, "", *(f"{number}{place}" for number, place in zip(numbers, places, strict=True))])


def _with_note(text: str, note: str) -> str:
    return f"{text} ({note})" if note else text


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _goal(row: Mapping[str, Any]) -> str:
    if row["at_least"] is not None:
        return f">= {row['at_least']:g}x"
    return f"<= {row['at_most']:g}x" if row["at_most"] is not None else ""


def environment_line(where: Mapping[str, Any]) -> str:
    """Return in one sentence what `environment` found."""
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    return (
        f"Measured on {where['date']}: {where['data']}; {where['machine']}, {where['threads']} threads; "
        f"Python {where['python']}, {versions}."
    )


def write_between_markers(text: str, section: str, path: Path = README) -> None:
    """Replace what stands between the markers of a section in a Markdown file.

    Raises:
        ConfigurationError: The file has no such markers.
    """
    begin, end = f"<!-- {section} begins -->", f"<!-- {section} ends -->"
    content = path.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise ConfigurationError(f"{path}: expected the lines {begin!r} and {end!r} once each, in this order")
    before, rest = content.split(begin)
    after = rest.split(end)[1]
    write_bytes(path, f"{before}{begin}\n\n{text}\n\n{end}{after}".encode())

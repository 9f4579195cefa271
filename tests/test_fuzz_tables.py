"""Generated tables, run folders and reports: what is read back is what was written, and no name becomes code."""

from __future__ import annotations

import csv
import html.parser
import io
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzzing import (
    HOSTILE,
    Cases,
    damaged,
    file_names,
    generated,
    nothing_outside,
    require_clear,
    require_no_formula,
    run,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from synthetic_runs import ground_truth, write_images, write_run
from test_fuzz_models import CHANGES, with_odd_value

from patchcore.cli import compare_results
from patchcore.comparison import compare
from patchcore.storage.files import csv_line, read_csv, write_csv

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CASES = Cases(at_least=300)

CELLS = st.one_of(
    st.text(st.characters(codec=None), max_size=20),
    st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=3).map("".join),
    st.floats().map(str),
)


def utf8_or_bytes(text: str) -> bool:
    """Return whether a text can be the name of a file: of surrogates, only those that stand for bytes."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return "\0" not in text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@given(st.lists(st.lists(CELLS.filter(utf8_or_bytes), min_size=3, max_size=3), max_size=5))
@generated(150)
def test_cells(place: Path, rows: list[list[str]]) -> None:
    path = place / "cells.csv"
    header = ["path", "score", "=sum"]
    write_csv(path, header, rows)
    with CASES():
        require_no_formula(path)
        assert read_csv(path) == [dict(zip(header, row, strict=True)) for row in rows]
        content = path.read_bytes()
        assert content == "".join(csv_line(row) for row in (header, *rows)).encode("utf-8", "surrogateescape")


# ---------------------------------------------------------------- comparisons


def write_pair(root: Path, name: str = "run") -> list[Path]:
    return [write_run(root, f"{name}_S{seed}", ("plate", "rod"), seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module", autouse=True)
def blank_plots() -> Iterator[None]:
    """Drawing takes a second, and has no part in what is read and written."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (n for n in vars(compare) if n.endswith("_picture")):
            patch.setattr(compare, name, lambda *_: Image.new("RGB", (8, 8)))
        yield


JSON_FILES = ("config.json", "class_results/mpdd_plate.json")


@given(st.sampled_from(JSON_FILES), CHANGES)
@generated(60)
def test_values_of_run_folders(place: Path, name: str, change: tuple[int, Any, str]) -> None:
    """A damaged configuration is no run; a damaged class is left out and named."""
    shutil.rmtree(place)
    folders = write_pair(place / "runs")
    path = folders[0] / name
    path.write_text(json.dumps(with_odd_value(json.loads(path.read_text()), *change)), encoding="utf-8")
    with CASES(), nothing_outside(place, place / "out"):
        done = run(compare_results, *folders, "--out", place / "out")
        require_clear(done, (0, 1, 2))
        assert "Error" not in done.err, done.err
        for table in (place / "out").glob("*.csv"):
            require_no_formula(table)


@given(st.sampled_from(["csv", "npz", "config.json", "json"]), st.integers(0, 2**32))
@generated(50)
def test_damaged_files_of_run_folders(place: Path, kind: str, seed: int) -> None:
    shutil.rmtree(place)
    folders = write_pair(place / "runs")
    path = {
        "csv": folders[0] / "anomaly_scores" / "mpdd_plate.csv",
        "npz": folders[0] / "anomaly_scores" / "mpdd_plate.npz",
        "config.json": folders[0] / "config.json",
        "json": folders[0] / "class_results" / "mpdd_plate.json",
    }[kind]
    path.write_bytes(damaged(path.read_bytes(), seed))
    with CASES(), nothing_outside(place, place / "out"):
        done = run(compare_results, *folders, "--out", place / "out")
        require_clear(done, (0, 1, 2))
        assert "Error" not in done.err, done.err


def odd_cell(content: str, row: int, column: int, cell: str) -> str:
    """Return a csv file in which one cell holds something else."""
    rows = list(csv.reader(io.StringIO(content, newline="")))
    rows[row % len(rows)][column % len(rows[0])] = cell
    return "".join(csv_line(r) for r in rows)


@given(st.integers(0, 40), st.integers(0, 6), st.one_of(CELLS.filter(utf8_or_bytes), st.sampled_from(["", "2", "-1"])))
@generated(50)
def test_cells_of_image_scores(place: Path, row: int, column: int, cell: str) -> None:
    shutil.rmtree(place)
    folders = write_pair(place / "runs")
    path = folders[0] / "anomaly_scores" / "mpdd_plate.csv"
    path.write_bytes(odd_cell(path.read_text(), row, column, cell).encode("utf-8", "surrogateescape"))
    with CASES(), nothing_outside(place, place / "out"):
        done = run(compare_results, *folders, "--out", place / "out")
        require_clear(done, (0, 1, 2))
        assert "Error" not in done.err, done.err
        for table in (place / "out").glob("*.csv"):
            require_no_formula(table)


# ---------------------------------------------------------------- reports


class Page(html.parser.HTMLParser):
    """The tags of a page with their attributes, and what stands in scripts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.code = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.code += data


def report(place: Path, name: str, category: str, defect_type: str) -> Page:
    """Compare a run of the names given, images included, and return its page."""
    shutil.rmtree(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("synthetic_runs.DEFECT_TYPES", (defect_type, "scratch"))
        folder = write_run(place / "runs", name, [category], data_path=place / "data")
        paths = ground_truth(category, 8, 6)[0]
    write_images(place / "data", paths)
    with nothing_outside(place, place / "out"):
        done = run(compare_results, folder, "--html", "--out", place / "out")
    require_clear(done, (0,))
    for table in (place / "out").glob("*.csv"):
        require_no_formula(table)
    summary = json.loads((place / "out" / "summary.json").read_text(encoding="utf-8"))
    assert len({row["class"] for row in summary["results"]}) == 1
    lines = (place / "out" / "comparison.md").read_bytes().decode("utf-8", "surrogateescape").split("\n")
    for above, line in itertools.pairwise(lines):
        if above.startswith("|") and line.startswith("|"):
            assert cells_of(above) == cells_of(line), (above, line)
    return Page((place / "out" / "report.html").read_text(encoding="utf-8"))


def cells_of(line: str) -> int:
    """Return how many cells a row of a markdown table has."""
    return line.replace("\\|", "").count("|")


@given(file_names(), file_names(), file_names())
@generated(30)
def test_names_in_reports(place: Path, name: str, category: str, defect_type: str) -> None:
    """Whatever runs, classes and defect types are called, the page has the tags and the code of plain names."""
    if defect_type.lower() == "good":
        return
    plain = report(place, "run", "plate", "dent")
    with CASES():
        page = report(place, name, category, defect_type)
        assert sorted(set(page.tags)) == sorted(set(plain.tags))
        assert page.code.count("</") == plain.code.count("</")


def test_so_many_cases_ran(request: pytest.FixtureRequest) -> None:
    CASES.require(request)

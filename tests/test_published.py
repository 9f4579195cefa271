"""Published numbers: every file is read, every number has a source, and what is no PRO does not pose as one."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from patchcore.comparison.measurement import METRICS
from patchcore.errors import ConfigurationError
from patchcore.presets.published import FOLDER, SOURCES_FILE, published_numbers

OWN_NAMES = {"original_full_pro", "original_anomaly_pro"}


def test_every_file_has_a_source_and_every_number_is_one() -> None:
    sources = json.loads(SOURCES_FILE.read_text(encoding="utf-8"))
    assert set(sources) == {path.name for path in FOLDER.glob("*.csv")}
    numbers = published_numbers()
    assert all(0 <= n.value <= 1 and n.source and n.method and n.metric in {*METRICS, *OWN_NAMES} for n in numbers)
    assert {n.row_name.partition("_")[0] for n in numbers} == {"mvtec", "mpdd"}
    assert not any(n.row_name.lower().endswith("_mean") for n in numbers)


def test_each_number_of_the_files_is_read_once() -> None:
    count = 0
    for path in FOLDER.glob("*.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["class"].lower() != "mean"]
        texts = {"run", "class", "method", "note", "metric", "backbone"}
        count += sum(bool(cell) for row in rows for name, cell in row.items() if name not in texts)
    assert len(published_numbers()) == count
    keys = [(n.method, n.row_name, n.metric) for n in published_numbers()]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("method", "row_name", "metric", "value"),
    [
        ("original PatchCore IM224_WR50_L2-3_P01_D1024-1024_PS-3_AN-1", "mvtec_screw", "instance_auroc", 0.9877),
        ("original PatchCore IM224_WR50_L2-3_P01_D1024-1024_PS-3_AN-1", "mvtec_screw", "original_full_pro", 0.7326),
        ("anomalib PatchCore ResNet-18", "mvtec_zipper", "instance_auroc", 0.953),
        ("compact re-implementation of PatchCore", "mvtec_wood", "full_pixel_auroc", 0.922),
        ("MPDD comparison FastFlow ResNet18", "mpdd_bracket_brown", "anomaly_pixel_auroc", 0.74),
    ],
)
def test_numbers_that_were_looked_up(method: str, row_name: str, metric: str, value: float) -> None:
    found = [n for n in published_numbers() if (n.method, n.row_name, n.metric) == (method, row_name, metric)]
    assert [n.value for n in found] == [value]


SOURCE = {
    "dataset": "mvtec", "name": "theirs", "columns": {"auroc": "instance_auroc"}, "source": "a paper", "remark": "",
}  # fmt: skip
LONG = {**SOURCE, "metric_column": "metric", "value_column": "value"}


@pytest.mark.parametrize(
    ("sources", "table", "message"),
    [
        ("{", "", r"sources\.json cannot be read"),
        ("[]", "", r"sources\.json holds no table"),
        ({"t.csv": 3}, "", r"sources\.json, 't\.csv': 3, expected the fields dataset"),
        ({"t.csv": {**SOURCE, "source": None}}, "", "'t\\.csv': field 'source' is None, expected a text"),
        ({"t.csv": {**SOURCE, "columns": []}}, "", r"field 'columns' is \[\]"),
        ({"t.csv": {**SOURCE, "run_column": 3}}, "", "field 'run_column' is 3"),
        ({"t.csv": {**SOURCE, "metric_column": "metric"}}, "", "expected both or neither"),
        ({"nowhere.csv": SOURCE}, "", r"nowhere\.csv cannot be read \(No such file"),
        ({"t.csv": SOURCE}, "class,pro\nscrew,0.5\n", r"t\.csv has no column 'auroc', which sources\.json names"),
        ({"t.csv": SOURCE}, "class,auroc\nbolt,0.5\nscrew,high\n", r"t\.csv, line 3, column 'auroc': 'high', expected"),
        (
            {"t.csv": SOURCE},
            "class,auroc\nscrew,98.5\n",
            r"line 2, column 'auroc': '98\.5', expected a number in \[0, 1\]",
        ),
        ({"t.csv": SOURCE}, "class,auroc\nscrew,nan\n", "line 2, column 'auroc': 'nan', expected"),
        ({"t.csv": SOURCE}, "class,auroc\nscrew\n", "line 2: expected 2 cells"),
        ({"t.csv": SOURCE}, "class,auroc\nscrew,0.5,0.5\n", "line 2: expected 2 cells"),
        ({"t.csv": SOURCE}, "class,auroc\n" + "a" * 200_000, r"t\.csv cannot be read \(field larger"),
        ({"t.csv": LONG}, "class,metric,value\nscrew,pro,0.5\n", "line 2, column 'metric': 'pro', expected auroc"),
        ({"t.csv": LONG}, "class,metric,value\nscrew,auroc,\n", "line 2, column 'value': '', expected a number"),
    ],
)
def test_damaged_files_of_a_user_are_named_to_the_cell(
    sources: object, table: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "sources.json").write_text(sources if isinstance(sources, str) else json.dumps(sources))
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(ConfigurationError, match=message) as error:
        published_numbers(tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_of_a_user_is_read(tmp_path: Path) -> None:
    (tmp_path / "sources.json").write_text(json.dumps({"t.csv": SOURCE}))
    (tmp_path / "t.csv").write_text("class,auroc\nscrew,0.5\nbolt,\nmean,0.5\n")
    assert [(n.row_name, n.value) for n in published_numbers(tmp_path)] == [("mvtec_screw", 0.5)]


def test_what_differs_is_said() -> None:
    by_name = {n.method: n for n in published_numbers()}
    assert "re-implementation" in by_name["compact re-implementation of PatchCore"].source
    assert "not PRO" in by_name["original PatchCore IM224_WR50_L2-3_P01_D1024-1024_PS-3_AN-1"].remark
    assert not any(n.metric == "full_pro" for n in published_numbers())

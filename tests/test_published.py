"""Published numbers: every file is read, every number has a source, and what is no PRO does not pose as one."""

from __future__ import annotations

import csv
import json

import pytest

from patchcore.comparison.measurement import METRICS
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


def test_what_differs_is_said() -> None:
    by_name = {n.method: n for n in published_numbers()}
    assert "re-implementation" in by_name["compact re-implementation of PatchCore"].source
    assert "not PRO" in by_name["original PatchCore IM224_WR50_L2-3_P01_D1024-1024_PS-3_AN-1"].remark
    assert not any(n.metric == "full_pro" for n in published_numbers())

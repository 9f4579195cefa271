"""`explore_dataset` as a user types it, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import RunCommand, write_category
from in_process import Finished, invoke
from PIL import Image

from patchcore.cli import explore_dataset
from patchcore.configs import RESIZE_MODES

SMALL = ("--resize", 64, "--imagesize", 64)
CLASS_KEYS = {
    *("counts", "sizes", "modes", "num_unreadable", "num_turned_by_exif", "num_transparent", "has_masks", "defects"),
    *("crops", "colours", "num_duplicate_groups", "duplicates"),
}
CROP_KEYS = {"area_lost_fraction", "defect_px_lost_fraction", "num_regions", "num_regions_lost", "num_masks_emptied"}
DEFECT_KEYS = {"num_masks", "num_empty", "num_regions", "defect_fraction", "region_area_px"}
PROBLEM_KEYS = {"severity", "kind", "class", "found", "consequence", "remedy", "num_files", "files"}


def explore(*args: object) -> Finished:
    return invoke(explore_dataset, *args)


def stored(out: Path) -> dict[str, Any]:
    return json.loads((out / "exploration.json").read_text(encoding="utf-8"))


def test_a_broken_class_gives_exit_code_1_and_hides_no_other(
    small_dataset: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    (small_dataset / "plate/train/good/002.png").write_bytes(b"")
    out = tmp_path / "out"
    finished = run_command("explore_dataset.py", "mpdd", small_dataset, "--out", out, *SMALL)
    assert finished.returncode == 1, finished.stderr
    assert finished.stderr == ""
    assert "002.png: not a readable image (the file is empty): replace or remove the file" in finished.stdout
    assert finished.stdout.endswith(f"exploration: {out}\n")
    assert {p.name for p in out.iterdir()} == {
        "exploration.json", "exploration.md", "distributions.png",
        "contact_sheet_plate.png", "contact_sheet_rod.png",
    }  # fmt: skip
    content = stored(out)
    assert list(content["classes"]) == ["plate", "rod"]
    assert content["classes"]["rod"]["counts"] == {"train": {"good": 6}, "test": {"good": 3, "spot": 3}}
    assert [p["class"] for p in content["problems"] if p["severity"] == "error"] == ["plate"]
    for picture in out.glob("*.png"):
        assert min(Image.open(picture).size) > 300


def test_the_json_holds_what_the_schema_says(small_dataset: Path, tmp_path: Path) -> None:
    finished = explore("folder", small_dataset, "--out", tmp_path, "-d", "rod", *SMALL, "--resize_mode", "square")
    assert (finished.code, finished.err) == (0, "")
    content = stored(tmp_path)
    assert set(content) == {"schema_version", "dataset", "path", "preprocessing", "classes", "problems"}
    assert content["preprocessing"] == {
        "resize_px": 64, "imagesize_px": 64, "resize_mode": "square", "max_side_px": None,
    }  # fmt: skip
    (rod,) = content["classes"].values()
    assert set(rod) == CLASS_KEYS
    assert set(rod["crops"]) == set(RESIZE_MODES) and all(set(c) == CROP_KEYS for c in rod["crops"].values())
    assert set(rod["defects"]) == {"spot"} and set(rod["defects"]["spot"]) == DEFECT_KEYS
    assert rod["defects"]["spot"]["region_area_px"] == [256] * 5  # a square of 16 px
    assert set(rod["colours"]) == {"train good", "test good", "test anomalous"}
    assert all(set(p) == PROBLEM_KEYS for p in content["problems"])


def test_a_second_exploration_replaces_its_files_and_no_others(small_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    first = explore("mpdd", small_dataset, "--out", tmp_path, *SMALL)
    before = (tmp_path / "exploration.json").read_bytes()
    second = explore("mpdd", small_dataset, "--out", tmp_path, *SMALL)
    assert first == second
    assert (tmp_path / "exploration.json").read_bytes() == before, "the same files give the same bytes"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_is_no_class_is_named(small_dataset: Path, tmp_path: Path) -> None:
    (small_dataset / "bolt/Train/good").mkdir(parents=True)
    finished = explore("mpdd", small_dataset, "--out", tmp_path, *SMALL)
    assert finished.code == 0
    assert "warning: bolt: no class: the folder 'bolt' holds neither train nor test" in finished.out
    assert "bolt" not in explore("mpdd", small_dataset, "--out", tmp_path, "-d", "rod", *SMALL).out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("mpdd", "{data}", "-d", "plat"), "class 'plat' not found in '{data}': found plate, rod; did you mean plate?"),
        (("mpdd", "{data}/gone"), "data path '{data}/gone' does not exist: expected the folder that holds the classes"),
        (("mpdd", "{data}/plate"), "data path '{data}/plate' is a class itself: give the folder above it"),
        (("mpd", "{data}"), "'mpd'"),
        (("mpdd", "{data}", "--resize", "32"), "--imagesize 64 is larger than --resize 32"),
        (("mpdd", "{data}", "-d", "rod", "-d", "rod"), "class rod is named more than once"),
        (("mpdd",), "DATA_PATH"),
    ],
)
def test_wrong_arguments_are_one_line_and_write_nothing(
    args: tuple[str, ...], message: str, small_dataset: Path, tmp_path: Path
) -> None:
    typed = [part.format(data=small_dataset) for part in args]
    finished = explore("--out", tmp_path / "out", *SMALL, *typed)
    assert finished.code == 2
    (line,) = finished.error_lines
    assert message.format(data=small_dataset).lower() in line.lower()
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file_is_refused(small_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    finished = explore("mpdd", small_dataset, "--out", tmp_path / "out", *SMALL)
    assert finished.code == 2 and "is no folder, expected one or a name that is free" in finished.err


def test_classes_of_names_alike_but_for_case_have_a_sheet_each(tmp_path: Path) -> None:
    write_category(tmp_path / "data", "rod", num_train=2, num_test=1)
    write_category(tmp_path / "data", "ROD", num_train=2, num_test=1)
    if len(list((tmp_path / "data").iterdir())) < 2:
        pytest.skip("this file system does not tell upper from lower case")
    assert explore("mpdd", tmp_path / "data", "--out", tmp_path / "out", *SMALL).code == 0
    assert len(list((tmp_path / "out").glob("contact_sheet_*"))) == 2


def test_help_says_what_the_exit_code_means() -> None:
    finished = explore("--help")
    assert finished.code == 0
    assert "Exit code 1 if a run would fail on a class" in " ".join(finished.out.split())
    for option in ("--out", "--resize_mode", "--imagesize", "-d"):
        assert option in finished.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "category", "counts"),
    [
        ("mpdd", "metal_plate", {"good": 26, "major_rust": 14, "scratches": 34, "total_rust": 23}),
        ("mvtec", "bottle", {"good": 20, "broken_large": 20, "broken_small": 22, "contamination": 21}),
    ],
)
def test_real_classes_have_no_errors(
    name: str, category: str, counts: dict[str, int], real_data: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    finished = run_command("explore_dataset.py", name, real_data / name, "-d", category, "--out", tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    content = stored(tmp_path)
    assert content["classes"][category]["counts"]["test"] == counts
    assert content["classes"][category]["num_duplicate_groups"] == 0
    assert {p["kind"] for p in content["problems"]} <= {"regions cropped away"}

"""Few-shot table and curve: the means by hand, and the command on run folders of every kind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import small_run
from in_process import Finished, invoke, read_rows
from PIL import Image

from patchcore.cli import fewshot_curve, run_patchcore
from patchcore.comparison import fewshot
from patchcore.errors import ConfigurationError
from patchcore.evaluation.fewshot import (
    FEWSHOT_METRICS,
    FewShotPoint,
    Observation,
    fewshot_points,
    markdown_tables,
    mean_and_std_text,
    seeds_text,
)
from patchcore.evaluation.plots.curves import _bars_text, fewshot_picture
from patchcore.evaluation.plots.style import LINE_COLOURS, LINE_MARKERS
from patchcore.storage.run_folder import (
    METRIC_COLUMNS,
    TIMING_COLUMNS,
    ClassResult,
    save_class_result,
    write_run_config,
)


def observed(row_name: str, limit: int | None, num_images: float, seed: int, *values: float | None) -> Observation:
    """Return one class of one run; metrics that are not given are blank."""
    padded = [*values, *[None] * (len(FEWSHOT_METRICS) - len(values))]
    return Observation(row_name, limit, num_images, seed, dict(zip(FEWSHOT_METRICS, padded, strict=True)))


def by_place(points: Sequence[FewShotPoint]) -> dict[tuple[str, float], FewShotPoint]:
    return {(p.row_name, p.num_images): p for p in points}


def test_mean_and_standard_deviation_over_seeds_by_hand() -> None:
    # 0.6, 0.8, 1.0: mean 0.8, squared deviations 0.04 + 0 + 0.04, divided by n - 1 = 2, root 0.2.
    points = fewshot_points([observed("a", 4, 4, seed, 0.6 + 0.2 * seed) for seed in range(3)], "Mean")
    (point,) = points
    assert (point.row_name, point.limit, point.num_images, point.num_seeds) == ("a", 4, 4, 3)
    assert point.means["instance_auroc"] == pytest.approx(0.8) and point.stds["instance_auroc"] == pytest.approx(0.2)
    assert point.means["full_pro"] is None and point.stds["full_pro"] is None
    assert mean_and_std_text(point, "instance_auroc") == "0.800 ± 0.200"
    assert mean_and_std_text(point, "full_pro") == ""
    (single,) = fewshot_points([observed("a", 4, 4, 0, 0.5)], "Mean")
    assert single.stds["instance_auroc"] is None and mean_and_std_text(single, "instance_auroc") == "0.500"


def test_the_mean_over_classes_is_taken_within_each_run() -> None:
    runs = [observed("b", 2, 2, 0, 0.5), observed("a", 2, 2, 0, 0.7), observed("b", 2, 2, 1, 0.9)]
    points = fewshot_points([*runs, observed("a", 2, 2, 1, 0.9)], "Mean")
    assert [p.row_name for p in points] == ["b", "a", "Mean"]
    # Runs have 0.6 and 0.9: mean 0.75, deviation 0.15 each, root of 2 * 0.0225.
    mean = points[-1]
    assert mean.num_seeds == 2 and mean.means["instance_auroc"] == pytest.approx(0.75)
    assert mean.stds["instance_auroc"] == pytest.approx(np.sqrt(0.045))
    # A run without one of the classes has no mean: its point would be over other classes than its neighbours.
    incomplete = by_place(fewshot_points([*runs, observed("a", 4, 4, 1, 1.0)], "Mean"))
    assert incomplete["Mean", 2].num_seeds == 1 and ("Mean", 4) not in incomplete


def test_a_limit_that_adds_no_image_adds_no_point_and_counts_a_seed_once() -> None:
    observations = [
        observed("small", None, 40, 0, 0.9),
        observed("small", None, 40, 1, 0.7),
        observed("small", 50, 40, 0, 0.9),
        observed("large", None, 60, 0, 0.5),
        observed("large", None, 60, 1, 0.5),
        observed("large", 50, 50, 0, 0.4),
    ]
    points = by_place(fewshot_points(observations, "Mean"))
    assert list(points) == [("small", 40), ("large", 50), ("large", 60), ("Mean", 45), ("Mean", 50)]
    assert points["small", 40].limit == 50 and points["small", 40].num_seeds == 2
    assert points["small", 40].means["instance_auroc"] == pytest.approx(0.8)
    table = markdown_tables(list(points.values())).splitlines()
    assert table[2:7] == [
        "| class | 50 | all |",
        "| --- | --- | --- |",
        "| small | 0.800 ± 0.141 (40 images) |  |",
        "| large | 0.400 | 0.500 ± 0.000 (60 images) |",
        "| Mean | 0.650 (45 images) | 0.650 ± 0.071 (50 images) |",
    ]
    assert "over 1 to 2 seeds" in table[0]


def test_there_is_a_markdown_table_for_each_metric() -> None:
    table = markdown_tables(fewshot_points([observed("a", 4, 4, 0, 0.5, 0.25, 0.75)], "Mean")).splitlines()
    titles = [line.partition(" by number")[0] for line in table if line.startswith("##")]
    assert titles == ["## image AUROC", "## pixel AUROC", "## PRO"]
    assert [line for line in table if line.startswith("| a ")] == ["| a | 0.500 |", "| a | 0.250 |", "| a | 0.750 |"]


def test_the_picture_says_what_its_bars_are() -> None:
    three = [observed("a", 1, 1, seed, 0.5) for seed in range(3)]
    cases = [(three, "3 seeds"), ([*three, observed("a", 2, 2, 0, 0.5)], "1 to 3 seeds")]
    for observations, seeds in cases:
        points = fewshot_points(observations, "Mean")
        assert seeds_text(points) == seeds and _bars_text(points) == f"bars: standard deviation over {seeds}"
    assert _bars_text(fewshot_points(three[:1], "Mean")) == "one seed: no bars"


def points_of(num_classes: int, limits: Sequence[int], *values: float | None) -> list[FewShotPoint]:
    names = [f"class_{i}" for i in range(num_classes)]
    return fewshot_points([observed(n, k, k, s, *values) for n in names for k in limits for s in (0, 1)], "Mean")


def test_the_picture_has_a_panel_per_metric_and_a_style_per_class() -> None:
    both = fewshot_picture(points_of(2, (1, 4), 0.9, 0.9, 0.8), "Mean")
    image_alone = fewshot_picture(points_of(2, (1, 4), 0.9), "Mean")
    assert both.mode == "RGB" and both.width > 1.5 * image_alone.width and both.height == image_alone.height
    pixels = np.asarray(both).reshape(-1, 3)
    for colour in (*LINE_COLOURS[:2], "#000000"):  # two classes and the mean
        assert (pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=1).any(), colour
    styles = {(LINE_COLOURS[i % len(LINE_COLOURS)], LINE_MARKERS[i % len(LINE_MARKERS)]) for i in range(60)}
    assert len(styles) == 60


def test_the_picture_of_one_point_and_of_blank_cells_alone() -> None:
    for points in (points_of(1, (4,), 1.0, 1.0, 1.0), points_of(1, (4,)), points_of(20, (1, 100, 101), 0.5)):
        assert np.asarray(fewshot_picture(points, "Mean")).std() > 0


WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Write what a run leaves that the comparison reads."""

    def write(name: str, limit: object, seed: int, **changes: Any) -> Path:
        classes: dict[str, tuple[int, float | None, float | None]] = changes.pop("classes")
        categories = changes.pop("categories", list(classes))
        dataset = {"name": "mpdd", "categories": categories, "limit_train": limit, "path": "/data"}
        config = {"method": "patchcore", "method_config": {"num_nn": 1}, "dataset": dataset, "seed": seed}
        folder = tmp_path / name
        write_run_config(folder, {**config, "outputs": {"models": seed == 0}, **changes}, {"device": "cpu"})
        for category, (num_images, auroc, pro) in classes.items():
            metrics = {**dict.fromkeys(METRIC_COLUMNS), "instance_auroc": auroc, "full_pro": pro}
            timings = {**dict.fromkeys(TIMING_COLUMNS), "train_images": num_images}
            save_class_result(folder, ClassResult(f"mpdd_{category}", metrics, [], timings))
        return folder

    return write


def compare(tmp_path: Path, *folders: Path) -> Finished:
    return invoke(fewshot_curve, *folders, "--out", tmp_path / "out")


def test_the_command_writes_table_and_curve(tmp_path: Path, write_run: WriteRun) -> None:
    folders = [
        write_run("k2_S0", 2, 0, classes={"plate": (2, 0.6, 0.5), "rod": (2, 0.8, None)}),
        write_run("k2_S1", 2, 1, classes={"plate": (2, 0.8, 0.7), "rod": (2, 0.8, None)}),
        write_run("k50_S0", 50, 0, classes={"plate": (50, 0.9, 0.9), "rod": (40, 1.0, None)}),
        write_run("all_S0", None, 0, classes={"plate": (54, 1.0, 0.9), "rod": (40, 1.0, None)}),
    ]
    finished = compare(tmp_path, *folders)
    assert (finished.code, finished.err) == (0, "")
    rows = read_rows(tmp_path / "out" / "fewshot.csv")
    columns = [f"{metric}_{statistic}" for metric in FEWSHOT_METRICS for statistic in ("mean", "std")]
    assert list(rows[0]) == ["class", "num_images", "num_seeds", *columns]
    assert [(r["class"], r["num_images"], r["num_seeds"]) for r in rows] == [
        ("mpdd_plate", "2", "2"),
        ("mpdd_plate", "50", "1"),
        ("mpdd_plate", "54", "1"),
        ("mpdd_rod", "2", "2"),
        ("mpdd_rod", "40", "1"),
        ("Mean", "2", "2"),
        ("Mean", "45", "1"),
        ("Mean", "47", "1"),
    ]
    first, rod, mean = rows[0], rows[3], rows[5]
    assert (first["instance_auroc_mean"], first["instance_auroc_std"]) == ("0.700000", "0.141421")
    assert (first["full_pro_mean"], first["full_pixel_auroc_mean"]) == ("0.600000", "")
    assert rows[1]["instance_auroc_std"] == "" and rod["full_pro_mean"] == ""
    assert (mean["instance_auroc_mean"], mean["instance_auroc_std"]) == ("0.750000", "0.070711")  # of 0.7 and 0.8
    assert "| mpdd_rod | 0.800 ± 0.000 | 1.000 (40 images) |" in (tmp_path / "out" / "fewshot.md").read_text("utf-8")
    with Image.open(tmp_path / "out" / "fewshot_curve.png") as picture:
        assert picture.width > 1000
    lines = finished.out.splitlines()
    assert lines[0].split()[:3] == ["class", "images", "seeds"] and "0.700 ± 0.141" in lines[2]
    assert lines[-1] == f"few-shot table and curve: {tmp_path / 'out'}"
    again = compare(tmp_path, *reversed(folders))
    assert again.code == 0 and read_rows(tmp_path / "out" / "fewshot.csv") == rows


def test_classes_that_are_not_finished_are_named_and_left_out(tmp_path: Path, write_run: WriteRun) -> None:
    both = ["plate", "rod"]
    whole = write_run("whole", 2, 0, classes={"plate": (2, 0.6, 0.5), "rod": (2, 0.8, 0.5)})
    interrupted = write_run("interrupted", 4, 0, classes={"plate": (4, 0.7, 0.5)}, categories=both)
    empty = write_run("empty", 8, 0, classes={}, categories=both)
    damaged = write_run("damaged", 16, 0, classes={"plate": (16, 0.9, 0.5), "rod": (16, 0.9, 0.5)})
    (damaged / "class_results" / "mpdd_rod.json").write_text("{")
    finished = compare(tmp_path, whole, interrupted, empty, damaged)
    assert finished.code == 1
    named = [("mpdd_rod", interrupted), ("mpdd_plate", empty), ("mpdd_rod", empty), ("mpdd_rod", damaged)]
    assert len(finished.error_lines) == len(named)
    for line, (row_name, folder) in zip(finished.error_lines, named, strict=True):
        assert line.startswith(f"warning: {row_name} of {folder} is left out: ")
    points = {(r["class"], r["num_images"]) for r in read_rows(tmp_path / "out" / "fewshot.csv")}
    assert points == {("mpdd_plate", "2"), ("mpdd_plate", "4"), ("mpdd_plate", "16"), ("mpdd_rod", "2"), ("Mean", "2")}


@pytest.mark.parametrize("value", ["0", "-3", "2.5", "NaN", "Infinity", "true", "1e300", "1" + "0" * 400])
def test_a_number_of_images_that_cannot_be_is_damage(value: str, tmp_path: Path, write_run: WriteRun) -> None:
    require_left_out("train_images", value, tmp_path, write_run)


@pytest.mark.parametrize("metric", FEWSHOT_METRICS)
@pytest.mark.parametrize("value", ["-0.1", "1.01", "NaN", "-Infinity", "true", "1" + "0" * 400])
def test_a_metric_that_cannot_be_is_damage(metric: str, value: str, tmp_path: Path, write_run: WriteRun) -> None:
    require_left_out(metric, value, tmp_path, write_run)


def require_left_out(column: str, value: str, tmp_path: Path, write_run: WriteRun) -> None:
    """Spoil one value of one of two classes: that class is named and left out, the other one stays."""
    run = write_run("run", 2, 0, classes={"plate": (2, 0.6, 0.5), "rod": (2, 0.8, 0.5)})
    path = run / "class_results" / "mpdd_rod.json"
    content = json.loads(path.read_text())
    next(part for part in (content["metrics"], content["timings"]) if column in part)[column] = "spoiled"
    path.write_text(json.dumps(content).replace('"spoiled"', value))
    finished = compare(tmp_path, run)
    assert finished.code == 1 and len(finished.error_lines) == 1
    assert finished.err.startswith(f"warning: mpdd_rod of {run} is left out: {path}: damaged ({column} is ")
    assert [r["class"] for r in read_rows(tmp_path / "out" / "fewshot.csv")] == ["mpdd_plate"]


def test_a_metric_at_the_end_of_its_range_is_kept(tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run("run", 2, 0, classes={"plate": (2, 1 + 1e-15, 0), "rod": (2, 0.0, 1)})
    finished = compare(tmp_path, run)
    assert (finished.code, finished.err) == (0, "")


def test_a_picture_that_fails_leaves_no_file(
    tmp_path: Path, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no font")

    monkeypatch.setattr(fewshot, "fewshot_picture", fail)
    assert compare(tmp_path, write_run("run", 2, 0, classes={"plate": (2, 0.6, 0.5)})).code == 1
    assert not (tmp_path / "out").exists()


def test_runs_that_cannot_be_compared(tmp_path: Path, write_run: WriteRun) -> None:
    classes = {"plate": (2, 0.6, 0.5)}
    first = write_run("first", 2, 0, classes=classes)
    cases = [
        ([write_run("k3", 4, 0, classes=classes, method_config={"num_nn": 3})], "method_config.num_nn is 1 .* 3 here"),
        ([write_run("rod", 4, 0, classes={"rod": (4, 0.6, 0.5)})], r"dataset\.categories"),
        ([write_run("same", 2, 0, classes=classes)], r"first' and '.*same' are both of --limit_train 2 and --seed 0"),
        ([first], "both of --limit_train 2"),
        ([write_run("text", "4", 0, classes=classes)], "limit_train '4', expected integers"),
        ([write_run("yes", True, 0, classes=classes)], "limit_train True, expected integers"),
        ([write_run("none", 0, 0, classes=classes)], "limit_train 0, expected integers, limit_train >= 1"),
        ([write_run("sown", 4, True, classes=classes)], "seed True and"),
        ([write_run("twice", 4, 0, classes=classes, categories=["plate", "plate"])], "expected a list of names, each"),
        ([write_run("word", 4, 0, classes=classes, categories="plate")], "categories 'plate', expected a list"),
        ([write_run("digits", 4, 0, classes=classes, categories=[1])], r"categories \[1\], expected a list"),
        ([tmp_path / "nowhere"], r"nowhere' is no run folder \(there is no such folder\): name"),
        ([tmp_path], r"is no run folder \(it has no config\.json\): name"),
        ([first / "config.json"], r"config\.json' is no run folder \(it is a file\): name"),
        ([write_run("stored", 4, 0, classes=classes, dataset={"name": "mpdd"})], "stored' is .* has no 'categories'"),
        ([write_run("odd", 4, 0, classes=classes, dataset=[])], "odd' is .* config.json is damaged"),
    ]
    for others, message in cases:
        finished = compare(tmp_path, first, *others)
        assert finished.code == 2 and len(finished.error_lines) == 1, message
        assert finished.out == ""
        assert re.search(message, finished.err), finished.err
        assert "Errno" not in finished.err
    unfinished = compare(tmp_path, write_run("empty", 2, 0, classes={}, categories=["plate"]))
    assert unfinished.code == 2 and "no class is finished" in unfinished.error_lines[-1]
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        finished = invoke(fewshot_curve, first, "--out", out)
        assert (finished.code, finished.out, len(finished.error_lines)) == (2, "", 1)
        assert finished.err.startswith(f"error: --out '{out}': '{tmp_path / 'file'}' is no folder, expected ")
    assert invoke(fewshot_curve, "--out", tmp_path / "out").code == 2


def test_no_folder_and_stored_models_are_no_training_runs(tmp_path: Path, write_run: WriteRun) -> None:
    with pytest.raises(ConfigurationError, match="no run folder is named, expected at least one"):
        fewshot.fewshot_curve([], tmp_path / "out", print)
    evaluated = write_run("evaluated", None, 0, classes={"plate": (2, 0.6, 0.5)}, models={"plate": "/models/plate"})
    finished = compare(tmp_path, evaluated)
    assert finished.code == 2 and "it holds evaluations of stored models" in finished.err


def test_folders_of_real_runs(small_dataset: Path, tmp_path: Path) -> None:
    for limit in (1, 50):  # there are 6 training images
        reading = ("--limit_train", str(limit))
        run = [
            "--device",
            "cpu",
            "--threads",
            1,
            "--calibration",
            "none",
            "--seed",
            0,
            "--seed",
            1,
            "--log_group",
            f"k{limit}",
        ]
        assert invoke(run_patchcore, *run, tmp_path, *small_run(small_dataset, "plate", reading=reading)).code == 0
    folders = [tmp_path / "project" / f"k{limit}_S{seed}" for limit in (1, 50) for seed in (0, 1)]
    assert compare(tmp_path, *folders).code == 0
    rows = read_rows(tmp_path / "out" / "fewshot.csv")
    assert [(r["class"], r["num_images"]) for r in rows] == [("mpdd_plate", "1"), ("mpdd_plate", "6")]
    for limit, number in ((1, "1"), (50, "6")):  # the table of seeds is an independent way to the same numbers
        seeds = {r["Row Names"]: r for r in read_rows(tmp_path / "project" / f"k{limit}_seeds.csv")}
        for row in [r for r in rows if r["num_images"] == number]:
            for name in (n for n in row if n.endswith(("_mean", "_std"))):
                assert row[name] == seeds[row["class"]][name], (row["class"], name)

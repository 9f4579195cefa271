"""Whole runs on small images: what they write, what changes them, and what goes wrong at work."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, small_run, write_category, write_mask, write_texture
from in_process import Finished, invoke, read_rows
from PIL import Image

from patchcore.cli import load_and_evaluate_patchcore, run_patchcore
from patchcore.evaluation.metrics import pixel_metrics
from patchcore.features.backbones import load_backbone
from patchcore.memory import faiss_search
from patchcore.runtime import available_cpus

HEADER = (
    "Row Names,instance_auroc,full_pixel_auroc,full_pro,anomaly_pixel_auroc,anomaly_pro,"
    "image_ap,image_f1_max,pixel_ap,pixel_f1_max,precision,recall,f1"
)
COMMON = ("--device", "cpu", "--threads", "1")
PIXEL_COLUMNS = ("full_pixel_auroc", "full_pro", "anomaly_pixel_auroc", "anomaly_pro", "pixel_ap", "pixel_f1_max")


def run(out: Path, *args: object) -> Finished:
    """Run on the CPU, which gives no warning, in one thread: on a busy CPU, two wait for each other."""
    return invoke(run_patchcore, out, "--device", "cpu", "--threads", 1, *args)


def group(out: Path, name: str = "group") -> Path:
    return out / "project" / name


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes; of `plate`, the images are twice as wide as high."""
    root = tmp_path_factory.mktemp("pipeline") / "data set"
    write_category(root, "rod")
    for path in sorted(write_category(root, "plate").rglob("*.png")):
        with Image.open(path) as image:
            square = image.copy()
        wide = Image.new(square.mode, (128, 64))
        wide.paste(square, (0, 0))
        wide.paste(square if square.mode == "RGB" else Image.new("L", (64, 64)), (64, 0))
        wide.save(path)
    return root


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """A run of both classes with everything switched on, and its terminal output."""
    out = tmp_path_factory.mktemp("finished") / "out"
    switches = ("--save_segmentation_images", "--save_patchcore_model", "--save_anomaly_scores")
    return group(out), run(out, *switches, *small_run(data))


# ---------------------------------------------------------------- what a run leaves


def test_a_run_ends_well_and_names_its_folder_first_and_last(finished: tuple[Path, Finished]) -> None:
    folder, terminal = finished
    lines = terminal.out.splitlines()
    assert terminal.code == 0
    assert lines[0] == lines[-1] == f"results: {folder}"
    assert f"pictures: {folder / 'segmentation_images'}" in lines
    assert any(line.startswith("Mean") for line in lines)


def test_results_table(finished: tuple[Path, Finished]) -> None:
    text = (finished[0] / "results.csv").read_text(encoding="utf-8")
    assert text.splitlines()[0] == HEADER
    rows = read_rows(finished[0] / "results.csv")
    assert [r["Row Names"] for r in rows] == ["mpdd_plate", "mpdd_rod", "Mean"]
    for column in HEADER.split(",")[1:]:
        plate, rod, mean = (float(r[column]) for r in rows)
        assert 0 <= plate <= 1 and mean == pytest.approx((plate + rod) / 2, abs=1.1e-6)
    assert float(rows[1]["instance_auroc"]) == 1  # a bright square among stripes: anything less is a defect
    assert not (finished[0] / "failures.csv").exists()


def test_defect_table(finished: tuple[Path, Finished]) -> None:
    rows = read_rows(finished[0] / "results_by_defect.csv")
    assert [(r["Row Names"], r["defect_type"], r["num_images"]) for r in rows] == [
        ("mpdd_plate", "spot", "3"),
        ("mpdd_rod", "spot", "3"),
    ]
    # One defect type: it and the good images are all test images, so the class's own numbers come back.
    for row, whole in zip(rows, read_rows(finished[0] / "results.csv"), strict=False):
        assert row["instance_auroc"] == whole["instance_auroc"] and row["full_pro"] == whole["full_pro"]
    assert (rows[1]["num_regions"], rows[1]["num_regions_lost"]) == ("3", "0")


def test_timings_are_complete_and_positive(finished: tuple[Path, Finished]) -> None:
    rows = read_rows(finished[0] / "timings.csv")
    assert [r["Row Names"] for r in rows] == ["mpdd_plate", "mpdd_rod"]
    for row in rows:
        numbers = {name: float(cell) for name, cell in row.items() if name != "Row Names"}
        assert all(value > 0 for value in numbers.values()), numbers
        assert numbers["train_images"] == numbers["test_images"] == 6
        assert numbers["latency_p50_ms"] <= numbers["latency_p95_ms"]
        assert numbers["model_mb"] == pytest.approx(768 * 1024 * 4 / 1e6)  # half of 6 * 16 * 16 patches


def test_image_scores(finished: tuple[Path, Finished], data: Path) -> None:
    for category in ("plate", "rod"):
        rows = read_rows(finished[0] / "anomaly_scores" / f"mpdd_{category}.csv")
        columns = ["path", "defect_type", "label", "score", "normalized_score", "decision", "defect_px"]
        assert list(rows[0]) == columns
        assert all((int(r["defect_px"]) > 0) == (r["label"] == "1") for r in rows)
        assert [r["path"] for r in rows] == [
            p.relative_to(data).as_posix() for p in sorted((data / category / "test").rglob("*.png"))
        ]
        assert [r["label"] for r in rows] == ["0", "0", "0", "1", "1", "1"]
        model = json.loads((finished[0] / "models" / f"mpdd_{category}" / "model.json").read_text(encoding="utf-8"))
        threshold = model["calibration"]["image"]["threshold"]
        scored = sorted((float(r["score"]), float(r["normalized_score"]), int(r["decision"])) for r in rows)
        for score, normalized, decision in scored:
            assert decision == (score > threshold) == (normalized > 0.5)
            assert 0 < normalized < 1
        assert all(a[1] < b[1] for a, b in itertools.pairwise(scored) if a[0] < b[0])


def test_precision_recall_and_f1_count_the_decisions(finished: tuple[Path, Finished]) -> None:
    for category, row in zip(("plate", "rod"), read_rows(finished[0] / "results.csv"), strict=False):
        images = read_rows(finished[0] / "anomaly_scores" / f"mpdd_{category}.csv")
        flagged = sum(r["decision"] == "1" for r in images)
        hits = sum(r["decision"] == r["label"] == "1" for r in images)
        assert float(row["precision"]) == pytest.approx(hits / flagged, abs=1e-6)
        assert float(row["recall"]) == pytest.approx(hits / 3, abs=1e-6)
        assert float(row["f1"]) == pytest.approx(2 * hits / (flagged + 3), abs=1e-6)


def test_raw_maps_give_the_pixel_metrics_again(finished: tuple[Path, Finished]) -> None:
    row = read_rows(finished[0] / "results.csv")[1]
    with np.load(finished[0] / "anomaly_scores" / "mpdd_rod.npz", allow_pickle=False) as stored:
        maps, masks, paths = stored["maps"], stored["masks"], stored["paths"]
    assert maps.shape == masks.shape == (6, 64, 64) and maps.dtype == np.float32
    assert [p.decode() for p in paths] == [
        r["path"] for r in read_rows(finished[0] / "anomaly_scores" / "mpdd_rod.csv")
    ]
    metrics = pixel_metrics(maps, masks)
    assert f"{metrics.auroc:.6f}" == row["full_pixel_auroc"]
    assert f"{metrics.pro:.6f}" == row["full_pro"]


def test_one_picture_per_test_image(finished: tuple[Path, Finished]) -> None:
    names = sorted(p.name for p in (finished[0] / "segmentation_images" / "mpdd_rod").iterdir())
    assert names == [f"{kind}_00{i}.png" for kind in ("good", "spot") for i in range(3)]


def test_no_temporary_file_is_left(finished: tuple[Path, Finished]) -> None:
    assert not [p for p in finished[0].rglob("*") if p.name.startswith(".") or p.name.endswith(".part")]


def test_optional_files_are_left_out_unless_asked_for(data: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "--log_project", "p", "--log_group", "g", *small_run(data, "rod")).code == 0
    left = sorted(p.relative_to(tmp_path / "p" / "g").as_posix() for p in (tmp_path / "p" / "g").rglob("*.*"))
    assert left == [
        "anomaly_scores/mpdd_rod.csv",
        "class_results/mpdd_rod.json",
        "config.json",
        "false_alarms.csv",
        "results.csv",
        "results_by_defect.csv",
        "run.log",
        "timings.csv",
    ]


# ---------------------------------------------------------------- what changes the numbers, and what does not


def test_equal_runs_give_equal_bytes_in_another_folder(
    finished: tuple[Path, Finished], data: Path, tmp_path: Path
) -> None:
    # The classes the other way round, and alone: neither order nor company changes the numbers of a class.
    assert run(tmp_path, *small_run(data, "rod", "plate")).code == 0
    assert run(tmp_path, *small_run(data, "plate")).code == 0
    assert run(tmp_path, *small_run(data, "rod", "plate")).code == 0
    both, alone, again = (group(tmp_path, name) for name in ("group", "group_0", "group_1"))
    assert (both / "results.csv").read_bytes() == (again / "results.csv").read_bytes()
    expected = {r["Row Names"]: r for r in read_rows(finished[0] / "results.csv")}
    swapped = {r["Row Names"]: r for r in read_rows(both / "results.csv")}
    assert list(swapped) == ["mpdd_rod", "mpdd_plate", "Mean"] and swapped == expected
    assert read_rows(alone / "results.csv")[0] == expected["mpdd_plate"]
    for folder, category in ((both, "plate"), (both, "rod"), (alone, "plate")):
        scores = Path("anomaly_scores") / f"mpdd_{category}.csv"
        assert (folder / scores).read_bytes() == (finished[0] / scores).read_bytes()


Scores = Callable[..., dict[str, float]]


@pytest.fixture(scope="module")
def scores_of(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Scores:
    """Runs class `plate` with other options and returns {image: score}."""
    out = tmp_path_factory.mktemp("effects")

    def score(*changes: str) -> dict[str, float]:
        steps = small_run(data, "plate")
        run_options = ["--calibration", "none", "--log_group", "_".join(changes).replace("/", ".") or "none"]
        for option, value in zip(changes[::2], changes[1::2], strict=True):
            if option in ("--seed", "--threads"):
                run_options += [option, value]
            elif option in steps:
                steps[steps.index(option) + 1] = value
            else:
                home = "dataset" if option in DATASET_OPTIONS else "patch_core"
                steps[steps.index(home) + 1 : steps.index(home) + 1] = [option, value]
        done = run(out, *run_options, *steps)
        assert done.code == 0, done.err
        folder = Path(done.out.splitlines()[0].removeprefix("results: "))
        return {r["path"]: float(r["score"]) for r in read_rows(folder / "anomaly_scores" / "mpdd_plate.csv")}

    return score


DATASET_OPTIONS = ("--resize_mode", "--limit_train", "--limit_test", "--train_val_split", "--batch_size")
CHANGES = [
    ("-b", "efficientnet_lite1"),
    ("-le", "blocks.0"),
    ("--anomaly_scorer_num_nn", "3"),
    ("--patchsize", "5"),
    ("--pretrain_embed_dimension", "50"),
    ("--target_embed_dimension", "60"),
    ("--patchsize_aggregate", "5"),
    ("--patchscore", "mean"),
    ("--patchscore", "topk"),
    ("--score_reweighting", "3"),
    ("--embedding", "concat"),
    ("--normalization", "backbone"),
    ("-p", "0.2"),
    ("--resize", "80"),
    ("--imagesize", "32"),
    ("--resize_mode", "square"),
    ("--resize_mode", "letterbox"),
    ("--limit_train", "3"),
    ("--train_val_split", "0.5"),
    ("--seed", "1"),
]


@pytest.mark.parametrize("change", CHANGES, ids="=".join)
def test_options_that_change_the_scores(change: tuple[str, str], scores_of: Scores, baseline: dict[str, float]) -> None:
    scores = scores_of(*change)
    assert scores.keys() == baseline.keys()
    assert not np.allclose(list(scores.values()), list(baseline.values()), rtol=1e-3)


@pytest.fixture(scope="module")
def baseline(scores_of: Scores) -> dict[str, float]:
    return scores_of()


def test_samplers_differ(data: Path, tmp_path: Path, baseline: dict[str, float]) -> None:
    found = [list(baseline.values())]
    for name in ("random", "greedy_coreset", "identity"):
        steps = [name if part == "approx_greedy_coreset" else part for part in small_run(data, "plate")]
        if name == "identity":
            steps[steps.index("-p") + 1] = "1"
        assert run(tmp_path, "--calibration", "none", "--log_group", name, *steps).code == 0
        rows = read_rows(group(tmp_path, name) / "anomaly_scores" / "mpdd_plate.csv")
        found.append([float(r["score"]) for r in rows])
    assert np.all(np.array(found[3]) <= np.array(found[:3]) + 1e-4)  # all patches: no neighbour can be nearer
    for i, first in enumerate(found):
        for second in found[i + 1 :]:
            assert not np.allclose(first, second, rtol=1e-3)


def test_other_weights_give_other_scores(tmp_path: Path, scores_of: Scores, baseline: dict[str, float]) -> None:
    other = load_backbone("efficientnet_lite0", "random", seed=9).module.state_dict()
    torch.save(other, tmp_path / "other.pth")
    assert not np.allclose(list(scores_of("--weights", str(tmp_path / "other.pth")).values()), list(baseline.values()))
    torch.save(load_backbone("efficientnet_lite0", "random", seed=0).module.state_dict(), tmp_path / "same.pth")
    assert scores_of("--weights", str(tmp_path / "same.pth")) == baseline


@pytest.mark.parametrize("change", [("--batch_size", "5"), ("--num_workers", "2"), ("--faiss_num_workers", "1")])
def test_options_that_change_no_score(change: tuple[str, str], scores_of: Scores, baseline: dict[str, float]) -> None:
    np.testing.assert_allclose(list(scores_of(*change).values()), list(baseline.values()), rtol=1e-5)


def test_threads_are_set_for_torch_and_faiss_alike(
    scores_of: Scores, baseline: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr("patchcore.class_run.peak_memory_megabytes", lambda: seen.append(torch.get_num_threads()) or 1)
    for threads in (1, 2):  # 1 must hold to the end of the run, although faiss sets a number that torch shares
        scores = scores_of("--threads", str(threads), "--faiss_num_workers", "8")
        np.testing.assert_allclose(list(scores.values()), list(baseline.values()), rtol=1e-5)
    assert seen == [1, min(2, available_cpus())]


def test_faiss_on_gpu_falls_back_with_one_warning(data: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which faiss may well search")
    faiss_search.warn_once.cache_clear()
    done = run(tmp_path, *small_run(data, "rod", method=("--faiss_on_gpu",)))
    assert done.code == 0
    assert len(done.error_lines) == 1 and done.err.startswith("warning: ") and "faiss" in done.err


def test_limit_test_draws_per_defect_type_and_the_same_images_for_every_seed(
    scores_of: Scores, baseline: dict[str, float]
) -> None:
    few, other_seed = scores_of("--limit_test", "1"), scores_of("--limit_test", "1", "--seed", "5")
    assert [path.split("/")[2] for path in few] == ["good", "spot"]
    assert few.keys() == other_seed.keys()
    assert all(score == pytest.approx(baseline[path], rel=1e-5) for path, score in few.items())


def test_calibration_choices(data: Path, tmp_path: Path) -> None:
    levels: dict[str, list[str]] = {}
    for choice in ("kfold", "split", "none"):
        reading = ("--train_val_split", "0.5")
        assert (
            run(tmp_path, "--calibration", choice, "--log_group", choice, *small_run(data, "rod", reading=reading)).code
            == 0
        )
        rows = read_rows(group(tmp_path, choice) / "anomaly_scores" / "mpdd_rod.csv")
        levels[choice] = [r["normalized_score"] for r in rows]
        levels[f"{choice} decision"] = [r["decision"] for r in rows]
    assert levels["kfold"] != levels["split"]
    assert set(levels["none"]) == set(levels["none decision"]) == {""}
    row = read_rows(group(tmp_path, "none") / "results.csv")[0]
    assert (row["precision"], row["recall"], row["f1"]) == ("", "", "") and row["instance_auroc"] != ""


# ---------------------------------------------------------------- several seeds


def test_several_seeds(data: Path, tmp_path: Path) -> None:
    seeds = [part for seed in (0, 1, 2) for part in ("--seed", seed)]
    done = run(tmp_path, *seeds, "--log_group", "try_S7", *small_run(data, "rod"))
    assert done.code == 0
    folders = [group(tmp_path, f"try_S{seed}") for seed in (0, 1, 2)]
    assert sorted(p.name for p in group(tmp_path, "").iterdir()) == ["try_S0", "try_S1", "try_S2", "try_seeds.csv"]
    assert str(group(tmp_path, "try_seeds.csv")) in done.out and "1.0000 ± 0.0000" in done.out
    assert "seed 1 (2 of 3)" in done.err
    tables = [read_rows(folder / "results.csv") for folder in folders]
    for i, row in enumerate(read_rows(group(tmp_path, "try_seeds.csv"))):
        assert (row["Row Names"], row["num_seeds"]) == (("mpdd_rod", "3"), ("Mean", "3"))[i]
        for column in HEADER.split(",")[1:]:
            values = [float(table[i][column]) for table in tables]
            assert float(row[f"{column}_mean"]) == pytest.approx(statistics.mean(values), abs=2e-6)
            assert float(row[f"{column}_std"]) == pytest.approx(statistics.stdev(values), abs=2e-6)
    assert len({table[0]["pixel_ap"] for table in tables}) == 3
    assert run(tmp_path, "--seed", 1, "--log_group", "alone", *small_run(data, "rod")).code == 0
    assert (group(tmp_path, "alone") / "results.csv").read_bytes() == (folders[1] / "results.csv").read_bytes()


# ---------------------------------------------------------------- what goes wrong at work


def test_a_class_with_damaged_files_fails_by_name_and_the_others_finish(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for category in ("corrupt", "zero", "unmasked", "mismatch", "whole"):
        write_category(root, category, num_train=3, num_test=2)
    (root / "corrupt" / "train" / "good" / "001.png").write_bytes(b"\x89PNG no more")
    (root / "zero" / "test" / "spot" / "001.png").write_bytes(b"")
    (root / "unmasked" / "ground_truth" / "spot" / "000_mask.png").unlink()
    Image.new("L", (60, 64)).save(root / "mismatch" / "ground_truth" / "spot" / "001_mask.png")
    done = run(tmp_path / "out", "--save_patchcore_model", *small_run(root))
    assert done.code == 1
    files = {
        "corrupt": "train/good/001.png",
        "zero": "test/spot/001.png",
        "unmasked": "test/spot/000.png",
        "mismatch": "ground_truth/spot/001_mask.png",
    }
    folder = group(tmp_path / "out")
    failures = {r["Row Names"]: r["reason"] for r in read_rows(folder / "failures.csv")}
    assert failures.keys() == {f"mpdd_{category}" for category in files}
    for category, file in files.items():
        assert f"{category}/{file}" in failures[f"mpdd_{category}"]
        assert len([line for line in done.error_lines if line.startswith(f"error: {category} failed: ")]) == 1
        assert f"failed: mpdd_{category}: " in done.out
    rows = {r.pop("Row Names"): r for r in read_rows(folder / "results.csv")}
    assert list(rows)[-1] == "Mean" and rows["Mean"] == rows["mpdd_whole"] and rows["Mean"]["instance_auroc"] != ""
    assert all(set(rows[name].values()) == {""} for name in failures)
    assert [p.name for p in (folder / "models").iterdir()] == ["mpdd_whole"]
    assert len(done.error_lines) == 4

    # The files mended, the same command with --skip_existing does what is missing and clears the list of failures.
    for category in files:
        write_category(root, category, num_train=3, num_test=2)
    assert run(tmp_path / "out", "--save_patchcore_model", "--skip_existing", *small_run(root)).code == 0
    assert not (folder / "failures.csv").exists()
    assert all(row["instance_auroc"] for row in read_rows(folder / "results.csv"))


def test_unusual_classes(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for category in ("all_bad", "all_good", "no_truth", "one_image"):
        write_category(root, category, num_train=1 if category == "one_image" else 3, num_test=2)
    for path in (root / "all_bad" / "test" / "good").iterdir():
        path.unlink()
    for path in (root / "all_good" / "test" / "spot").iterdir():
        path.unlink()
    for path in (root / "all_good" / "ground_truth" / "spot").iterdir():
        path.unlink()
    for path in (root / "no_truth" / "ground_truth" / "spot").iterdir():
        path.unlink()
    (root / "no_truth" / "ground_truth" / "spot").rmdir()
    (root / "no_truth" / "ground_truth").rmdir()
    done = run(tmp_path / "out", "--save_segmentation_images", *small_run(root))
    assert done.code == 0, done.err
    assert done.error_lines == ["warning: one_image: one training image gives no threshold: calibration left out"]
    folder = group(tmp_path / "out")
    rows = {r["Row Names"].removeprefix("mpdd_"): r for r in read_rows(folder / "results.csv")}
    for category in ("all_bad", "all_good"):
        assert rows[category]["instance_auroc"] == rows[category]["image_ap"] == rows[category]["image_f1_max"] == ""
    assert rows["all_bad"]["recall"] != "" and rows["all_bad"]["full_pixel_auroc"] != ""
    assert all(rows["all_good"][column] == "" for column in PIXEL_COLUMNS)
    assert rows["no_truth"]["instance_auroc"] != "" and all(rows["no_truth"][c] == "" for c in PIXEL_COLUMNS)
    assert rows["one_image"]["f1"] == "" and rows["one_image"]["full_pro"] != ""
    values = [float(r["full_pro"]) for name, r in rows.items() if name != "Mean" and r["full_pro"]]
    assert float(rows["Mean"]["full_pro"]) == pytest.approx(statistics.mean(values), abs=1.1e-6)
    pictures = folder / "segmentation_images"
    with (
        Image.open(pictures / "mpdd_no_truth" / "spot_000.png") as without,
        Image.open(pictures / "mpdd_all_bad" / "spot_000.png") as with_truth,
    ):
        assert without.width < with_truth.width


def test_more_neighbours_than_patches_fails_the_class_by_name(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_category(root, "many", num_train=6, num_test=1)
    write_category(root, "few", num_train=1, num_test=1)
    done = run(tmp_path / "out", *small_run(root, method=("--anomaly_scorer_num_nn", "200")))
    assert done.code == 1
    (failure,) = read_rows(group(tmp_path / "out") / "failures.csv")
    assert failure["Row Names"] == "mpdd_few"
    assert "128 patch(es)" in failure["reason"] and "200" in failure["reason"]  # half of 16 * 16 patches


def test_a_defect_of_the_program_keeps_its_traceback_in_the_log(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError("for the test")

    monkeypatch.setattr("patchcore.class_run.class_metrics", fail)
    done = run(tmp_path, *small_run(data, "rod"))
    assert done.code == 1
    assert "rod failed: ZeroDivisionError: for the test" in done.err and "Traceback" not in done.err
    log = (group(tmp_path) / "run.log").read_text(encoding="utf-8")
    assert "Traceback" in log and "ZeroDivisionError: for the test" in log


@pytest.mark.skipif(sys.platform != "linux", reason="file names that are no UTF-8 exist on Linux alone")
def test_file_names_of_any_kind(tmp_path: Path) -> None:
    """Bytes that are no UTF-8, other scripts, names of the greatest length, names that would collide."""
    odd = os.fsdecode(b"r\xf6d")
    root = tmp_path / os.fsdecode(b"d\xe4ta")
    folder = write_category(root, odd, num_train=2, num_test=1)
    long, japanese = "x" * 200, "\u90e8\u54c1" * 30
    for defect_type, stem in ((long, long), (japanese, odd), ("a", "b_c"), ("a_b", "c")):
        write_texture(folder / "test" / defect_type / f"{stem}.png", 7, defect=True)
        write_mask(folder / "ground_truth" / defect_type / f"{stem}_mask.png")
    args = [str(tmp_path / os.fsdecode(b"\xfcut")), "--device", "cpu", "--threads", "1", "--save_segmentation_images"]
    args += ["--save_anomaly_scores", "--save_patchcore_model", *small_run(root)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "bin" / "run_patchcore.py"), *args],
        capture_output=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    results = Path(os.fsdecode(done.stdout.splitlines()[0].removeprefix(b"results: ")))
    assert results == tmp_path / os.fsdecode(b"\xfcut") / "project" / "group" and results.is_dir()
    assert len(list((results / "segmentation_images" / f"mpdd_{odd}").iterdir())) == 6
    rows = read_rows(results / "anomaly_scores" / f"mpdd_{odd}.csv")
    assert all((root / r["path"]).is_file() for r in rows) and len(rows) == 6
    with np.load(results / "anomaly_scores" / f"mpdd_{odd}.npz", allow_pickle=False) as stored:
        assert [os.fsdecode(p) for p in stored["paths"]] == [r["path"] for r in rows]


# ---------------------------------------------------------------- evaluation of stored models


def evaluate(out: Path, models: list[Path], data: Path, *categories: str, options: tuple[object, ...] = ()) -> Finished:
    chosen = [part for category in categories for part in ("-d", category)]
    paths = [part for model in models for part in ("-p", model)]
    return invoke(
        load_and_evaluate_patchcore, out, "--device", "cpu", "--threads", 1, "patch_core_loader", *paths,
        "dataset", *chosen, "--num_workers", 0, *options, "mpdd", data,
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(finished: tuple[Path, Finished]) -> tuple[Path, Path]:
    return finished[0] / "models" / "mpdd_plate", finished[0] / "models" / "mpdd_rod"


def test_stored_models_give_the_numbers_of_their_run(
    finished: tuple[Path, Finished], models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    expected = (finished[0] / "results.csv").read_bytes()
    done = evaluate(tmp_path / "save", [models[1], models[0]], data, "plate", "rod")
    assert done.code == 0
    assert done.out.splitlines()[0] == done.out.splitlines()[-1] == f"results: {tmp_path / 'save'}"
    assert (tmp_path / "save" / "results.csv").read_bytes() == expected
    for category in ("plate", "rod"):
        scores = Path("anomaly_scores") / f"mpdd_{category}.csv"
        assert (tmp_path / "save" / scores).read_bytes() == (finished[0] / scores).read_bytes()
    # Again: nothing is overwritten; agreeing sizes are accepted; pictures and maps come on request.
    agreeing = ("--resize", 64, "--imagesize", 64, "--resize_mode", "shorter", "--train_val_split", 1)
    done = invoke(
        load_and_evaluate_patchcore, "--save_segmentation_images", "--seed", 3, tmp_path / "save",
        "--save_anomaly_scores", "--device", "cpu", "--threads", 1,
        "patch_core_loader", "-p", models[0], "-p", models[1],
        "dataset", *agreeing, "mpdd", data, "--num_workers", 0,
    )  # fmt: skip
    assert done.code == 0, done.err
    again = tmp_path / "save_0"
    assert f"results: {again}" in done.out and (again / "results.csv").read_bytes() == expected
    assert len(list((again / "segmentation_images").rglob("*.png"))) == 12
    assert (again / "anomaly_scores" / "mpdd_rod.npz").exists()


def test_a_moved_model_works_and_needs_no_training_data(
    finished: tuple[Path, Finished], models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "any name"
    shutil.copytree(models[1], moved)
    assert evaluate(tmp_path / "save", [moved], data).code == 0
    assert read_rows(tmp_path / "save" / "results.csv")[0] == read_rows(finished[0] / "results.csv")[1]


def test_limit_test_of_stored_models(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    assert evaluate(tmp_path / "save", [models[1]], data, options=("--limit_test", 1)).code == 0
    assert len(read_rows(tmp_path / "save" / "anomaly_scores" / "mpdd_rod.csv")) == 2


def test_a_model_that_no_class_names_is_left_out_with_a_word(
    models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    done = evaluate(tmp_path / "save", list(models), data, "rod")
    assert done.code == 0
    assert len(done.error_lines) == 1 and "plate, which no -d names" in done.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--imagesize", 48), ("--imagesize 48", "64")),
        (("--resize", 72), ("--resize 72", "64")),
        (("--resize_mode", "square"), ("--resize_mode square", "shorter")),
        (("-d", "plate"), ("no model of class 'plate'", "rod")),
        (("-d", "bolt"), ("no model of class 'bolt'", "rod")),
    ],
)
def test_what_contradicts_a_model_is_refused_before_any_work(
    options: tuple[object, ...], words: tuple[str, str], models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    done = evaluate(tmp_path / "save", [models[1]], data, options=options)
    assert done.code == 2 and len(done.error_lines) == 1
    assert all(word in done.err for word in words)
    assert not (tmp_path / "save").exists()


@pytest.mark.parametrize("save_folder", [".", "/", "a/..", ""])
def test_a_save_folder_needs_a_name(save_folder: str, models: tuple[Path, Path], data: Path) -> None:
    done = invoke(
        load_and_evaluate_patchcore, save_folder, "patch_core_loader", "-p", models[1], "dataset", "mpdd", data
    )
    assert done.code == 2 and "SAVE_FOLDER" in done.err


def test_nan_is_nowhere(finished: tuple[Path, Finished]) -> None:
    for path in finished[0].rglob("*.csv"):
        for row in read_rows(path):
            for cell in row.values():
                assert cell not in ("nan", "inf", "None")
                if cell and cell.replace(".", "").isdigit():
                    assert math.isfinite(float(cell))


# ---------------------------------------------------------------- what a hostile user found


def test_a_reader_that_has_gone_does_not_stop_the_work(small_dataset: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "bin" / "run_patchcore.py"), "--device", "cpu", "--threads", "1"]
    steps = small_run(small_dataset, "plate")
    process = subprocess.Popen(
        [*command, str(tmp_path / "out"), *steps],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert (tmp_path / "out" / "project" / "group" / "class_results" / "mpdd_plate.json").exists()


def test_a_pipe_with_an_image_suffix_is_passed_over(small_dataset: Path, tmp_path: Path) -> None:
    os.mkfifo(small_dataset / "plate" / "train" / "good" / "pipe.png")
    assert invoke(run_patchcore, *COMMON, tmp_path / "out", *small_run(small_dataset, "plate")).code == 0


def test_skip_existing_makes_files_that_are_gone_anew(small_dataset: Path, tmp_path: Path) -> None:
    outputs = ("--save_patchcore_model", "--save_segmentation_images", "--save_anomaly_scores")
    command = [*COMMON, "--skip_existing", *outputs, tmp_path / "out"]
    steps = small_run(small_dataset, "plate")
    folder = tmp_path / "out" / "project" / "group"
    for gone in ("models", "segmentation_images", "anomaly_scores"):
        assert invoke(run_patchcore, *command, *steps).code == 0
        shutil.rmtree(folder / gone)
    done = invoke(run_patchcore, *command, *steps)
    assert done.code == 0 and "files of it are gone" in done.err
    assert (folder / "anomaly_scores" / "mpdd_plate.csv").exists()
    (folder / "anomaly_scores" / "mpdd_plate.npz").unlink()
    assert "files of it are gone" in invoke(run_patchcore, *command, *steps).err
    assert invoke(run_patchcore, *command, *steps).err.count("skipped") == 1


def test_good_images_alone_leave_every_decision_cell_blank(small_dataset: Path, tmp_path: Path) -> None:
    shutil.rmtree(small_dataset / "plate" / "test" / "spot")
    shutil.rmtree(small_dataset / "plate" / "ground_truth")
    assert invoke(run_patchcore, *COMMON, tmp_path / "out", *small_run(small_dataset, "plate")).code == 0
    (row, _) = read_rows(tmp_path / "out" / "project" / "group" / "results.csv")
    assert set(row.values()) == {"mpdd_plate", ""}


def test_split_of_too_few_images_names_another_calibration(tmp_path: Path) -> None:
    write_category(tmp_path / "data", "pair", num_train=2)
    done = run(tmp_path / "out", "--calibration", "split", *small_run(tmp_path / "data", "pair"))
    assert done.code == 2 and len(done.error_lines) == 1
    assert "'pair' has 2 for training: use --calibration kfold or none" in done.err
    assert not (tmp_path / "out").exists()


def test_a_class_at_fault_does_not_stop_the_check_of_held_out_images(small_dataset: Path, tmp_path: Path) -> None:
    good = small_dataset / "plate" / "train" / "good"
    shutil.copy(good / "000.png", good / "000.bmp")
    options = ("--calibration", "split", tmp_path / "out")
    steps = small_run(small_dataset, "plate", "rod", reading=("--train_val_split", "0.5"))
    done = invoke(run_patchcore, *COMMON, *options, *steps)
    assert done.code == 1 and "plate failed" in done.err and "Traceback" not in done.err
    assert (tmp_path / "out" / "project" / "group" / "class_results" / "mpdd_rod.json").exists()


def test_empty_masks_are_told(small_dataset: Path, tmp_path: Path) -> None:
    black = Image.new("L", (64, 64))
    black.save(small_dataset / "plate" / "ground_truth" / "spot" / "001_mask.png")
    done = invoke(run_patchcore, *COMMON, tmp_path / "out", *small_run(small_dataset, "plate"))
    assert done.code == 0 and "1 mask(s) of anomalous images are empty" in done.err


def test_a_line_of_pixels_is_refused_before_it_fills_the_memory(small_dataset: Path, tmp_path: Path) -> None:
    Image.new("RGB", (60_000, 1)).save(small_dataset / "plate" / "train" / "good" / "line.png")
    done = invoke(run_patchcore, *COMMON, tmp_path / "out", *small_run(small_dataset, "plate"))
    assert done.code == 1 and "line.png" in done.err and "--resize_mode" in done.err


def test_another_format_behind_an_image_suffix_is_refused(small_dataset: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(small_dataset / "plate" / "train" / "good" / "a.png", format="GIF")
    done = invoke(run_patchcore, *COMMON, tmp_path / "out", *small_run(small_dataset, "plate"))
    assert done.code == 1 and "a.png" in done.err


@pytest.mark.parametrize(
    ("options", "method", "reading", "words"),
    [
        (["--log_group", "x" * 250], [], [], "longer than 200 bytes"),
        (["--gpu", "-1"], [], [], "--gpu is -1"),
        ([], ["--patchsize", "51"], [], "grid of layer 'blocks.1'"),
        ([], ["--patchsize", "100001"], [], "99 or less"),
        ([], ["--target_embed_dimension", "10000000000"], [], "65536 or less"),
        ([], [], ["--batch_size", "99999999999999999999"], "65536 or less"),
        ([], [], ["--resize", "100000"], "16384 or less"),
    ],
)
def test_sizes_beyond_reason_are_refused(
    options: list[str], method: list[str], reading: list[str], words: str, small_dataset: Path, tmp_path: Path
) -> None:
    steps = small_run(small_dataset, "plate", method=tuple(method), reading=tuple(reading))
    done = invoke(run_patchcore, *COMMON, *options, tmp_path / "out", *steps)
    assert done.code == 2 and len(done.error_lines) == 1 and words in done.err
    assert not (tmp_path / "out").exists()

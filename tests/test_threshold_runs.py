"""Threshold rules as a user types them: what a run writes, what it reports, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RunCommand, small_run, write_category, write_mask, write_texture
from in_process import Finished, invoke, read_rows

from patchcore.cli import load_and_evaluate_patchcore, run_baselines, run_patchcore, update_model
from patchcore.comparison.methods import group_runs
from patchcore.comparison.runs import read_runs
from patchcore.evaluation.false_alarms import clopper_pearson
from patchcore.storage.manifest import MANIFEST

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = ("--device", "cpu", "--threads", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("thresholds") / "data"
    write_category(root, "rod")
    return root


def write_validation(root: Path, category: str = "rod") -> Path:
    """Write two good and two defective images that are in no other set; returns the class's folder."""
    folder = root / category
    for i in range(2):
        write_texture(folder / "test" / "good" / f"{i}.png", 7000 + i)
        write_texture(folder / "test" / "spot" / f"{i}.png", 7100 + i, defect=True)
        write_mask(folder / "ground_truth" / "spot" / f"{i}_mask.png")
    return folder


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("validation") / "labelled images"
    write_validation(root)
    return root


def run(out: Path, data: Path, *options: object) -> Finished:
    return invoke(run_patchcore, out, *COMMON, "--save_patchcore_model", *options, *small_run(data, "rod"))


def calibration_of(out: Path, group: str = "group") -> dict[str, Any]:
    model = out / "project" / group / "models" / "mpdd_rod" / "model.json"
    return dict(json.loads(model.read_text(encoding="utf-8"))["calibration"])


def evaluate(out: Path, model: Path, data: Path) -> Finished:
    return invoke(
        load_and_evaluate_patchcore, out, *COMMON, "patch_core_loader", "-p", model,
        "dataset", "--num_workers", 0, "mpdd", data,
    )  # fmt: skip


# ---------------------------------------------------------------- quantiles


@pytest.fixture(scope="module")
def by_quantile(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """A run whose threshold is the third of the six normal scores: it raises false alarms."""
    out = tmp_path_factory.mktemp("quantile")
    done = run(out, data, "--threshold_rule", "quantile:0.4", "--save_anomaly_scores")
    assert done.code == 0, done.err
    return out, done


def test_thresholds_are_order_statistics_of_the_normal_scores(by_quantile: tuple[Path, Finished]) -> None:
    found = calibration_of(by_quantile[0])
    assert found["rule"] == {"name": "quantile", "quantile": 0.4}
    assert len(found["image_scores"]) == 6
    assert found["image"]["threshold"] == sorted(found["image_scores"])[2]  # ceil(7 * 0.4) = 3
    assert found["pixel"]["threshold"] == sorted(found["map_maxima"])[2]


def test_false_alarms_are_those_of_scores_and_maps(by_quantile: tuple[Path, Finished]) -> None:
    folder = by_quantile[0] / "project" / "group"
    found = calibration_of(by_quantile[0])
    good = [r for r in read_rows(folder / "anomaly_scores" / "mpdd_rod.csv") if r["label"] == "0"]
    with np.load(folder / "anomaly_scores" / "mpdd_rod.npz") as stored:
        above = stored["maps"][[b"/good/" in p for p in stored["paths"]]] > found["pixel"]["threshold"]
    flagged = sum(float(r["score"]) > found["image"]["threshold"] for r in good)
    assert flagged == sum(r["decision"] == "1" for r in good)
    expected = {
        "image": (flagged, 3),
        "any_pixel": (int(above.any(axis=(1, 2)).sum()), 3),
        "pixel": (int(above.sum()), above.size),
    }
    rows = read_rows(folder / "false_alarms.csv")
    assert [r["level"] for r in rows] == list(expected)
    for row in rows:
        count, total = expected[row["level"]]
        assert (row["Row Names"], row["rule"]) == ("mpdd_rod", "quantile:0.4")
        assert (row["num_flagged"], row["num_good"]) == (str(count), str(total))
        assert row["rate"] == f"{count / total:.6f}"
        if row["level"] == "pixel":
            assert row["aimed_rate"] == row["interval_low"] == row["interval_high"] == ""
        else:
            low, high = clopper_pearson(count, total)
            assert (row["interval_low"], row["interval_high"]) == (f"{low:.6f}", f"{high:.6f}")
            assert row["aimed_rate"] == "0.600000"
    assert expected["pixel"][0] > 0, "a run without a false alarm would show less"


def test_the_report_names_rate_interval_and_aim(by_quantile: tuple[Path, Finished]) -> None:
    out, done = by_quantile
    image = read_rows(out / "project" / "group" / "false_alarms.csv")[0]
    (line,) = [line for line in done.out.splitlines() if line.startswith("mpdd_rod") and "quantile:0.4" in line]
    assert f"{image['num_flagged']}/3 = " in line and "60 %" in line
    assert "95 % Clopper-Pearson" in done.out and "Gaussian" not in done.out


def test_a_stored_model_keeps_its_rule(by_quantile: tuple[Path, Finished], data: Path, tmp_path: Path) -> None:
    folder = by_quantile[0] / "project" / "group"
    done = evaluate(tmp_path / "again", folder / "models" / "mpdd_rod", data)
    assert done.code == 0, done.err
    for table in ("results.csv", "false_alarms.csv", "anomaly_scores/mpdd_rod.csv"):
        assert (tmp_path / "again" / table).read_bytes() == (folder / table).read_bytes()
    assert "quantile:0.4" in done.out


def test_more_images_move_the_threshold_by_the_rule_of_the_model(
    by_quantile: tuple[Path, Finished], tmp_path: Path
) -> None:
    for i in range(2):
        write_texture(tmp_path / "new" / f"{i}.png", 8000 + i)
    model = by_quantile[0] / "project" / "group" / "models" / "mpdd_rod"
    done = invoke(update_model, model, tmp_path / "new", "--out", tmp_path / "updated", *COMMON)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "updated" / "model.json").read_text(encoding="utf-8"))["calibration"]
    assert found["rule"] == {"name": "quantile", "quantile": 0.4} and len(found["image_scores"]) == 8
    assert found["image"]["threshold"] == sorted(found["image_scores"])[3]  # ceil(9 * 0.4) = 4


def test_a_run_with_another_rule_is_another_run(by_quantile: tuple[Path, Finished], data: Path, tmp_path: Path) -> None:
    out, _ = by_quantile
    other = run(out, data, "--threshold_rule", "quantile:0.5", "--skip_existing", "--save_anomaly_scores")
    assert other.code == 2 and "threshold_rule: 'quantile:0.4' there, 'quantile:0.5' now" in other.err
    again = evaluate(tmp_path / "again", out / "project" / "group" / "models" / "mpdd_rod", data)
    assert run(tmp_path, data, "--save_anomaly_scores").code == 0 == again.code
    runs = read_runs([out / "project" / "group", tmp_path / "again", tmp_path / "project" / "group"])
    settings = [run.settings["mpdd_rod"].calibration for run in runs]
    assert settings == ["kfold quantile:0.4", "kfold quantile:0.4", "kfold"]
    assert len(group_runs(runs)) == 2  # their decisions are no seeds of one another


def test_a_model_from_before_the_rules_reads_as_mean3std(data: Path, tmp_path: Path) -> None:
    assert run(tmp_path, data).code == 0
    folder = tmp_path / "project" / "group"
    model = folder / "models" / "mpdd_rod"
    header = json.loads((model / "model.json").read_text(encoding="utf-8"))
    assert header["calibration"].pop("rule") == {"name": "mean3std", "quantile": None}
    header["format_version"] = 1
    del header[MANIFEST]
    older = tmp_path / "older"
    shutil.copytree(model, older)
    (older / "model.json").write_text(json.dumps(header), encoding="utf-8")
    done = evaluate(tmp_path / "again", older, data)
    assert done.code == 0, done.err
    assert (tmp_path / "again" / "false_alarms.csv").read_bytes() == (folder / "false_alarms.csv").read_bytes()
    assert "mean3std aims at 0.13 % if scores of good images are Gaussian" in done.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--threshold_rule", "quantile:0.9"), "needs the scores of 9 good images, 'rod' has 6 to train on"),
        (("--threshold_rule", "quantile:0.9"), "use quantile:0.8571 or lower, or give more images"),
        (("--threshold_rule", "quantile:0.8", "--limit_train", "3"), "'rod' has 3 to train on: use quantile:0.75"),
        (("--threshold_rule", "quantile:0.5", "--limit_train", "1"), "'rod' has 1 to train on: give more images"),
        (
            ("--threshold_rule", "quantile:0.8", "--calibration", "split", "--train_val_split", "0.5"),
            "needs the scores of 4 good images, 'rod' has 3 held out",
        ),
        (("--threshold_rule", "quantile:0.5", "--calibration", "none"), "--calibration none leaves them out"),
        (("--threshold_rule", "median"), "'median' is unknown, expected mean3std, quantile:Q or f1"),
        (("--threshold_rule", "f1"), "give --validation_data PATH"),
        (("--validation_data", "somewhere"), "type f1 or leave --validation_data out"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    options: tuple[str, ...], words: str, data: Path, tmp_path: Path
) -> None:
    done = invoke(run_patchcore, tmp_path / "out", *COMMON, *small_run(data, "rod"), *options)
    assert done.code == 2 and words in done.err and len(done.error_lines) == 1, done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("steps", ["resnet_knn -b efficientnet_lite0 --weights random -k 2", "autoencoder --epochs 1"])
def test_other_methods_follow_the_rule(steps: str, data: Path, tmp_path: Path) -> None:
    done = invoke(
        run_baselines, tmp_path, *COMMON, "--save_model", "--threshold_rule", "quantile:0.8", *steps.split(),
        "dataset", "--imagesize", 64, "--num_workers", 0, "-d", "rod", "mpdd", data,
    )  # fmt: skip
    assert done.code == 0, done.err
    found = calibration_of(tmp_path)
    assert found["image"]["threshold"] == sorted(found["image_scores"])[5]
    levels = [r["level"] for r in read_rows(tmp_path / "project" / "group" / "false_alarms.csv")]
    if steps.startswith("autoencoder"):
        assert found["pixel"]["threshold"] == sorted(found["map_maxima"])[5]
        assert levels == ["image", "any_pixel", "pixel"]
    else:
        assert found["pixel"] is None and levels == ["image"]


ENSEMBLE = (
    *("patch_core", "-b", "efficientnet_lite0.seed-1", "-b", "efficientnet_lite0.seed-2", "--weights", "random"),
    *("-le", "0.blocks.1", "-le", "1.blocks.1", "--anomaly_scorer_num_nn", "1", "sampler", "-p", "0.2", "random"),
    *("dataset", "--resize", "64", "--imagesize", "64", "--num_workers", "0", "-d", "rod", "mpdd"),
)


def test_ensembles_follow_the_rule(data: Path, tmp_path: Path) -> None:
    options = (*COMMON, "--save_patchcore_model", "--threshold_rule", "quantile:0.8", "--calibration", "kfold")
    done = invoke(run_patchcore, tmp_path, *options, *ENSEMBLE, data)
    assert done.code == 0, done.err
    found = calibration_of(tmp_path)
    assert found["image"]["threshold"] == sorted(found["image_scores"])[5]
    assert found["pixel"]["threshold"] == sorted(found["map_maxima"])[5]


def test_scores_that_depend_on_the_test_images_have_no_threshold_by_any_rule(data: Path, tmp_path: Path) -> None:
    minmax = ("--score_normalization", "minmax", "--threshold_rule", "quantile:0.8")
    done = invoke(run_patchcore, tmp_path / "out", *COMMON, *ENSEMBLE, data, *minmax)
    assert done.code == 2 and "leaves no threshold" in done.err and len(done.error_lines) == 1
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- f1


def test_f1_separates_the_validation_images(data: Path, validation: Path, tmp_path: Path) -> None:
    done = run(tmp_path, data, "--threshold_rule", "f1", "--validation_data", validation)
    assert done.code == 0, done.err
    found = calibration_of(tmp_path)
    assert found["rule"] == {"name": "f1", "quantile": None}
    # The same model on the validation images as if they were test images: both thresholds must be the best cuts.
    model = tmp_path / "project" / "group" / "models" / "mpdd_rod"
    (validation / "rod" / "train").mkdir(exist_ok=True)
    options = (*COMMON, "--save_anomaly_scores", "patch_core_loader", "-p", model)
    again = invoke(load_and_evaluate_patchcore, tmp_path / "again", *options, "dataset", "mpdd", validation)
    assert again.code == 0, again.err
    (row, _) = read_rows(tmp_path / "again" / "results.csv")
    assert row["f1"] == row["image_f1_max"] == "1.000000"
    with np.load(tmp_path / "again" / "anomaly_scores" / "mpdd_rod.npz") as stored:
        flagged, defect = stored["maps"] > np.float64(found["pixel"]["threshold"]), stored["masks"] == 1
    f1 = 2 * (flagged & defect).sum() / (flagged.sum() + defect.sum())
    assert f"{f1:.6f}" == row["pixel_f1_max"]
    rows = read_rows(tmp_path / "project" / "group" / "false_alarms.csv")
    assert {r["aimed_rate"] for r in rows} == {""} and {r["rule"] for r in rows} == {"f1"}
    # The labelled images are not stored with it, so that with a larger bank no threshold could be learned anew.
    refused = invoke(update_model, model, data / "rod" / "test" / "good", "--out", tmp_path / "updated", *COMMON)
    assert refused.code == 2 and "needs labelled validation images" in refused.err and len(refused.error_lines) == 1
    assert not (tmp_path / "updated").exists()


def spoil(validation: Path, data: Path, case: str) -> Path:
    """Return validation data with a fault."""
    folder = validation / "rod"
    if case == "missing":
        return validation / "nowhere"
    if case == "is the data":
        return data
    if case == "no class":
        folder.rename(validation / "plate")
    if case in ("copy of a test image", "copy of a training image"):
        split = "test" if "test" in case else "train"
        shutil.copy(data / "rod" / split / "good" / "002.png", folder / "test" / "good" / "new name.png")
    if case == "no defects":
        shutil.rmtree(folder / "test" / "spot")
        shutil.rmtree(folder / "ground_truth" / "spot")
    if case == "no good images":
        shutil.rmtree(folder / "test" / "good")
    if case == "no masks":
        shutil.rmtree(folder / "ground_truth")
    return validation


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("missing", "nowhere' does not exist"),
        ("is the data", "000.png' is also trained or tested on: a threshold is chosen on images that are neither"),
        ("no class", "--validation_data: no test images in"),
        ("copy of a test image", "new name.png' is also trained or tested on as "),
        ("copy of a training image", "train/good/002.png'"),
        ("no defects", "has 2 good and 0 defective images"),
        ("no good images", "has 0 good and 2 defective images"),
        ("no masks", "has no ground_truth"),
    ],
)
def test_validation_images_that_choose_nothing_are_refused(case: str, words: str, data: Path, tmp_path: Path) -> None:
    write_validation(tmp_path / "labelled")
    path = spoil(tmp_path / "labelled", data, case)
    done = run(tmp_path / "out", data, "--threshold_rule", "f1", "--validation_data", path)
    assert done.code == 2 and words in done.err and len(done.error_lines) == 1, done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_masks_are_needed_for_maps_alone(data: Path, tmp_path: Path) -> None:
    shutil.rmtree(write_validation(tmp_path / "labelled") / "ground_truth")
    done = invoke(
        run_baselines, tmp_path, *COMMON, "--save_model", "--threshold_rule", "f1",
        "--validation_data", tmp_path / "labelled", "resnet_knn", "-b", "efficientnet_lite0", "--weights", "random",
        "-k", 2, "dataset", "--imagesize", 64, "--num_workers", 0, "-d", "rod", "mpdd", data,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert calibration_of(tmp_path)["rule"]["name"] == "f1"


@pytest.mark.slow
def test_a_damaged_validation_image_fails_its_class_by_name(data: Path, tmp_path: Path) -> None:
    folder = write_validation(tmp_path / "labelled")
    (folder / "test" / "good" / "0.png").write_bytes(b"\x89PNG no more")
    done = run(tmp_path, data, "--threshold_rule", "f1", "--validation_data", tmp_path / "labelled")
    assert done.code == 1 and "rod failed" in done.err and "good/0.png" in done.err and "Traceback" not in done.err


# ---------------------------------------------------------------- through the shell


@pytest.mark.slow
def test_rules_through_the_shell(data: Path, validation: Path, tmp_path: Path, run_command: RunCommand) -> None:
    options = (*COMMON, "--save_patchcore_model", *small_run(data, "rod"))
    done = run_command("run_patchcore.py", tmp_path, *options, "--threshold_rule", "quantile:0.8")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "quantile:0.8" in line]
    assert "20 %" in line
    # A relative path, as typed; options behind the last step.
    done = run_command(
        "run_patchcore.py", tmp_path, *options, "--threshold_rule=f1", "--validation_data", validation.name,
        cwd=validation.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert calibration_of(tmp_path, "group_0")["rule"]["name"] == "f1"
    done = run_command("run_patchcore.py", tmp_path / "none", *options, "--threshold_rule", "quantile:0.99")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "99 good images" in done.stderr

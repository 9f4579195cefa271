"""Ensembles as a user types them: train, look at the tables, evaluate the stored models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import write_category
from in_process import Finished, invoke, read_rows

from patchcore.cli import load_and_evaluate_patchcore, run_patchcore

pytestmark = pytest.mark.usefixtures("one_thread")

DECISION_COLUMNS = ("precision", "recall", "f1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ensembles")
    write_category(root, "plate")
    write_category(root, "rod", num_train=1)
    return root


def run(out: Path, data: Path, *options: str, run_options: tuple[str, ...] = (), category: str = "plate") -> Finished:
    return invoke(
        run_patchcore, out, "--device", "cpu", "--threads", 1, "--save_patchcore_model", *run_options,
        "patch_core", "-b", "efficientnet_lite0", "-b", "resnet18", "--weights", "random", "-le", "0.blocks.1",
        "-le", "0.blocks.2", "-le", "1.layer2", "--anomaly_scorer_num_nn", 1, "--target_embed_dimension", 64, *options,
        "sampler", "-p", "0.5", "approx_greedy_coreset",
        "dataset", "--resize", 64, "--imagesize", 64, "--num_workers", 0, "-d", category, "mpdd", data,
    )  # fmt: skip


def evaluate(out: Path, model: Path, data: Path) -> Finished:
    return invoke(
        load_and_evaluate_patchcore, out, "--device", "cpu", "--threads", 1, "patch_core_loader", "-p", model,
        "dataset", "--num_workers", 0, "-d", "plate", "mpdd", data,
    )  # fmt: skip


@pytest.mark.parametrize("normalization", ["calibrated", "minmax"])
def test_a_stored_ensemble_gives_the_tables_of_its_run(normalization: str, data: Path, tmp_path: Path) -> None:
    done = run(tmp_path, data, "--score_normalization", normalization, run_options=("--save_segmentation_images",))
    assert done.code == 0, done.err
    folder = tmp_path / "project" / "group"
    (row, _) = read_rows(folder / "results.csv")
    assert float(row["instance_auroc"]) == 1.0
    scores = read_rows(folder / "anomaly_scores" / "mpdd_plate.csv")
    if normalization == "minmax":
        assert "no threshold" in done.err
        assert {row[c] for c in DECISION_COLUMNS} == {""} == {s["decision"] for s in scores}
        values = [float(s["score"]) for s in scores]
        assert min(values) >= 0 and max(values) <= 1
    else:
        assert all(row[c] for c in DECISION_COLUMNS)
    evaluated = evaluate(tmp_path / "again", folder / "models" / "mpdd_plate", data)
    assert evaluated.code == 0, evaluated.err
    assert (tmp_path / "again" / "results.csv").read_bytes() == (folder / "results.csv").read_bytes()
    config = json.loads((tmp_path / "again" / "config.json").read_text())["config"]
    assert config["methods"] == {"plate": "ensemble"}


def test_the_choice_of_the_scale_changes_scores_and_the_default_is_normal_images(data: Path, tmp_path: Path) -> None:
    scores = {}
    for name, options in {"default": (), "calibrated": ("calibrated",), "minmax": ("minmax",)}.items():
        typed = [part for option in options for part in ("--score_normalization", option)]
        assert run(tmp_path, data, *typed, run_options=("--log_group", name)).code == 0
        rows = read_rows(tmp_path / "project" / name / "anomaly_scores" / "mpdd_plate.csv")
        scores[name] = [float(row["score"]) for row in rows]
    assert scores["default"] == scores["calibrated"]
    assert not np.allclose(scores["default"], scores["minmax"])


@pytest.mark.parametrize("calibration", ["none", "split"])
def test_other_calibrations(calibration: str, data: Path, tmp_path: Path) -> None:
    """The scale of the members is part of the model; without thresholds it is there all the same."""
    options = ("--calibration", calibration)
    done = invoke(
        run_patchcore, tmp_path, "--device", "cpu", "--threads", 1, *options,
        "patch_core", "-b", "efficientnet_lite0", "-b", "efficientnet_lite0.seed-5", "--weights", "random",
        "-le", "0.blocks.2", "-le", "1.blocks.2", "--anomaly_scorer_num_nn", 1, "sampler", "-p", "0.5", "random",
        "dataset", "--resize", 64, "--imagesize", 64, "--num_workers", 0, "-d", "plate", "--train_val_split", "0.6",
        "mpdd", data,
    )  # fmt: skip
    assert done.code == 0, done.err
    (row, _) = read_rows(tmp_path / "project" / "group" / "results.csv")
    assert {bool(row[c]) for c in DECISION_COLUMNS} == {calibration == "split"}


def test_one_training_image_ends_the_class_with_the_remedy(data: Path, tmp_path: Path) -> None:
    done = run(tmp_path, data, category="rod")
    assert done.code == 1
    assert "one training image" in done.err and "--score_normalization minmax" in done.err
    assert run(tmp_path, data, "--score_normalization", "minmax", category="rod").code == 0


def test_score_normalization_of_a_single_backbone_is_refused(data: Path, tmp_path: Path) -> None:
    done = invoke(
        run_patchcore, tmp_path / "out", "patch_core", "-b", "resnet18", "-le", "layer2", "--score_normalization",
        "minmax", "sampler", "identity", "dataset", "mpdd", data,
    )  # fmt: skip
    assert done.code == 2 and "found one backbone" in done.err
    assert len(done.error_lines) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--limit_train", "1"), "--limit_train 1 does not tell the scale"),
        (("--seed", "0", "--seed", "1"), "every -b has a .seed-N"),
        (("--sampler_is_identity",), "would be the same model"),
        (("--weights", ""), "--weights is empty"),
    ],
)
def test_what_can_be_known_is_refused_before_any_work(
    options: tuple[str, ...], words: str, data: Path, tmp_path: Path
) -> None:
    identity = options == ("--sampler_is_identity",)
    done = invoke(
        run_patchcore, tmp_path / "out", "patch_core", "-b", "resnet18.seed-1", "-b", "resnet18.seed-2",
        "-le", "0.layer2", "-le", "1.layer2", "sampler", "identity" if identity else "random",
        "dataset", "mpdd", data, *(() if identity else options),
    )  # fmt: skip
    assert done.code == 2 and words in done.err and len(done.error_lines) == 1
    assert not (tmp_path / "out").exists()

"""The methods on real images, through the command line."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RunCommand

pytestmark = pytest.mark.slow

BACKBONE = ("-b", "efficientnet_lite0", "-le", "blocks.2", "-le", "blocks.4", "--anomaly_scorer_num_nn", "1")
SAMPLER = ("sampler", "-p", "0.1", "approx_greedy_coreset")


def read_results(path: Path) -> dict[str, dict[str, float]]:
    """Return {row name: {column: value}} of a table, without blank cells."""
    with path.open(newline="", encoding="utf-8") as file:
        return {
            row["Row Names"]: {k: float(v) for k, v in row.items() if k != "Row Names" and v}
            for row in csv.DictReader(file)
        }


@pytest.mark.parametrize(("embedding", "image", "pixel"), [("pooled", 0.985, 0.977), ("concat", 0.995, 0.983)])
def test_metal_plate_over_three_seeds(
    embedding: str, image: float, pixel: float, real_data: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    seeds = ("--seed", "0", "--seed", "1", "--seed", "2")
    finished = run_command(
        "run_patchcore.py", "--device", "cpu", *seeds, "--calibration", "none", "--log_group", "plate", tmp_path,
        "patch_core", *BACKBONE, "--embedding", embedding, *SAMPLER,
        "dataset", "--batch_size", 8, "-d", "metal_plate", "mpdd", real_data / "mpdd",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    means = read_results(tmp_path / "project" / "plate_seeds.csv")["mpdd_metal_plate"]
    assert means["num_seeds"] == 3
    assert means["instance_auroc_mean"] >= image
    assert means["full_pixel_auroc_mean"] >= pixel


@pytest.mark.parametrize("embedding", ["pooled", "concat"])
def test_bottle(embedding: str, real_data: Path, tmp_path: Path, run_command: RunCommand) -> None:
    finished = run_command(
        "run_patchcore.py", "--device", "cpu", "--calibration", "none", tmp_path,
        "patch_core", *BACKBONE, "--embedding", embedding, *SAMPLER,
        "dataset", "--batch_size", 8, "-d", "bottle", "mvtec", real_data / "mvtec",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    metrics = read_results(tmp_path / "project" / "group" / "results.csv")["mvtec_bottle"]
    assert metrics["instance_auroc"] >= 0.995
    assert metrics["full_pixel_auroc"] >= 0.982


def test_train_then_evaluate_from_the_saved_model(real_data: Path, tmp_path: Path, run_command: RunCommand) -> None:
    trained = run_command(
        "run_patchcore.py", "--gpu", 0, "--seed", 0, "--save_patchcore_model", "--save_segmentation_images",
        "--save_anomaly_scores", "--log_group", "plate", tmp_path,
        "patch_core", *BACKBONE, *SAMPLER, "dataset", "-d", "metal_plate", "mpdd", real_data / "mpdd",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "project" / "plate"
    evaluated = run_command(
        "load_and_evaluate_patchcore.py", "--gpu", 0, "--seed", 0, "--save_segmentation_images", tmp_path / "again",
        "patch_core_loader", "-p", run / "models" / "mpdd_metal_plate", "--faiss_on_gpu",
        "dataset", "--resize", 256, "--imagesize", 224, "-d", "metal_plate", "mpdd", real_data / "mpdd",
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    assert (tmp_path / "again" / "results.csv").read_bytes() == (run / "results.csv").read_bytes()

    assert len(list((run / "segmentation_images" / "mpdd_metal_plate").glob("*.png"))) == 97
    with (run / "anomaly_scores" / "mpdd_metal_plate.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    false_alarms = [row for row in rows if row["label"] == "0" and row["decision"] == "1"]
    assert len(false_alarms) <= 3, "mean + 3 std of out-of-fold scores flags good images seldom"
    timings = read_results(run / "timings.csv")["mpdd_metal_plate"]
    assert np.isfinite(list(timings.values())).all() and min(timings.values()) > 0


def test_fastflow_and_the_three_forms_of_its_model(real_data: Path, tmp_path: Path, run_command: RunCommand) -> None:
    """The preset of the offline backbone; folder, export and bare state dict give the same numbers."""
    model = ("--backbone", "efficientnet_lite0", "--use_class_specific")
    data = ("-d", "metal_plate", "mpdd", real_data / "mpdd")
    trained = run_command(
        "run_fastflow.py", "--device", "cpu", "--save_model", "--calibration", "none", "--log_group", "plate", tmp_path,
        "dataset", *data, "fastflow", *model,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "project" / "plate"
    metrics = read_results(run / "results.csv")["mpdd_metal_plate"]
    assert metrics["instance_auroc"] >= 0.97
    assert metrics["full_pixel_auroc"] >= 0.97

    folder = run / "models" / "mpdd_metal_plate"
    export = folder / "fastflow_plate_final.pth"
    torch.save(torch.load(export, weights_only=True)["state_dict"], tmp_path / "bare.pth")
    for number, (path, described) in enumerate([(folder, ()), (export, ()), (tmp_path / "bare.pth", model)]):
        evaluated = run_command(
            "load_and_evaluate_fastflow.py", "--device", "cpu", tmp_path / f"again{number}",
            "fastflow_loader", "-p", path, *described, "dataset", *data,
        )  # fmt: skip
        assert evaluated.returncode == 0, evaluated.stderr
        assert (tmp_path / f"again{number}" / "results.csv").read_bytes() == (run / "results.csv").read_bytes()

"""FastFlow runs on small images that take a second, and what they leave."""

from __future__ import annotations

from pathlib import Path

import torch
from in_process import Finished, invoke

from patchcore.cli import load_and_evaluate_fastflow, run_fastflow
from patchcore.storage.torch_export import read_torch_file

COMMON = ("--device", "cpu", "--threads", "1")
LAYERS = ("--layers", "blocks.1", "--layers", "blocks.2")
MODEL = ("--backbone", "efficientnet_lite0", "--weights", "random", *LAYERS, "--flow_steps", "2")
SIZES = ("--resize", "64", "--imagesize", "64")


def train(out: Path, data: Path, *flags: object, of_dataset: tuple[str, ...] = ("--category", "plate")) -> Finished:
    """Train for 4 epochs; what `flags` say beats the rest."""
    name = () if "--category" in of_dataset else ("mpdd",)
    dataset = ("dataset", *SIZES, "--num_workers", 0, *of_dataset, *name, data)
    return invoke(run_fastflow, out, *COMMON, *dataset, "fastflow", *MODEL, "--epochs", 4, *flags)


def evaluate(out: Path, data: Path, model: Path | str, *flags: object, sizes: tuple[str, ...] = ()) -> Finished:
    """Evaluate a stored model of the class `plate`."""
    dataset = ("dataset", *sizes, "--num_workers", 0, "-d", "plate", "mpdd", data)
    return invoke(load_and_evaluate_fastflow, out, *COMMON, "fastflow_loader", "-p", model, *flags, *dataset)


def tensors_of(group: Path) -> dict[str, torch.Tensor]:
    """Read the exported weights of the class `plate` in a run folder."""
    (file,) = (group / "models" / "mpdd_plate").glob("fastflow_*_final.pth")
    return read_torch_file(file).tensors


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())

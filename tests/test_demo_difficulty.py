"""The rendered demo set is neither trivial nor hopeless for PatchCore, through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import RunCommand
from test_real_data import BACKBONE, SAMPLER, read_results

pytestmark = pytest.mark.slow


def test_patchcore_on_the_demo_set(tmp_path: Path, run_command: RunCommand) -> None:
    rendered = run_command("make_demo_dataset.py", tmp_path / "data")
    assert rendered.returncode == 0, rendered.stderr
    finished = run_command(
        "run_patchcore.py", "--device", "cpu", tmp_path / "results",
        "patch_core", *BACKBONE, *SAMPLER, "dataset", "--batch_size", 8, "mpdd", tmp_path / "data",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    mean = read_results(tmp_path / "results" / "project" / "group" / "results.csv")["Mean"]
    assert mean["instance_auroc"] >= 0.93
    assert mean["full_pixel_auroc"] >= 0.9

"""Run the sample shell scripts: with a stub that notes their commands, or whole on a small demo set."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from conftest import REPOSITORY

MPDD_TRAINING = "sample_training_mpdd.sh"
MPDD_EVALUATION = "sample_evaluation_mpdd.sh"
MVTEC_TRAINING = "bash/sample_training_mvtec.sh"
MVTEC_EVALUATION = "bash/sample_evaluation_mvtec.sh"
BASELINES = "bash/sample_training_baselines.sh"
FEWSHOT = "bash/sample_fewshot.sh"
FASTFLOW_IMPROVED = "sample_training_fastflow_improved.sh"
FASTFLOW_LOADER = "sample_evaluation_fastflow_loader.sh"
FASTFLOW_PLAIN = "bash/sample_training_fastflow.sh"
FASTFLOW_PATCH = "bash/sample_training_fastflow_patch.sh"
FASTFLOW_WIDE = "bash/sample_training_fastflow_wresnet50.sh"
FASTFLOW_EVALUATION = "bash/sample_evaluation_fastflow.sh"
# Each script with the variable that may hold its data path.
PATH_VARIABLES = {
    MPDD_TRAINING: "MPDD_PATH",
    MPDD_EVALUATION: "MPDD_PATH",
    MVTEC_TRAINING: "MVTEC_PATH",
    MVTEC_EVALUATION: "MVTEC_PATH",
    BASELINES: "MPDD_PATH",
    FEWSHOT: "MPDD_PATH",
    FASTFLOW_IMPROVED: "MPDD_PATH",
    FASTFLOW_LOADER: "MPDD_PATH",
    FASTFLOW_PLAIN: "MPDD_PATH",
    FASTFLOW_PATCH: "MPDD_PATH",
    FASTFLOW_WIDE: "MPDD_PATH",
    FASTFLOW_EVALUATION: "MPDD_PATH",
}
CHOICES = {"VARIANTS", "METHODS", "CLASSES", "SHOTS", "SEEDS", "RESULTS", "EVALUATED", "LOG_PROJECT", "PYTHON"}
OWN_VARIABLES = CHOICES | set(PATH_VARIABLES.values())

# Stands for the interpreter: notes what it was called with, and fails where the test says so. Whether there is a
# package to run is no command of the script.
STUB = """#!/bin/sh
if [ "$1 $2" = "-c import patchcore" ]; then
    echo "noise of the probe" >&2
    exit "${PROBE_CODE:-0}"
fi
{ printf '%s\\0' "$@"; echo; } >> "$RECORD"
case "$*" in *"${FAIL_WITH:-no such argument}"*) exit "$FAIL_CODE" ;; esac
"""

SMALL = shlex.split("--resize 64 --imagesize 64 --limit_test 2 --num_workers 0 --threads 1 --device cpu")

RunScript = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Ran:
    """What a script printed, and the commands that it ran: name in bin/, then the arguments."""

    code: int
    out: str
    err: str
    commands: list[list[str]] = field(default_factory=list)


@dataclass
class Desk:
    """A place to run scripts from, with a stub for Python and an empty data set whose path has a blank."""

    folder: Path

    def __post_init__(self) -> None:
        self.data.mkdir()
        self.stub.write_text(STUB)
        self.stub.chmod(0o755)

    @property
    def data(self) -> Path:
        return self.folder / "data set"

    @property
    def stub(self) -> Path:
        return self.folder / "python stub"

    def run(self, script: str, *args: object, **variables: object) -> Ran:
        record = self.folder / "record"
        record.unlink(missing_ok=True)
        typed = {"RECORD": record, "PYTHON": self.stub, **variables}
        command = [str(REPOSITORY / script), *map(str, args)]
        ran = subprocess.run(
            command, capture_output=True, text=True, cwd=self.folder, env=_environment(typed), check=False
        )
        lines = record.read_text().splitlines() if record.exists() else []
        commands = [line.split("\0")[:-1] for line in lines]
        assert all(Path(c[0]).parent == REPOSITORY / "bin" for c in commands)
        return Ran(ran.returncode, ran.stdout, ran.stderr, [[Path(c[0]).name, *c[1:]] for c in commands])

    def train(self, script: str, *args: object, **variables: object) -> list[list[str]]:
        """Run a script to its good end with the data path first; return the commands without what is run."""
        ran = self.run(script, self.data, *args, **variables)
        assert ran.code == 0, ran.err
        methods = ("fastflow", "baselines")
        method = next((name for name in methods if name in script), "patchcore")
        assert {c[0] for c in ran.commands} == {f"run_{method}.py"}
        return [c[1:] for c in ran.commands]

    def pretend_models(self, group: str, dataset: str, *classes: str, results: str = "results") -> Path:
        """Make the folders that a training leaves."""
        folder = self.folder / results / "project" / group
        for name in classes:
            (folder / "models" / f"{dataset}_{name}").mkdir(parents=True)
        return folder.relative_to(self.folder)


def _environment(variables: dict[str, object]) -> dict[str, str]:
    """Return the environment without what the scripts read from it, and with what the test gives."""
    kept = {name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}
    return kept | {name: str(value) for name, value in variables.items()}


def values(command: list[str], option: str) -> list[str]:
    """Return the values of an option in the order typed."""
    return [command[i + 1] for i, token in enumerate(command) if token == option]


def group(command: list[str]) -> str:
    return values(command, "--log_group")[0]


def without(command: list[str], *options: str) -> list[str]:
    """Return a command without some options and their values."""
    drop = {j for i, token in enumerate(command) if token in options for j in (i, i + 1)}
    return [token for i, token in enumerate(command) if i not in drop]


def render_demo_set(root: Path) -> Path:
    """Render the demo set with few and small images."""
    counts = ["--size", "128", "--num_train", "6", "--num_test_good", "2", "--num_test_defect", "1"]
    render = [sys.executable, str(REPOSITORY / "bin" / "make_demo_dataset.py"), str(root), *counts]
    subprocess.run(render, check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")})
    return root


def run_whole_script(folder: Path, script: str, *args: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the real interpreter from `folder`; returns the finished process."""
    environment = _environment({"PYTHON": sys.executable, "PYTHONPATH": REPOSITORY / "src", **variables})
    command = [str(REPOSITORY / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)

"""`torchrun bin/run_fastflow.py` as a user types it: the files of one process, interruptions, and an end for all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, write_category
from in_process import read_rows
from small_fastflow import MODEL, SIZES, train
from test_launching import is_alive, wait_for

GROUP = Path("project") / "group"
HISTORY = GROUP / "training" / "mpdd_plate" / "training_log.csv"
CHECKPOINT = GROUP / "checkpoints" / "mpdd_plate.pt"
TOLERANCE = 1e-4  # of the loss of an epoch, relative
FLAGS = ("--epochs", 3, "--feature_noise", 0.2, "--train_val_split", 0.8, "--checkpoint_every", 1, "--save_model")
# The first process dies when it is about to measure an epoch, as by kill -9: nothing is tidied up.
KILLED = """
import os, patchcore.class_run
from patchcore.cli import run_fastflow
patchcore.class_run._announce_epoch = lambda *_: os._exit(9)
run_fastflow()
"""
# The second process runs out of memory in the second epoch.
STARVED = """
import os
from patchcore.cli import run_fastflow
from patchcore.methods.training import Training
train_epoch = Training._train_epoch
def starve(self, epoch, *given):
    if epoch == 2 and os.environ["RANK"] == "1":
        raise RuntimeError("DefaultCPUAllocator: not enough memory")
    return train_epoch(self, epoch, *given)
Training._train_epoch = starve
run_fastflow()
"""
# Notes its number where the other lines of its command line are written.
NOTED = """
import os, signal, sys
from pathlib import Path
from patchcore.cli import run_fastflow
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job would ignore
Path(sys.argv[1]).parent.joinpath(os.environ["RANK"]).write_text(str(os.getpid()))
run_fastflow()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class of 13 images, 10 of which are trained on in batches of 8, and one whose last image is cut off."""
    root = tmp_path_factory.mktemp("torchrun") / "data set"
    write_category(root, "plate", num_train=13)
    last = write_category(root, "rod") / "train" / "good" / "005.png"
    last.write_bytes(last.read_bytes()[:2000])
    return root


def command(out: Path, data: Path, *flags: object, script: Path | None = None, processes: int = 2) -> list[str]:
    """Return the command line of several processes; what `flags` say beats the rest."""
    torchrun = Path(sys.executable).parent / "torchrun"
    common = (out, "--device", "cpu", "--threads", "1", "dataset", *SIZES, "--num_workers", 0)
    steps = ("-d", "plate", "mpdd", data, "fastflow", *MODEL, *FLAGS, *flags)
    start = (torchrun, "--standalone", "--nproc_per_node", processes, script or REPOSITORY / "bin" / "run_fastflow.py")
    return [str(token) for token in (*start, *common, *steps)]


def together(line: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300, check=False)


def alone(out: Path, data: Path, *flags: object) -> None:
    ended = train(out, data, *FLAGS, *flags, of_dataset=("-d", "plate"))
    assert ended.code == 0, ended.err


def losses(out: Path) -> list[tuple[float, float]]:
    return [(float(row["loss"]), float(row["held_out_loss"])) for row in read_rows(out / HISTORY)]


def errors(ended: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what the toolkit itself says."""
    return [line for line in ended.stderr.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def one(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one process."""
    out = tmp_path_factory.mktemp("one")
    alone(out, data)
    return out


def require_equal(out: Path, expected: Path) -> None:
    """Require the losses, scores, thresholds and files of another run."""
    assert losses(out) == [pytest.approx(pair, rel=TOLERANCE) for pair in losses(expected)]
    left, expected_files = ({str(p.relative_to(root)) for p in root.rglob("*")} for root in (out, expected))
    assert left - {str(GROUP / "failures.csv")} == expected_files
    tables = [read_rows(root / GROUP / "results.csv") for root in (out, expected)]
    row, same_row = (next(row for row in table if "mpdd_plate" in row.values()) for table in tables)
    assert row.keys() == same_row.keys()
    for column, value in row.items():
        assert value == same_row[column] or abs(float(value) - float(same_row[column])) < 0.01, column
    scores = [read_rows(root / GROUP / "anomaly_scores" / "mpdd_plate.csv") for root in (out, expected)]
    for image, same in zip(*scores, strict=True):
        assert float(image["score"]) == pytest.approx(float(same["score"]), rel=1e-3)
        assert float(image["normalized_score"]) == pytest.approx(float(same["normalized_score"]), rel=1e-2, abs=1e-2)


def script(folder: Path, content: str) -> Path:
    path = folder / "script.py"
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.slow
def test_two_processes_leave_the_files_and_losses_of_one(data: Path, one: Path, tmp_path: Path) -> None:
    """The last batch of an epoch has two images; a class whose files are bad fails alike, and alone."""
    ended = together(command(tmp_path / "out", data, "-d", "rod", "-d", "plate", "--eval_every", 2))
    assert ended.returncode == 1
    (line,) = errors(ended)
    assert line.startswith("error: rod failed: ") and "005.png" in line
    assert ended.stderr.count("on TEST images, which select nothing") == 1
    assert ended.stdout.count("results: ") == 2, "the run folder first and last, once"
    assert "Traceback" not in ended.stderr.partition("torch/distributed")[0]
    require_equal(tmp_path / "out", one)


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_killed(data: Path, one: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = together(command(out, data, "--eval_every", 2, script=script(tmp_path, KILLED)))
    assert ended.returncode == 1 and (out / CHECKPOINT).exists()
    assert not (out / HISTORY).exists()
    alone(out, data, "--resume")
    assert "plate: resumes from" in (out / GROUP / "run.log").read_text(encoding="utf-8")
    require_equal(out, one)


@pytest.mark.slow
def test_three_processes_go_on_where_one_was_interrupted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With batches of two images, of which one process has nothing at least."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    out, whole = tmp_path / "out", tmp_path / "whole"
    flags = ("--batch_size", 2)
    alone(whole, data, *flags)
    with monkeypatch.context() as patch:
        patch.setattr("patchcore.class_run._announce_epoch", interrupt)
        assert train(out, data, *FLAGS, *flags, "--eval_every", 1, of_dataset=("-d", "plate")).code == 130
    ended = together(command(out, data, *flags, "--resume", processes=3))
    assert ended.returncode == 0, ended.stderr
    require_equal(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_ends_in_all_processes(sent: signal.Signals, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(out, data, "--epochs", 100000, script=script(tmp_path, NOTED)),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
    )
    wait_for((out / CHECKPOINT).exists)
    workers = [int((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    if sent is signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal does
    else:
        process.send_signal(sent)
    message = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    wait_for(lambda: not any(map(is_alive, workers)))
    said = [line for line in message.splitlines() if line.startswith("error: ")]
    assert len(said) <= 1, said


@pytest.mark.slow
def test_what_one_process_lacks_ends_all_and_is_said_once(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = together(command(out, data, script=script(tmp_path, STARVED)))
    assert ended.returncode == 1
    said = [line for line in errors(ended) if "out of memory" in line]
    assert len(said) == 1 and said[0].startswith("error: process 1 of 2 failed: out of memory (RuntimeError: Default")
    assert len(read_rows(out / HISTORY)) == 1 and (out / CHECKPOINT).exists()


@pytest.mark.slow
def test_a_wrong_argument_is_one_line(data: Path, tmp_path: Path) -> None:
    ended = together(command(tmp_path / "out", data, "--clamp", -1))
    assert ended.returncode == 1
    (line,) = errors(ended)
    assert "--clamp is -1" in line and not (tmp_path / "out").exists()

"""Files are scored as they land: each once, across restarts, and not while they are written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from in_process import Finished, invoke, read_rows
from PIL import Image
from test_predict import example

from patchcore.cli import predict
from patchcore.configs import RuntimeConfig
from patchcore.errors import ConfigurationError
from patchcore.inference import watch
from patchcore.inference.inputs import InputFile
from patchcore.inference.outputs import failure_record
from patchcore.inference.run import PredictionJob
from patchcore.inference.watch import WatchState

pytestmark = pytest.mark.usefixtures("one_thread")

ENDLESS = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    example("autoencoder").save(folder)
    return folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SETTLED_SECONDS", 0.1)
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(watch, "RETRY_SECONDS", 0.05)


def land(path: Path, seed: int = 0) -> bytes:
    """Write an image under its name at once, and return its bytes."""
    pixels = np.random.default_rng(seed).integers(90, 160, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path.with_suffix(".part"), "PNG")
    os.replace(path.with_suffix(".part"), path)
    return path.read_bytes()


def names(out: Path) -> list[str]:
    table = out / "predictions.csv"
    return [Path(row["path"]).name for row in read_rows(table)] if table.exists() else []


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + ENDLESS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def watching(model: Path, inputs: Path, out: Path, meanwhile: Callable[[], None], *args: object) -> Finished:
    """Watch a folder until `meanwhile` is over, and press Ctrl-C."""
    failures: list[BaseException] = []

    def user() -> None:
        try:
            meanwhile()
        except BaseException as error:
            failures.append(error)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=user)
    thread.start()
    finished = invoke(predict, model, inputs, "--out", out, "--watch", "--device", "cpu", "--threads", 1, *args)
    thread.join()
    assert not failures, failures
    return finished


def test_each_file_once_and_across_restarts(model: Path, tmp_path: Path) -> None:
    inputs, out = tmp_path / "in", tmp_path / "in" / "out"
    inputs.mkdir()
    land(inputs / "a.png", 1)

    def first() -> None:
        wait_for(lambda: names(out) == ["a.png"])
        land(inputs / "b.png", 2)
        wait_for(lambda: names(out) == ["a.png", "b.png"])
        time.sleep(0.5)  # time enough to score them again, or to read an output

    finished = watching(model, inputs, out, first)
    assert finished.code == 0 and "ended: 2 images scored" in finished.out and "watching" in finished.out
    land(inputs / "c.png", 3)

    def second() -> None:
        wait_for(lambda: len(names(out)) == 3)
        land(inputs / "b.png", 4)  # another image under the same name
        wait_for(lambda: len(names(out)) == 4)

    finished = watching(model, inputs, out, second, "--json")
    assert "2 files were done before" in finished.err
    assert [Path(json.loads(line)["path"]).name for line in finished.out.splitlines()] == ["c.png", "b.png"]
    rows = read_rows(out / "predictions.csv")
    assert names(out) == ["a.png", "b.png", "c.png", "b.png"]
    assert len({row["overlay"] for row in rows}) == 4 and rows[1]["score"] != rows[3]["score"]
    assert all((out / row["overlay"]).exists() for row in rows)


def test_each_record_is_told_at_least_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, out = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    land(inputs / "a.png")

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WatchState, "add", killed)
        first = invoke(predict, model, inputs, "--out", out, "--watch", "--json", "--device", "cpu", "--threads", 1)
    second = watching(model, inputs, out, lambda: wait_for(lambda: names(out) == ["a.png"]), "--json")
    told = [json.loads(line)["path"] for finished in (first, second) for line in finished.out.splitlines()]
    assert told == [str(inputs / "a.png")] * 2


def test_half_written_files_wait_and_broken_ones_get_their_row(model: Path, tmp_path: Path) -> None:
    inputs, out = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    whole = land(tmp_path / "whole.png", 1)

    def meanwhile() -> None:
        (inputs / "slow.png").write_bytes(whole[:2000])
        land(inputs / "other.png", 2)
        wait_for(lambda: names(out) == ["other.png"])
        time.sleep(0.4)  # settled, but it cannot be read
        assert names(out) == ["other.png"]
        with (inputs / "slow.png").open("ab") as file:
            file.write(whole[2000:])
        wait_for(lambda: names(out) == ["other.png", "slow.png"])
        (inputs / "broken.png").write_bytes(whole[:2000])
        wait_for(lambda: len(names(out)) == 3)

    finished = watching(model, inputs, out, meanwhile, "--patience", 2)
    rows = read_rows(out / "predictions.csv")
    assert finished.code == 1 and [bool(row["error"]) for row in rows] == [False, False, True]
    assert finished.err.count("broken.png") == 1
    (whole_result,) = [row for row in rows if "slow" in row["path"]]
    assert whole_result["overlay"] == "overlays/slow.png"


def test_state_survives_a_line_that_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"model")
    (tmp_path / "out").mkdir()
    job = PredictionJob(tmp_path / "model.bin", ("in",), tmp_path / "out", runtime=RuntimeConfig("cpu"))
    files = [InputFile(tmp_path / name, name) for name in ("a,\n\udcff.png", "b.png")]
    with WatchState(tmp_path / "out", job) as state:
        for number, file in enumerate(files):
            state.add(file, (number, 5), f"n{number}", failure_record(file.path, "broken"))
    table, lines = tmp_path / "out" / "predictions.csv", tmp_path / "out" / "watch_state.jsonl"
    expected = table.read_bytes()
    lines.write_bytes(lines.read_bytes() + b'{"file": "c.png", "vers')
    table.write_bytes(expected[:-5])
    with WatchState(tmp_path / "out", job) as state:
        assert table.read_bytes() == expected and len(state) == 2 and state.names == ["n0", "n1"]
        assert state.is_done(files[1], (1, 5)) and not state.is_done(files[1], (1, 6))
        state.add(InputFile(tmp_path / "c.png", "c.png"), (1, 1), "n2", failure_record(tmp_path / "c.png", "broken"))
    assert table.read_bytes().startswith(expected) and len(lines.read_bytes().splitlines()) == 4

    (tmp_path / "model.bin").write_bytes(b"another")
    with pytest.raises(ConfigurationError, match="of another model"):
        WatchState(tmp_path / "out", job)
    lines.write_bytes(b"no json\n")
    with pytest.raises(ConfigurationError, match="damaged"):
        WatchState(tmp_path / "out", job)


def test_state_ends_in_peace_after_the_model_was_replaced_and_begins_anew_where_it_is_empty(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"model")
    out = tmp_path / "out"
    out.mkdir()
    (out / "watch_state.jsonl").touch()  # of a call that was killed
    job = PredictionJob(tmp_path / "model.bin", ("in",), out, runtime=RuntimeConfig("cpu"))
    with WatchState(out, job) as state:
        state.add(InputFile(tmp_path / "a.png", "a.png"), (1, 1), "a", failure_record(tmp_path / "a.png", "broken"))
        (tmp_path / "model.bin").write_bytes(b"another")
    assert names(out) == ["a.png"]
    (tmp_path / "model.bin").write_bytes(b"model")
    with WatchState(out, job) as state:
        assert len(state) == 1
    for other in (replace(job, resize_px=300), replace(job, runtime=RuntimeConfig("cpu", precision="bf16"))):
        with pytest.raises(ConfigurationError, match="--resize or --precision"):
            WatchState(out, other)


def test_results_of_other_calls_are_not_mixed(model: Path, tmp_path: Path) -> None:
    land(tmp_path / "a.png")
    common = ("--device", "cpu", "--threads", 1)
    assert invoke(predict, model, tmp_path / "a.png", "--out", tmp_path / "once", *common).code == 0
    refused = invoke(predict, model, tmp_path, "--watch", "--out", tmp_path / "once", *common)
    assert refused.code == 2 and "of another call" in refused.err
    watched = tmp_path / "watched"
    watching(model, tmp_path, watched, lambda: wait_for(lambda: len(names(watched)) > 0))
    refused = invoke(predict, model, tmp_path / "a.png", "--out", watched, *common)
    assert refused.code == 2 and "--watch" in refused.err
    hold = (
        "import sys; from pathlib import Path; from patchcore.storage.folder_lock import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "once")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        refused = invoke(predict, model, tmp_path / "a.png", "--out", tmp_path / "once", *common)
        other.communicate()
    assert refused.code == 2 and "in use by another call" in refused.err


@pytest.mark.slow
def test_killed_at_any_moment_each_file_has_one_row(model: Path, tmp_path: Path) -> None:
    inputs, out = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    for number in range(40):
        land(inputs / f"{number:02d}.png", number)
    command = [sys.executable, str(REPOSITORY / "bin" / "predict.py"), str(model), str(inputs), "--out", str(out),
               "--watch", "--device", "cpu", "--batch_size", "2"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    for killed_at in (5, 17, 40):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        wait_for(lambda at=killed_at: len(names(out)) >= at)  # type: ignore[misc]
        process.send_signal(signal.SIGKILL if killed_at < 40 else signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "ended" in said
    rows = read_rows(out / "predictions.csv")
    assert sorted(names(out)) == [f"{number:02d}.png" for number in range(40)]
    assert len({row["overlay"] for row in rows}) == 40

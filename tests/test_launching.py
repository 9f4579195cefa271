"""Where tasks run: the same bytes from several processes, lost processes, classes that fail, Ctrl-C, wrong options."""

from __future__ import annotations

import functools
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, small_run, write_category
from in_process import Finished, invoke, read_rows
from light_tasks import die_until, own_process, raise_error, talk

from patchcore.cli import run_baselines, run_fastflow, run_patchcore
from patchcore.configs import LaunchConfig, RunConfig, RuntimeConfig
from patchcore.errors import ConfigurationError
from patchcore.launching import InThisProcess, Job, open_executor
from patchcore.launching.local import LocalProcesses
from patchcore.launching.ray_cluster import NodeReport, report_node, require_alike, require_room

TABLES = ("results.csv", "results_by_defect.csv", "failures.csv")


# ---------------------------------------------------------------- executors, with tasks that take no time


def jobs(folder: Path, *calls: Callable[[], Any]) -> Iterator[Job]:
    for number, call in enumerate(calls):
        yield Job(number, f"task {number}", folder / "logs" / f"{number}.log", call)


def test_in_this_process_the_next_task_is_taken_when_the_one_before_has_ended(tmp_path: Path) -> None:
    taken: list[int] = []

    def noted() -> Iterator[Job]:
        for job in jobs(tmp_path, own_process, own_process):
            taken.append(job.key)
            yield job

    (tmp_path / "logs").mkdir()
    ended = InThisProcess().run(noted())
    assert next(ended).value == os.getpid() and taken == [0]
    assert next(ended).key == 1 and taken == [0, 1]


def test_workers_are_other_processes_whose_output_is_in_the_log_and_whose_warnings_come_back(tmp_path: Path) -> None:
    calls = [own_process, functools.partial(talk, "mind 100 % of it"), own_process]
    ended = {end.key: end for end in LocalProcesses(2).run(jobs(tmp_path, *calls))}
    assert ended[0].value != os.getpid() and ended[1].value == "said"
    assert ended[1].messages == [(30, "mind 100 % of it")] and ended[0].messages == []
    log = (tmp_path / "logs" / "1.log").read_text()
    for part in ("to standard output", "from another language", "INFO a detail", "WARNING mind 100 % of it"):
        assert part in log
    assert (tmp_path / "logs" / "0.log").read_text() == ""


def test_a_task_whose_process_is_killed_is_done_anew_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = [functools.partial(die_until, tmp_path / "twice", 2), functools.partial(die_until, tmp_path / "always", 99)]
    ended = {end.key: end for end in LocalProcesses(2).run(jobs(tmp_path, *calls, *[own_process] * 4))}
    assert ended[0].value == "survived" and (tmp_path / "twice").read_text() == "xxx"
    assert "lost 3 times" in ended[1].lost and str(tmp_path / "logs" / "1.log") in ended[1].lost
    assert (tmp_path / "always").read_text() == "xxx"
    assert all(ended[number].value > 0 for number in range(2, 6))


def test_no_more_processes_are_prepared_than_there_are_tasks(tmp_path: Path) -> None:
    ended = list(LocalProcesses(10**9).run(jobs(tmp_path, own_process)))
    assert len(ended) == 1 and list(LocalProcesses(10**9).run(iter(()))) == []


def test_what_a_task_raises_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="a defect"):
        list(LocalProcesses(2).run(jobs(tmp_path, raise_error, own_process)))


SLEEP_IN_WORKERS = """
import functools, os, signal, sys, time
from pathlib import Path
from patchcore.cli.grammar import run_with_exit_code
from patchcore.launching import Job
from patchcore.launching.local import LocalProcesses

def run():
    folder = Path(sys.argv[1])
    for name in ("a", "b"):
        yield Job(name, name, folder / f"{name}.log", functools.partial(sleep, folder / name))

def sleep(path):
    path.with_suffix(".part").write_text(str(os.getpid()))
    path.with_suffix(".part").rename(path)
    time.sleep(600)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job would ignore
    run_with_exit_code(lambda: list(LocalProcesses(2).run(run())) and 0)
"""


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_workers_end_with_the_process_that_started_them(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    script = tmp_path / "sleep.py"
    script.write_text(SLEEP_IN_WORKERS)
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
    )
    names = [tmp_path / "a", tmp_path / "b"]
    wait_for(lambda: all(name.exists() for name in names))
    workers = [int(name.read_text()) for name in names]
    if sent is signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal does, workers included
    else:
        process.send_signal(sent)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == code
    wait_for(lambda: not any(map(is_alive, workers)))
    if sent is not signal.SIGKILL:
        assert len(error.splitlines()) == 1 and error.startswith("error: ")


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("launching") / "data"
    for category in ("bolt", "plate"):
        write_category(root, category, num_train=3, num_test=2)
    (root / "bolt" / "test" / "good" / "000.png").write_bytes(b"no image")
    return root


def run(out: Path, *args: object) -> Finished:
    return invoke(run_patchcore, out, "--device", "cpu", "--threads", 1, *args)


def contents(folder: Path) -> dict[str, bytes]:
    """Return what has to be equal of a run folder: everything but times, logs and the command."""
    varying = ("config.json", "timings.csv", "class_results", "run.log", "logs")
    files = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    return {str(name): (folder / name).read_bytes() for name in sorted(files) if name.parts[0] not in varying}


def test_two_workers_leave_what_one_process_leaves_and_a_failing_class_loses_no_other(
    data: Path, tmp_path: Path
) -> None:
    steps = [*small_run(data), "--save_patchcore_model", "--save_anomaly_scores", "--save_segmentation_images"]
    alone = run(tmp_path / "alone", *steps)
    together = run(tmp_path / "together", "--workers", 2, *steps)
    assert alone.code == together.code == 1
    folders = [tmp_path / name / "project" / "group" for name in ("alone", "together")]
    assert contents(folders[0]) == contents(folders[1])
    assert set(contents(folders[1])) > set(TABLES)
    assert [row["Row Names"] for row in read_rows(folders[1] / "results.csv")] == ["mpdd_bolt", "mpdd_plate", "Mean"]
    assert sorted(p.name for p in (folders[1] / "logs").iterdir()) == ["bolt_0.log", "plate_0.log"]
    assert not (folders[0] / "logs").exists()
    failed = [line for line in together.error_lines if "bolt failed: " in line]
    assert len(failed) == 1 and "000.png" in failed[0]
    assert failed[0].removeprefix("error: ") in (folders[1] / "run.log").read_text()
    assert alone.out.replace("alone", "together") == together.out


def test_cores_are_shared_out_and_each_worker_gets_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchcore.launching.local.available_cpus", lambda: 9)
    monkeypatch.setattr("patchcore.launching.local.set_threads", lambda threads: None)
    settled, device = LocalProcesses(2).settle(RuntimeConfig("cpu"))
    assert settled.threads == 4 and device.type == "cpu"
    assert LocalProcesses(12).settle(RuntimeConfig("cpu"))[0].threads == 1
    assert LocalProcesses(2).settle(RuntimeConfig("cpu", threads=3))[0].threads == 3
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    workers = LocalProcesses(3)
    settled, device = workers.settle(RuntimeConfig("cuda", gpus=(1, 3)))
    assert settled.gpus == (0,) and device.index == 1 and tuple(workers._gpus) == (1, 3)
    with pytest.raises(ConfigurationError, match="GPU 7 was asked for, 4 CUDA"):
        LocalProcesses(2).settle(RuntimeConfig("cuda", gpus=(1, 7)))


# ---------------------------------------------------------------- what is refused, in one line and at once


MISTAKES = [
    (("--workers", 0), "--workers"),
    (("--launcher", "slurm"), "slurm"),
    (("--ray_address", "auto"), "--ray_address auto without --launcher ray"),
    (("--gpus_per_task", 1), "--gpus_per_task 1.0 without --launcher ray"),
    (("--cpus_per_task", 2), "--cpus_per_task 2 without --launcher ray"),
    (("--launcher", "ray", "--workers", 2), "--workers 2 is for --launcher local"),
    (("--launcher", "ray", "--gpu", 1), "use --gpus_per_task"),
    (("--launcher", "ray", "--cpus_per_task", 0), "--cpus_per_task"),
    (("--launcher", "ray", "--gpus_per_task", 1.5), "--gpus_per_task 1.5, expected a share of one GPU"),
    (("--launcher", "ray", "--gpus_per_task", "nan"), "--gpus_per_task nan"),
    (("--launcher", "ray", "--device", "cpu", "--gpus_per_task", 1), "would leave GPUs idle"),
    (("--launcher", "ray", "--device", "cuda:1"), "--device cuda:1 with --launcher ray"),
    (("--launcher", "ray", "--threads", 2, "--cpus_per_task", 1), "--threads 2 on --cpus_per_task 1"),
    (("--launcher", "ray", "--ray_address", "host"), "expected HOST:PORT"),
    (("--launcher", "ray", "--ray_address", "ray://host:10001"), "expected HOST:PORT"),
    (("--launcher", "ray", "--ray_address", "host:99999"), "expected HOST:PORT"),
]


@pytest.mark.parametrize(("options", "expected"), MISTAKES, ids=lambda value: " ".join(map(str, value))[:40])
def test_a_wrong_option_is_one_line(tmp_path: Path, options: tuple[object, ...], expected: str) -> None:
    done = invoke(run_patchcore, tmp_path / "out", *options, *small_run(tmp_path, "plate"))
    assert done.code == 2 and len(done.error_lines) == 1 and expected in done.err
    assert not (tmp_path / "out").exists()


def test_every_command_that_trains_has_the_options() -> None:
    names = {"--launcher", "--workers", "--ray_address", "--gpus_per_task", "--cpus_per_task"}
    for command in (run_patchcore, run_fastflow, run_baselines):
        assert names <= {option for parameter in command.params for option in parameter.opts}


def test_stored_models_are_not_evaluated_by_workers(tmp_path: Path) -> None:
    steps = ("fastflow", "--backbone", "resnet18", "dataset", "-d", "plate", "mpdd", tmp_path)
    for typed in (("--workers", 2), ("--launcher", "ray")):
        done = invoke(run_fastflow, tmp_path / "out", "--eval_only", "--checkpoint", "m", *typed, *steps)
        assert done.code == 2 and f"{typed[0]} {typed[1]} is not available" in done.err


def test_without_ray_there_is_one_line(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = run(tmp_path / "out", "--launcher", "ray", *small_run(data, "plate"))
    assert done.code == 2 and len(done.error_lines) == 1
    assert "--launcher ray needs the package ray" in done.err and "pip install '.[distributed]'" in done.err
    assert not (tmp_path / "out").exists()


def test_an_address_where_nobody_listens_is_refused_at_once(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the package ray is not installed")
    done = run(tmp_path / "out", "--launcher", "ray", "--ray_address", "127.0.0.1:1", *small_run(data, "plate"))
    assert done.code == 2 and len(done.error_lines) == 1 and "127.0.0.1:1 cannot be reached" in done.err


NODES = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 16.0}]


def test_a_task_must_fit_on_one_node() -> None:
    require_room(NODES, 16, 0)
    require_room(NODES, 4, 0.5)
    for cpus, gpus, expected in (
        (1, 2.0, "--gpus_per_task 2, but no node of the cluster has more than 1 GPU"),
        (17, 0.0, "--cpus_per_task 17, but no node of the cluster has more than 16 CPU"),
        (8, 1.0, "8 CPU(s) and 1 GPU(s) together"),
    ):
        with pytest.raises(ConfigurationError) as refused:
            require_room(NODES, cpus, gpus)
        assert expected in str(refused.value)
    with pytest.raises(ConfigurationError, match="more than 0 GPU"):
        require_room([{"CPU": 2.0}], 1, 1)


def test_a_node_with_another_version_or_without_the_data_is_named_with_the_path(tmp_path: Path) -> None:
    here = report_node([str(tmp_path), str(tmp_path / "gone")])
    assert here.missing == [str(tmp_path / "gone")]
    assert {"python", "patchcore", "torch", "torchvision", "timm", "numpy", "pillow"} <= set(here.versions)
    require_alike("node a", NodeReport(here.versions, []), here.versions)
    with pytest.raises(ConfigurationError, match=r"node a does not see '.*gone': use a path that all nodes share"):
        require_alike("node a", here, here.versions)
    for package in here.versions:
        other = NodeReport({**here.versions, package: "0.0"}, [])
        with pytest.raises(ConfigurationError, match=f"node a has {package} 0.0, here it is "):
            require_alike("node a", other, here.versions)
        without = NodeReport({name: v for name, v in here.versions.items() if name != package}, [])
        with pytest.raises(ConfigurationError, match=f"node a has no {package}, here it is "):
            require_alike("node a", without, here.versions)


def test_the_launcher_is_no_part_of_the_result() -> None:
    assert RunConfig("r").launch == LaunchConfig() and LaunchConfig(workers=1).is_in_process
    assert not LaunchConfig(workers=2).is_in_process and not LaunchConfig("ray").is_in_process
    with open_executor(LaunchConfig(), RuntimeConfig()) as executor:
        assert executor.is_in_process


# ---------------------------------------------------------------- the benchmark


def test_the_overhead_of_a_further_task_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    benchmark = importlib.import_module("launchers")
    alone, ray = benchmark.Launch("alone", (), 1), benchmark.Launch("Ray", ("--launcher", "ray"), 1)
    twice = benchmark.Launch("two", ("--workers", "2"), 1, 2)
    times = [benchmark.Times(2, 10), benchmark.Times(8, 16.8), benchmark.Times(3, 7.4)]
    lines = benchmark.rows(list(zip([alone, ray, twice], times, strict=True)))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["alone", "2.0 s", "10.0 s", "1.00 s", "", ""]
    assert cells[1][3:] == ["1.10 s", "+10.0%", "<= 10%"]
    assert cells[2][3:] == ["0.55 s", "+10.0%", ""]  # two at once: twice the time for as many
    for launch in benchmark.launches(2):
        typed = benchmark.command(launch, tmp_path / "data", "plate", tmp_path / "out", 9)
        assert typed.count("--seed") == 9 and typed[2] == str(tmp_path / "out")
        assert "data" in invoke(run_patchcore, *typed[2:]).err  # read to its end: there are none

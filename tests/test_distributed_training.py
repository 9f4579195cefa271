"""Several processes that train one network: the same numbers as one, one voice, and an end for all."""

from __future__ import annotations

import multiprocessing
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from in_process import invoke
from training_processes import PAUSE, PROBLEMS, take_part

from patchcore import cli
from patchcore.configs import BackboneConfig, FastFlowConfig, RuntimeConfig
from patchcore.errors import ConfigurationError, DataError, ProcessLost
from patchcore.methods.normalizing_flow import FastFlowNet
from patchcore.methods.training import Batch
from patchcore.process_group import ALONE, Group, Processes, open_group
from patchcore.torchrun import Place, own_runtime, torchrun_place

pytestmark = pytest.mark.usefixtures("one_thread")

R = TypeVar("R")
TOLERANCE = 1e-5  # of losses, relative


@contextmanager
def free_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
    yield port


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes gets in all trainings."""
    folder = tmp_path_factory.mktemp("two processes")
    context = multiprocessing.get_context("spawn")
    with free_port() as port:
        processes = [context.Process(target=take_part, args=(rank, port, folder)) for rank in (0, 1)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            if process.exitcode is None:
                process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("name", PROBLEMS)
def test_two_processes_train_as_one(name: str, together: list[dict[str, Any]]) -> None:
    """With noise, last batches that are smaller, and batches of which a process has nothing."""
    alone = PROBLEMS[name].run(ALONE)
    first, second = (results[name] for results in together)
    assert first["losses"] == second["losses"] and first["epoch"] == second["epoch"] == alone["epoch"]
    assert first["losses"] == [pytest.approx(numbers, rel=TOLERANCE) for numbers in alone["losses"]]
    assert first["weights"].keys() == second["weights"].keys() == alone["weights"].keys()
    for weight, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][weight])
        torch.testing.assert_close(tensor, alone["weights"][weight], rtol=1e-4, atol=1e-6)


def test_a_training_goes_on_with_another_number_of_processes(together: list[dict[str, Any]]) -> None:
    problem = PROBLEMS["uneven last batch"]
    whole = problem.run(ALONE)["losses"]
    expected = [pytest.approx(numbers, rel=TOLERANCE) for numbers in whole]
    assert len(together[0]["paused"]["losses"]) == PAUSE < len(whole)
    assert problem.run(ALONE, state=together[0]["paused"]["state"])["losses"] == expected
    assert [results["resumed"]["losses"] for results in together] == [expected, expected]


def test_what_one_process_meets_all_say(together: list[dict[str, Any]]) -> None:
    for results in together:
        assert results["spoilt"].startswith("plate: line: training diverged in epoch 1 of 4 (loss nan")
        assert results["unreadable"] == "7.png cannot be read"
        assert results["told"] == ("by 0", [0, 1])
    assert together[1]["end"] == ["until the end", None]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("places", [[0], [3], [1, 2], [0, 2, 4], [0, 1, 2, 3, 4]])
def test_an_image_gets_the_noise_that_it_gets_in_one_process(places: list[int], channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    data = torch.rand(9, 3, 5, 4).to(memory_format=layout)
    rows = torch.tensor([8, 0, 3, 7, 1])
    torch.manual_seed(2)
    whole = Batch([data[rows]], torch.arange(5), 5).randn_like(data[rows])
    own = torch.tensor(places)
    torch.manual_seed(2)
    part = Batch([data[rows[own]]], own, 5, len(own) / 5).randn_like(data[rows[own]])
    assert torch.equal(part, whole[own])
    assert torch.rand(1) == _after(data[rows])


def _after(batch: torch.Tensor) -> torch.Tensor:
    """Return what the generator gives after the noise of a whole batch."""
    torch.manual_seed(2)
    torch.randn_like(batch)
    return torch.rand(1)


class Threads(Processes):
    """Stands for one of several processes: a thread that shares a board with the others."""

    def __init__(self, rank: int, size: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._board, self._barrier = board, barrier

    def gathered(self, value: R) -> list[R]:
        self._board[self.rank] = value
        self._barrier.wait(10)
        values = list(self._board)
        self._barrier.wait(10)
        return values

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.gathered(value)).sum(dim=0)


def in_threads(size: int, function: Callable[[Processes], R]) -> list[R]:
    """Call a function once for each of several processes at once."""
    board: list[Any] = [None] * size
    barrier = threading.Barrier(size)
    results: list[Any] = [None] * size

    def work(rank: int) -> None:
        results[rank] = function(Threads(rank, size, board, barrier))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(("count", "size"), [(7, 2), (7, 3), (2, 3)])
def test_statistics_of_the_flows_are_those_of_all_images(count: int, size: int) -> None:
    shapes = [(4, 6, 6), (6, 3, 3)]
    config = FastFlowConfig(BackboneConfig("resnet18", ("layer1", "layer2")), flow_steps=2)
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(count, *shape, generator=generator) * 5 - 1 for shape in shapes]

    def learned(processes: Processes) -> dict[str, torch.Tensor]:
        net = FastFlowNet(shapes, config, seed=1)
        own = processes.share(count)
        share = [tensor[own.start : own.stop] for tensor in maps]
        net.standardise_by(share, processes)
        net.measure_spread(share, 2, processes)
        return net.state_dict()

    expected = learned(ALONE)
    for found in in_threads(size, learned):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=0)
    values = torch.stack([tensor for name, tensor in expected.items() if name.endswith("spread")])
    assert (values != 1).all()


def test_a_mean_over_processes_counts_numbers_not_processes() -> None:
    parts = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([]), torch.tensor([11.0])]
    means = in_threads(3, lambda p: p.mean(parts[p.rank].sum(), len(parts[p.rank])))
    assert means == [torch.tensor(5.0, dtype=torch.float64)] * 3


@pytest.mark.parametrize("count", [0, 1, 5, 8, 13])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_consecutive_and_even_and_the_first_is_the_largest(count: int, size: int) -> None:
    shares = [Group(rank, size).share(count) for rank in range(size)]
    assert [number for share in shares for number in share] == list(range(count))
    assert len(shares[0]) == max(map(len, shares)) <= min(map(len, shares)) + 1


# ---------------------------------------------------------------- one voice


class Stub(Group):
    """One of two processes, whose other one has met nothing."""

    def gathered(self, value: R) -> list[R]:
        return [value, None] if self.is_first else [None, value]  # type: ignore[list-item]


def test_who_has_met_it_raises_its_own_error() -> None:
    with pytest.raises(DataError, match=r"7\.png"), Stub(0, 2).together():
        raise DataError("7.png")
    with Stub(0, 2).together():
        pass
    with pytest.raises(ConfigurationError, match="--lr"), Stub(0, 2).together():
        raise ConfigurationError("--lr")
    with pytest.raises(MemoryError), Stub(0, 2).together():
        raise MemoryError  # fewer images at a time may mend it


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_process_meets_alone_ends_it(rank: int) -> None:
    group = Group(rank, 2)
    for alike in (DataError("x"), ConfigurationError("x")):
        with pytest.raises(type(alike)), group.in_step():
            raise alike
    with pytest.raises(ProcessLost, match=rf"^process {rank} of 2 failed: out of memory \(") as mishap, group.in_step():
        raise MemoryError("x")
    assert not mishap.value.is_elsewhere
    for text in (
        "[gloo/pair.cc:547] Connection closed by peer",
        "ncclRemoteError: remote process exited",
    ):
        with pytest.raises(ProcessLost, match="another process has ended") as lost, group.in_step():
            raise RuntimeError(text)
        assert lost.value.is_elsewhere


def test_a_defect_keeps_its_traceback_where_there_is_no_log() -> None:
    with pytest.raises(ZeroDivisionError), Group(1, 2).in_step():
        _ = 1 // 0
    with pytest.raises(ProcessLost, match="process 0 of 2 failed: ZeroDivisionError"), Group(0, 2).in_step():
        _ = 1 // 0


# ---------------------------------------------------------------- torchrun and the command line


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Pretend to be one of two processes that torchrun has started."""
    monkeypatch.setattr("patchcore.torchrun.SECONDS_OF_THE_FIRST", 0.01)

    def pretend(rank: int) -> None:
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))

    return pretend


def test_the_place_is_read_from_the_environment(
    torchrun: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert torchrun_place() is None
    torchrun(1)
    assert torchrun_place() == Place(1, 2, 1, 2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert torchrun_place() is None
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert torchrun_place() is None


COMMANDS = [
    "run_patchcore", "run_baselines", "run_sweep", "load_and_evaluate_patchcore", "load_and_evaluate_fastflow",
    "load_and_evaluate_baselines", "predict", "export_model", "compare_results", "make_demo_dataset",
]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_other_commands_say_what_to_use_instead(name: str, torchrun: Callable[[int], None]) -> None:
    torchrun(0)
    ended = invoke(getattr(cli, name), "anything")
    assert ended.code == 2 and ended.out == ""
    assert ended.error_lines == [
        f"error: torchrun has started {name} 2 times, expected run_fastflow, whose training it divides: start it once, "
        "with python; the run_... commands use several processes with --workers N or --launcher ray"
    ]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("--workers", 2), "--workers 2 under torchrun, whose processes train each class together: leave --workers"),
        (("--launcher", "ray"), "--launcher ray under torchrun, whose processes train each class together"),
        (("--eval_only", "--checkpoint", "x"), "torchrun has started run_fastflow --eval_only 2 times"),
        (("--device", "mps"), "--device mps for 2 processes of torchrun: use cuda, which gives each a GPU"),
    ],
)
def test_what_torchrun_does_not_go_with_is_one_line(
    typed: tuple[object, ...], message: str, torchrun: Callable[[int], None], tmp_path: Path
) -> None:
    torchrun(0)
    ended = invoke(cli.run_fastflow, tmp_path, "fastflow", "dataset", "--category", "plate", tmp_path, *typed)
    assert ended.code == 2 and len(ended.error_lines) == 1 and f"error: {message}" in ended.err


def test_another_process_than_the_first_waits_before_it_speaks(
    torchrun: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("patchcore.torchrun.time.sleep", waited.append)
    torchrun(0)
    invoke(cli.run_fastflow, "only a path")
    assert not waited
    torchrun(1)
    assert invoke(cli.run_fastflow, "only a path").code == 2
    assert waited == [0.01]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ProcessLost("another has ended", True), ProcessLost("I", False)])
def test_an_end_for_all_is_said_by_the_first(
    error: BaseException, torchrun: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def end(*_: object) -> None:
        raise error

    waited: list[float] = []
    monkeypatch.setattr("patchcore.torchrun.time.sleep", waited.append)
    monkeypatch.setattr("patchcore.cli.fastflow._train", end)
    command = (tmp_path, "fastflow", "dataset", "--category", "plate", tmp_path)
    lost = isinstance(error, ProcessLost)
    torchrun(0)
    first = invoke(cli.run_fastflow, *command)
    assert first.err.strip() == f"error: {error if lost else 'interrupted'}" and not waited
    torchrun(1)
    second = invoke(cli.run_fastflow, *command)
    assert second.code == first.code == (1 if lost else 130)
    assert bool(second.err.strip()) == lost and bool(waited) == (isinstance(error, ProcessLost) and error.is_elsewhere)


def test_gradients_go_by_the_gpus_and_messages_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("torch.cuda.set_device", calls.append)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, timeout: calls.append(backend))
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: calls.append("end"))
    with open_group(Place(1, 2, 1, 2), torch.device("cuda", 1)) as processes:
        assert (processes.rank, processes.size) == (1, 2)
    assert calls == [torch.device("cuda", 1), "cpu:gloo,cuda:nccl", "end"]


def test_processes_that_nobody_has_told_of_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    message = r"the 2 processes cannot join \(.*\): start them with torchrun"
    with pytest.raises(ConfigurationError, match=message), open_group(TWO, torch.device("cpu")):
        pass


TWO, FOUR = Place(1, 2, 1, 2), Place(6, 8, 2, 4)


def test_each_process_has_its_share_of_the_cores_or_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchcore.torchrun.available_cpus", lambda: 10)
    assert own_runtime(RuntimeConfig("cpu"), FOUR, 0).threads == 2
    assert own_runtime(RuntimeConfig("auto", threads=7), FOUR, 0) == RuntimeConfig("auto", threads=7)
    assert own_runtime(RuntimeConfig("auto"), Place(0, 64, 0, 64), 0).threads == 1
    assert own_runtime(RuntimeConfig("auto"), FOUR, 4).gpus == (2,)
    assert own_runtime(RuntimeConfig("cuda", (4, 5)), TWO, 8).gpus == (5,)
    assert own_runtime(RuntimeConfig("cpu"), TWO, 1).device == "cpu"


@pytest.mark.parametrize(
    ("runtime", "num_gpus", "found"),
    [
        (RuntimeConfig("auto"), 1, "--gpu 0 on 1 CUDA device"),
        (RuntimeConfig("cuda"), 0, "--gpu 0 on 0 CUDA device"),
        (RuntimeConfig("cuda", (3,)), 8, "--gpu 3 on 8 CUDA device"),
        (RuntimeConfig("cuda", (0, 8)), 8, "--gpu 0 8 on 8 CUDA device"),
    ],
)
def test_too_few_gpus_are_found_by_every_process(runtime: RuntimeConfig, num_gpus: int, found: str) -> None:
    for rank in (0, 1):
        message = f"^torchrun has started 2 processes on this machine, found {found}"
        with pytest.raises(ConfigurationError, match=message):
            own_runtime(runtime, Place(rank, 2, rank, 2), num_gpus)
    with pytest.raises(ConfigurationError, match="--device cuda:1 for 2 processes of torchrun"):
        own_runtime(RuntimeConfig("cuda:1"), TWO, 8)

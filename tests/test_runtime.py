"""Tests of seeds, devices, progress and logging."""

from __future__ import annotations

import io
import itertools
import logging
import mmap
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from patchcore import runtime
from patchcore.errors import ConfigurationError
from patchcore.runtime import (
    derive_seed,
    in_parts,
    in_threads,
    log_to_console,
    log_to_file,
    over_threads,
    progress,
    resolve_device,
    resolve_precision,
    set_threads,
)

LOGGER = logging.getLogger("patchcore.a_module")


@pytest.fixture
def toolkit_logger() -> Iterator[logging.Logger]:
    """The toolkit's logger as a fresh process has it, put back afterwards."""
    logger = logging.getLogger("patchcore")
    before = (logger.handlers[:], logger.level, logger.propagate)
    logger.handlers[:], logger.propagate = [], True
    yield logger
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


@pytest.fixture
def warnings_logged(toolkit_logger: logging.Logger) -> list[str]:
    """The messages of warnings, as they come."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    toolkit_logger.addHandler(Keep(logging.WARNING))
    return messages


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_derived_seeds_are_different_for_every_part() -> None:
    parts = itertools.product(range(20), ("metal_plate", "tubes"), ("coreset", "folds"), range(5))
    seeds = [derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_derived_seeds_tell_where_one_name_ends() -> None:
    assert derive_seed(0, "ab", "c") != derive_seed(0, "a", "bc")
    assert derive_seed(0, "a", "b") != derive_seed(0, "b", "a")
    assert derive_seed(1, "2") != derive_seed(12)
    assert derive_seed(0) != derive_seed(0, "")


def test_derived_seeds_are_the_same_in_every_process() -> None:
    expected = derive_seed(7, "bracket_black", 3)
    code = "from patchcore.runtime import derive_seed; print(derive_seed(7, 'bracket_black', 3))"
    environment = {"PYTHONPATH": str(Path(runtime.__file__).parents[1]), "PYTHONHASHSEED": "5"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == expected


def test_derived_seeds_use_all_their_bits() -> None:
    seeds = [derive_seed(0, i) for i in range(2000)]
    for bit in range(63):
        ones = sum(seed >> bit & 1 for seed in seeds)
        assert 850 < ones < 1150  # 1000 expected, standard deviation 22


def test_derived_seeds_take_any_file_name_and_fit_torch() -> None:
    undecodable = b"cl\xe4ss".decode("utf-8", "surrogateescape")
    torch.Generator().manual_seed(derive_seed(2**70, undecodable, "クラス"))


@pytest.mark.usefixtures("no_gpu")
def test_auto_without_gpu_is_the_cpu_and_one_warning(warnings_logged: list[str]) -> None:
    assert resolve_device("auto") == torch.device("cpu")
    assert len(warnings_logged) == 1
    assert "no CUDA device" in warnings_logged[0]
    assert "\n" not in warnings_logged[0]


@pytest.mark.usefixtures("no_gpu")
def test_cpu_by_name_does_not_warn(warnings_logged: list[str]) -> None:
    assert resolve_device("cpu", (3,)) == torch.device("cpu")
    assert warnings_logged == []


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:1"])
def test_gpu_by_name_must_be_there(device: str) -> None:
    with pytest.raises(ConfigurationError, match=r"GPU \d was asked for, 0 CUDA device\(s\) found: use --device cpu"):
        resolve_device(device)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("device", "gpus", "index"),
    [
        ("auto", (0,), 0),
        ("auto", (1, 0), 1),  # the first one named is used
        ("auto", (), 0),
        ("cuda", (1,), 1),
        ("cuda:1", (0,), 1),
        ("cuda:0", (1,), 0),
    ],
)
def test_which_gpu(warnings_logged: list[str], device: str, gpus: tuple[int, ...], index: int) -> None:
    assert resolve_device(device, gpus) == torch.device("cuda", index)
    assert warnings_logged == []


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("device", "gpus"), [("auto", (2,)), ("auto", (-1,)), ("cuda", (5, 0)), ("cuda:2", (0,))])
def test_a_gpu_number_that_is_not_there(device: str, gpus: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match=r"2 CUDA device\(s\) found"):
        resolve_device(device, gpus)


@pytest.mark.parametrize("device", ["", "gpu", "CPU", "cuda:", "cuda:x", "cuda:-1", "cuda:²", "cuda:0:1"])
def test_odd_device_names(device: str) -> None:
    with pytest.raises(ConfigurationError, match="--device"):
        resolve_device(device)


def test_mps_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="no Metal device: use --device cpu"):
        resolve_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("mps") == torch.device("mps")


def test_set_threads() -> None:
    before = torch.get_num_threads()
    try:
        set_threads(1)
        assert torch.get_num_threads() == 1
        set_threads(None)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


class Clock:
    """A time that only passes where a test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


def test_progress_is_silent_for_short_loops(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress(range(100), "short")) == list(range(100))
    with progress(None, "by hand", total=3) as bar:
        for _ in range(3):
            clock.seconds += 0.2
            bar.update()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_long_loops_with_time_left(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress(range(20), "a long loop"):
        clock.seconds += 1.0
    shown = stream.getvalue()
    assert "a long loop" in shown
    assert "<00:10" in shown  # time left in the middle
    redrawn = shown.count("a long loop")
    assert redrawn >= 15 if terminal else redrawn <= 6


def test_bars_within_bars_leave_no_escape_codes_in_a_log(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: False  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(range(3), "trainings") as outer:
        for _ in outer:
            for _ in progress(range(10), "epochs"):
                for _ in progress(range(4), "batches"):
                    clock.seconds += 2.0
    shown = stream.getvalue()
    assert all(name in shown for name in ("trainings", "epochs", "batches"))
    assert "\x1b" not in shown
    assert shown.endswith("\n"), "the last bar ends its line"


def test_console_shows_one_line_while_the_file_has_the_traceback(
    toolkit_logger: logging.Logger, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log_to_console()
    log_to_console()  # a second command in the same process adds no second line
    path = tmp_path / "run.log"
    with log_to_file(path):
        LOGGER.info("started")
        LOGGER.debug("a detail")
        LOGGER.warning("look out")
        try:
            raise ValueError("the cause")
        except ValueError:
            LOGGER.exception("tubes failed")
    LOGGER.info("after the run")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == ["started", "warning: look out", "error: tubes failed", "after the run"]
    log = path.read_text(encoding="utf-8")
    assert "ValueError: the cause" in log
    assert "Traceback" in log
    assert "INFO started" in log
    assert "WARNING look out" in log
    assert "after the run" not in log
    assert "DEBUG a detail" in log


def test_log_to_file_lets_go_of_its_file_after_an_error(toolkit_logger: logging.Logger, tmp_path: Path) -> None:
    handlers = toolkit_logger.handlers[:]
    with pytest.raises(KeyError), log_to_file(tmp_path / "run.log"):
        raise KeyError("broken")
    assert toolkit_logger.handlers == handlers


def test_log_takes_file_names_that_are_not_utf8(
    toolkit_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(shown, "utf-8", "backslashreplace", write_through=True))
    log_to_console()
    name = b"cl\xe4ss.png"
    with log_to_file(tmp_path / "run.log"):
        LOGGER.info("reading %s", name.decode("utf-8", "surrogateescape"))
    assert name in (tmp_path / "run.log").read_bytes()
    assert shown.getvalue() == b"reading cl\\udce4ss.png\n"


def test_a_name_with_line_ends_stays_one_line(
    toolkit_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    log_to_console()
    LOGGER.warning("%s failed", "a\nb\u2028c")
    assert capsys.readouterr().err == "warning: a b c failed\n"


def test_peak_memory_sees_a_large_array() -> None:
    runtime.reset_peak_memory()
    before = runtime.peak_memory_megabytes()
    block = mmap.mmap(-1, 64 * 2**20)  # fresh pages: an array may get memory that the process already has
    block.write(b"1" * len(block))
    assert runtime.peak_memory_megabytes() > 0
    if sys.platform == "linux":
        assert runtime.peak_memory_megabytes() >= before + 50
    block.close()


def test_available_cpus() -> None:
    assert runtime.available_cpus() >= 1


# ---------------------------------------------------------------- a batch over threads


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_a_batch_over_threads_is_whole_and_in_order(rows: int) -> None:
    seen: list[tuple[int, int]] = []

    def doubled(part: torch.Tensor) -> torch.Tensor:
        seen.append((len(part), torch.get_num_threads()))
        return 2 * part

    batch = torch.arange(2.0 * rows).view(rows, 2)
    assert torch.equal(over_threads(doubled, batch, torch.device("cpu")), 2 * batch)
    assert sorted(length for length, _ in seen) == sorted(len(part) for part in batch.tensor_split(min(3, rows)))
    assert {threads for _, threads in seen} == {3 if rows == 1 else 1}


@pytest.mark.usefixtures("three_threads")
def test_a_batch_over_threads_leaves_the_number_of_threads_to_others() -> None:
    over_threads(torch.neg, torch.zeros(6, 1), torch.device("cpu"))
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 3
    calls: list[int] = []

    def count(part: torch.Tensor) -> torch.Tensor:
        calls.append(len(part))
        return part

    over_threads(count, torch.zeros(6, 1), torch.device("cuda"))
    assert calls == [6], "a GPU gets the batch as it is"


@pytest.mark.usefixtures("three_threads")
def test_an_error_in_a_part_of_a_batch_reaches_the_caller() -> None:
    def fails(part: torch.Tensor) -> torch.Tensor:
        raise ValueError(f"{len(part)} rows")

    with pytest.raises(ValueError, match="2 rows"):
        over_threads(fails, torch.zeros(6, 1), torch.device("cpu"))


def test_threads_give_results_in_order_and_leave_the_rest_when_one_fails() -> None:
    assert list(in_threads(lambda i: i * i, range(50))) == [i * i for i in range(50)]
    done: list[int] = []

    def third_fails(i: int) -> None:
        if i == 3:
            raise OSError("disk full")
        time.sleep(0.001)
        done.append(i)

    with pytest.raises(OSError, match="disk full"):
        list(in_threads(third_fails, range(10_000)))
    assert len(done) < 1000


def test_threads_read_no_further_ahead_than_they_may() -> None:
    begun: list[int] = []
    results = in_threads(lambda i: begun.append(i) or i, range(100), threads=2, ahead=3)  # type: ignore[func-returns-value]
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    time.sleep(0.05)
    assert max(begun) <= 4 + 3
    results.close()
    assert len(begun) <= 8, "who stops early gets no more"


@pytest.mark.usefixtures("three_threads")
def test_parts_of_several_batches_have_the_same_rows_and_can_be_written_to() -> None:
    numbers, doubled = torch.arange(8.0)[:, None], torch.zeros(8, 1)

    def double(part: torch.Tensor, out: torch.Tensor) -> int:
        out.copy_(2 * part)
        return len(part)

    assert in_parts(double, torch.device("cpu"), numbers, doubled) == [3, 3, 2]
    assert torch.equal(doubled, 2 * numbers)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc is told what to keep")
def test_memory_that_is_freed_stays_also_that_of_threads() -> None:
    script = """
import resource, torch
from concurrent.futures import ThreadPoolExecutor
from patchcore.runtime import set_threads

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(3, 2**20)  # 12 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

set_threads(1)
with ThreadPoolExecutor(1) as pool:
    pool.submit(faults).result()  # the first time they are new in any case
    print(pool.submit(faults).result())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 5_000, "twenty times anew it would be 60,000 pages"


# Precision


def cpu_with(*features: str) -> dict[str, object]:
    return dict.fromkeys(features, True)


def test_auto_takes_what_the_device_computes_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda, mps = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
    for features, expected in ((("amx_bf16",), "bf16"), (("avx512_bf16", "avx512_fp16"), "float32"), ((), "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=features: cpu_with(*found), raising=False)
        assert resolve_precision("auto", cpu) == expected
        assert resolve_precision("auto", cuda) == "fp16"
        assert resolve_precision("auto", mps) == "float32"
        assert resolve_precision("float32", cpu) == "float32"
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # torch before 2.10
    assert resolve_precision("auto", cpu) == "float32"


def test_a_precision_by_name_that_gains_nothing_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, warnings_logged: list[str]
) -> None:
    runtime._warn_of_slow.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu_with("amx_bf16"), raising=False)
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"
    assert warnings_logged == []
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert {resolve_precision("bf16", torch.device("cpu")) for _ in range(3)} == {"bf16"}
    assert len(warnings_logged) == 1 and "--precision bf16" in warnings_logged[0]


def test_a_precision_that_torch_cannot_compute_with(monkeypatch: pytest.MonkeyPatch) -> None:
    convolution = torch.nn.functional.conv2d

    def refuses(*args: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("\"slow_conv2d_cpu\"\n not implemented for 'Half'")

    for instead, reason in ((refuses, "not implemented for 'Half'"), (lambda x, w: x, "computes in float32 instead")):
        monkeypatch.setattr(torch.nn.functional, "conv2d", instead)
        with pytest.raises(ConfigurationError, match=rf"--precision fp16: torch .* {reason}.* use --precision auto"):
            resolve_precision("fp16", torch.device("cpu"))
    monkeypatch.setattr(torch.nn.functional, "conv2d", convolution)

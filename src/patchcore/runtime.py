"""Device, threads, seeds, progress and memory readings of the running process."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from patchcore.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

LOGGER = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


def progress(iterable: Iterable[T] | None, description: str, total: int | None = None) -> Any:
    """Wrap an iterable in a progress bar with time left.

    The bar appears after a second, so that short loops stay silent, and is redrawn seldom where standard
    error is not a terminal, so that a log file does not fill with it.

    Args:
        iterable: What to iterate over; None gives a bar to `update` by hand.
        description: What is going on, shown before the bar.
        total: Number of steps where `iterable` cannot tell.

    Returns:
        A tqdm bar: iterable, context manager, with `update(n)`.
    """
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    interval = 0.2 if terminal else 5.0
    return tqdm(
        iterable,
        desc=description,
        total=total,
        delay=1.0,
        mininterval=interval,
        leave=not terminal,  # in a log a bar is left, because only then it ends its line
        position=None if terminal else 0,  # bars within bars move the cursor, which a log shows as escape codes
        dynamic_ncols=True,
    )


class _ConsoleHandler(logging.Handler):
    """Writes records above a progress bar; tracebacks go to the log file alone."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        with suppress(BrokenPipeError):  # nobody reads it any more: no reason to stop the work
            tqdm.write(f"{prefix}{record.getMessage()}", file=sys.stderr)


def log_to_console() -> None:
    """Send the toolkit's log to standard error, one line per record."""
    logger = logging.getLogger("patchcore")
    if not any(isinstance(h, _ConsoleHandler) for h in logger.handlers):
        logger.addHandler(_ConsoleHandler(logging.INFO))
    logger.setLevel(logging.DEBUG)  # details go to the log file alone
    logger.propagate = False


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Send the toolkit's log to a file as well, with times and tracebacks, while the context lasts."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="surrogateescape")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("patchcore")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def derive_seed(seed: int, *parts: str | int) -> int:
    """Derive an independent seed for one part of a run.

    Hashing the names makes the result independent of the order in which classes or members are processed,
    of resuming, and of the process that does the work.

    Args:
        seed: The seed the user typed, >= 0.
        *parts: What the seed is for, for example category and ensemble member.

    Returns:
        An integer in [0, 2**63).
    """
    text = "\x1f".join([str(seed), *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def resolve_device(device: str, gpus: tuple[int, ...] = (0,)) -> torch.device:
    """Turn `--device` and `--gpu` into a torch device.

    Args:
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        gpus: GPU indices typed by the user; the first is used with "auto" and "cuda".

    Returns:
        The device. "auto" without CUDA gives the CPU and one warning line.

    Raises:
        ConfigurationError: The device was asked for by name and is not there, or the name is unknown.
    """
    import torch

    index = gpus[0] if gpus else 0
    count = torch.cuda.device_count()
    if device == "auto" and count == 0:
        LOGGER.warning("no CUDA device found: running on the CPU (--device cpu says so without this warning)")
        return torch.device("cpu")
    if device in ("auto", "cuda") or device.startswith("cuda:"):
        wanted = index if device in ("auto", "cuda") else _cuda_index(device)
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32: TF32 would move scores by a thousandth
        if wanted < 0 or wanted >= count:
            raise ConfigurationError(
                f"GPU {wanted} was asked for, {count} CUDA device(s) found: use --device cpu or a smaller --gpu"
            )
        return torch.device("cuda", wanted)
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigurationError("--device mps: this machine has no Metal device: use --device cpu")
        return torch.device("mps")
    if device == "cpu":
        return torch.device("cpu")
    raise ConfigurationError(f"--device {device!r} is unknown, expected auto, cpu, cuda, cuda:N or mps")


def _cuda_index(device: str) -> int:
    """Return N of "cuda:N"."""
    text = device.partition(":")[2]
    if not text.isdecimal():  # isdigit also takes superscripts, which int() refuses
        raise ConfigurationError(f"--device {device!r}: expected a GPU number after the colon, as in cuda:0")
    return int(text)


def available_cpus() -> int:
    """Return how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_threads(threads: int | None) -> None:
    """Limit the threads of torch's CPU kernels; None leaves torch's own choice."""
    if threads is not None:
        import torch

        torch.set_num_threads(min(threads, available_cpus()))  # more would wait for one another


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield what a function gives for each item, in order, computed by as many threads as there are cores.

    What has not begun when the caller stops, fails or is interrupted is not done.

    Args:
        function: Safe to call from several threads; worthwhile where it spends its time outside Python.
        items: Few enough to be held.
    """
    pool = ThreadPoolExecutor(available_cpus(), "in_threads")
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)


def over_threads(
    function: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Apply a function to a batch; on the CPU to parts of it at once, one per thread of torch, with one thread each.

    That takes less time than all threads on one operation after the other, which wait for each other at the end of
    each and idle in those too small to be divided.

    Args:
        function: From [b, ...] to [b, ...], each row by itself; safe to call from several threads.
        batch: [B, ...], B >= 1.
        device: Where the function computes; only on a CPU is the batch divided.

    Returns:
        [B, ...], in order.
    """
    import torch

    threads = torch.get_num_threads()
    if device.type != "cpu" or min(threads, len(batch)) == 1:
        return function(batch)
    parts = batch.tensor_split(min(threads, len(batch)))
    try:
        return torch.cat(list(_single_threads(threads).map(function, parts)))
    finally:  # a thread that is started from now on begins with the number that was set last, in whichever thread
        torch.set_num_threads(threads)


@functools.lru_cache(maxsize=1)
def _single_threads(count: int) -> ThreadPoolExecutor:
    """Return threads in each of which torch computes with one."""
    pool = ThreadPoolExecutor(count, "over_threads", initializer=_compute_with_one_thread)
    # All of them start now: one that started later would set the number of threads behind the back of its caller.
    together = threading.Barrier(count)
    list(pool.map(lambda _: together.wait(), range(count)))
    return pool


os.register_at_fork(after_in_child=_single_threads.cache_clear)  # a child process has none of these threads


def _compute_with_one_thread() -> None:
    import torch

    torch.get_num_threads()  # the first call in a thread takes over what was set last in any: later it would undo this
    torch.set_num_threads(1)


def reset_peak_memory() -> None:
    """Start a new measurement of the process's peak memory where the system allows it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        LOGGER.debug("peak memory cannot be reset here: readings cover the whole process")


def peak_memory_megabytes() -> float:
    """Return the peak resident memory in MB since the last reset, or of the whole process on macOS."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6

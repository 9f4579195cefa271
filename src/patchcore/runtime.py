"""Device, threads, seeds, progress and memory readings of the running process."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import resource
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from patchcore.errors import ConfigurationError, Terminated

if TYPE_CHECKING:
    import torch

LOGGER = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

MALLOC_OPTIONS = (  # numbers of malloc.h
    (-1, 2**28),  # M_TRIM_THRESHOLD, bytes at the end of the heap that are kept: more than a batch takes
    (-3, 2**25),  # M_MMAP_THRESHOLD, blocks above go back to the system at once: glibc accepts no more
    (-8, 1),  # M_ARENA_MAX
)
PRECISION_TYPES = {"bf16": "bfloat16", "fp16": "float16"}  # as torch calls them, which is not imported here
FAST_ON_CPU = {"bf16": "amx_bf16", "fp16": "amx_fp16"}  # tile units; without them the vector units are no faster


def progress(iterable: Iterable[T] | None, description: str, total: int | None = None, hidden: bool = False) -> Any:
    """Wrap an iterable in a progress bar with time left.

    The bar appears after a second, so that short loops stay silent, and is redrawn seldom where standard
    error is not a terminal, so that a log file does not fill with it.

    Args:
        iterable: What to iterate over; None gives a bar to `update` by hand.
        description: What is going on, shown before the bar.
        total: Number of steps where `iterable` cannot tell.
        hidden: Show nothing.

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
        disable=hidden,
    )


@contextmanager
def sigterm_as_exception() -> Iterator[None]:
    """Raise Terminated where SIGTERM arrives, so that what a job scheduler ends is left as after Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():  # Python hands signals to that one alone
        yield
        return
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a child process, which has nobody to tell
            os._exit(128 + number)
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _ConsoleHandler(logging.Handler):
    """Writes records above a progress bar; tracebacks go to the log file alone."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        with suppress(BrokenPipeError):  # nobody reads it any more: no reason to stop the work
            tqdm.write(prefix + " ".join(record.getMessage().splitlines()), file=sys.stderr)  # names may hold line ends


def log_to_console() -> None:
    """Send the toolkit's log to standard error, one line per record."""
    logger = logging.getLogger("patchcore")
    if not any(isinstance(h, _ConsoleHandler) for h in logger.handlers):
        logger.addHandler(_ConsoleHandler(logging.INFO))
    logger.setLevel(logging.DEBUG)  # details go to the log file alone
    logger.propagate = False


class _LogFileHandler(logging.FileHandler):
    """Leaves out what finds no room on the disk: the work itself says so, in one line."""

    def handleError(self, record: logging.LogRecord) -> None:  # the name that logging calls
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):  # what is still to be written
            super().close()


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Send the toolkit's log to a file as well, with times and tracebacks, while the context lasts."""
    handler = _LogFileHandler(path, encoding="utf-8", errors="surrogateescape")
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


def warn_without_gpu(device: str, found: torch.device) -> None:
    """Say in one line that `--device auto` found no GPU."""
    if device == "auto" and found.type == "cpu":
        LOGGER.warning("no CUDA device found: running on the CPU (--device cpu says so without this warning)")


def resolve_device(device: str, gpus: tuple[int, ...] = (0,), warn: bool = True) -> torch.device:
    """Turn `--device` and `--gpu` into a torch device.

    Args:
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        gpus: GPU indices typed by the user; the first is used with "auto" and "cuda".
        warn: Do what `warn_without_gpu` does; else the caller does, once nothing typed can be wrong any more.

    Returns:
        The device. "auto" without CUDA gives the CPU and one warning line.

    Raises:
        ConfigurationError: The device was asked for by name and is not there, or the name is unknown.
    """
    import torch

    index = gpus[0] if gpus else 0
    count = torch.cuda.device_count()
    if device == "auto" and count == 0:
        if warn:
            warn_without_gpu(device, torch.device("cpu"))
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


def resolve_precision(precision: str, device: torch.device) -> str:
    """Decide which numbers the frozen backbone computes with.

    "auto" is fp16 on CUDA, bf16 on a CPU with matrix tiles for it (AMX), else float32. Vector instructions for bf16
    (AVX512-BF16) do not count: without tiles, networks took 1.1 to 1.8 times as long with them as in float32.

    Args:
        precision: One of BACKBONE_PRECISIONS.
        device: Where the backbone runs.

    Returns:
        "float32", "bf16" or "fp16".

    Raises:
        ConfigurationError: torch cannot compute with these numbers on this device.
    """
    if precision == "auto":
        if device.type == "cuda":
            return "fp16"
        return "bf16" if device.type == "cpu" and _cpu_has(FAST_ON_CPU["bf16"]) else "float32"
    if precision != "float32":
        _require_precision(precision, device)
        if device.type == "cpu" and not _cpu_has(FAST_ON_CPU[precision]):
            _warn_of_slow(precision)
    return precision


@functools.cache  # every class and member asks
def _warn_of_slow(precision: str) -> None:
    LOGGER.warning(
        "--precision %s: this CPU has no matrix tiles for it and may take longer than in float32: "
        "--precision auto chooses",
        precision,
    )


def _require_precision(precision: str, device: torch.device) -> None:
    """Raise ConfigurationError unless a convolution under autocast gives such numbers on the device."""
    import torch

    wanted = getattr(torch, PRECISION_TYPES[precision])
    reason = "it computes in float32 instead"
    try:
        with warnings.catch_warnings(), torch.autocast(device.type, wanted):
            warnings.simplefilter("ignore")  # autocast warns of numbers it does not know, and goes on without
            ones = torch.ones(1, 1, 3, 3, device=device)
            if torch.nn.functional.conv2d(ones, ones).dtype == wanted:
                return
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
    raise ConfigurationError(
        f"--precision {precision}: torch {torch.__version__} cannot on {device} ({reason}): "
        "use --precision auto or float32"
    )


def _cpu_has(feature: str) -> bool:
    """Return whether the CPU has a feature as torch calls it; older versions of torch do not tell."""
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", None)
    return capabilities is not None and bool(capabilities().get(feature, False))


def available_cpus() -> int:
    """Return how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_threads(threads: int | None) -> None:
    """Settle how this process computes on the CPU: with so many threads, and memory that it keeps.

    Args:
        threads: Threads of torch's kernels; None leaves torch's own choice.
    """
    _keep_freed_memory()
    if threads is not None:
        import torch

        torch.set_num_threads(min(threads, available_cpus()))  # more would wait for one another


def _keep_freed_memory() -> None:
    """Let this process reuse what it frees instead of giving it back, where the C library is glibc.

    A network allocates and frees the same tens of megabytes with every batch. By default they go back to the system
    each time and come again page by page, which took up to a third of the time of a forward pass. Threads share one
    heap, because those of their own go back whenever they are empty, whatever the thresholds are.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        for option, value in MALLOC_OPTIONS:
            mallopt(ctypes.c_int(option), ctypes.c_int(value))


def in_threads(
    function: Callable[[T], R], items: Iterable[T], threads: int | None = None, ahead: int | None = None
) -> Iterator[R]:
    """Yield what a function gives for each item, in order, computed by threads.

    What has not begun when the caller stops, fails or is interrupted is not done.

    Args:
        function: Safe to call from several threads; worthwhile where it spends its time outside Python.
        items: What to call it with; no more of them are held than are computed ahead.
        threads: How many, >= 1; None for as many as there are cores.
        ahead: Results that are computed before they are asked for, at most; None for all.
    """
    pool = ThreadPoolExecutor(threads or available_cpus(), "in_threads")
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if ahead is not None and len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def over_threads(
    function: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Apply a function to a batch; on the CPU to parts of it at once, as `in_parts` does.

    Args:
        function: From [b, ...] to [b, ...], each row by itself; safe to call from several threads.
        batch: [B, ...], B >= 1.
        device: Where the function computes.

    Returns:
        [B, ...], in order.
    """
    import torch

    results = in_parts(function, device, batch)
    return results[0] if len(results) == 1 else torch.cat(results)


def in_parts(function: Callable[..., T], device: torch.device, *batches: torch.Tensor) -> list[T]:
    """Call a function with parts of a batch at once, one per thread of torch, with one thread each.

    That takes less time than all threads on one operation after the other, which wait for each other at the end of
    each and idle in those too small to be divided; the more so where other processes share the cores.

    Args:
        function: Gets the same rows of every batch; safe to call from several threads.
        device: Where the function computes; elsewhere than on a CPU it is called once, with everything.
        *batches: [B, ...] each, B >= 1. The parts are views: the function may write into them.

    Returns:
        What the function returned for each part, in order.
    """
    import torch

    threads = torch.get_num_threads()
    num_parts = min(threads, len(batches[0]))
    if device.type != "cpu" or num_parts == 1:
        return [function(*batches)]
    parts = zip(*(batch.tensor_split(num_parts) for batch in batches), strict=True)
    try:
        return list(_single_threads(threads).map(lambda part: function(*part), parts))
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

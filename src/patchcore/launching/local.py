"""Tasks in several processes of this machine."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from patchcore.configs import RuntimeConfig
from patchcore.launching.contract import RETRIES, Ended, Job
from patchcore.launching.worker import Reply, run_logged
from patchcore.runtime import available_cpus, resolve_device, resolve_precision, set_threads

if TYPE_CHECKING:
    import torch

LOGGER = logging.getLogger(__name__)

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


class LocalProcesses:
    """So many tasks at once, each in a process that is started anew, not forked, and takes one task after the other.

    Each process is a pool of its own: where one is lost, it is known with which task, and the others go on.

    Args:
        workers: How many, >= 2.
    """

    is_in_process = False

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._gpus: Sequence[int | None] = (None,)

    def settle(self, runtime: RuntimeConfig) -> tuple[RuntimeConfig, torch.device]:
        """Decide how a task computes: the cores are shared out unless --threads says how many each has.

        Of several --gpu each worker gets one, in turn, which it sees as GPU 0.
        """
        threads = runtime.threads or max(1, available_cpus() // self.workers)
        set_threads(threads)
        devices = [resolve_device(runtime.device, (gpu,), warn=False) for gpu in runtime.gpus[: self.workers]]
        precision = resolve_precision(runtime.precision, devices[0])
        if len(devices) > 1 and runtime.device in ("auto", "cuda") and devices[0].type == "cuda":
            self._gpus = runtime.gpus
            runtime = replace(runtime, gpus=(0,))
        return replace(runtime, threads=threads, precision=precision), devices[0]

    def require_visible(self, paths: Sequence[Path]) -> None:
        """They are: workers see what this process sees."""

    def run(self, jobs: Iterable[Job]) -> Generator[Ended, None, None]:
        waiting = iter(jobs)
        workers: list[_Worker] = []
        running: dict[Future[Reply], _Attempt] = {}

        def start_next(worker: _Worker) -> None:
            job = next(waiting, None)
            if job is not None:
                running[worker.submit(job)] = _Attempt(worker, job)

        try:
            while len(workers) < self.workers and len(running) == len(workers):  # no more than there are tasks
                workers.append(_Worker(self._gpus[len(workers) % len(self._gpus)]))
                start_next(workers[-1])
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    attempt = running.pop(future)
                    try:
                        reply = future.result()
                    except BrokenProcessPool:
                        attempt.worker.replace_process()
                        if attempt.number <= RETRIES:
                            LOGGER.warning("%s: its process was lost, done anew", attempt.job.name)
                            running[attempt.worker.submit(attempt.job)] = replace(attempt, number=attempt.number + 1)
                            continue
                        start_next(attempt.worker)
                        yield Ended(attempt.job.key, None, lost=_loss(attempt.job))
                    else:
                        start_next(attempt.worker)
                        yield Ended(attempt.job.key, reply.value, reply.messages)
        finally:
            for worker in workers:
                worker.end()


def _loss(job: Job) -> str:
    return f"its process was lost {RETRIES + 1} times, as one that the system ends for want of memory (see {job.log})"


@dataclass(frozen=True)
class _Attempt:
    worker: _Worker
    job: Job
    number: int = 1


class _Worker:
    """A process that is started with its first task, and ends with this object or with this process.

    Args:
        gpu: The only GPU that it sees; None leaves all.
    """

    def __init__(self, gpu: int | None) -> None:
        self._gpu = gpu
        self._open()

    def _open(self) -> None:
        context = multiprocessing.get_context("spawn")  # threads of torch and CUDA do not survive a fork
        # Nothing is ever sent: the end of it tells the worker that nobody waits for it, however that came about.
        self._theirs, self._lifeline = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(1, context, _begin, (self._theirs, self._gpu))

    def submit(self, job: Job) -> Future[Reply]:
        return self._pool.submit(run_logged, job)

    def replace_process(self) -> None:
        self.end()
        self._open()

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._lifeline.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._theirs.close()


def _begin(lifeline: Connection, gpu: int | None) -> None:
    """Prepare a process for tasks."""
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which nobody removes after a kill
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: who started this one ends it
    if gpu is not None:
        visible = [name for name in os.environ.get(VISIBLE_GPUS, "").split(",") if name]
        os.environ[VISIBLE_GPUS] = visible[gpu] if visible else str(gpu)
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    try:
        lifeline.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)

"""What torchrun tells each process that it starts, and how that one computes; reading it loads no torch."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace

from patchcore.configs import LaunchConfig, RuntimeConfig
from patchcore.errors import ConfigurationError
from patchcore.runtime import available_cpus

SECONDS_OF_THE_FIRST = 20.0  # to say what all processes have met, after which torchrun ends the others


@dataclass(frozen=True)
class Place:
    """Where a process stands among those that torchrun has started.

    Attributes:
        rank: Its number, from 0.
        size: How many there are.
        local_rank: Its number on this machine.
        local_size: How many there are on this machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int


def torchrun_place() -> Place | None:
    """Return the place of this process; None where it is the only one, or was not started by torchrun."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = [os.environ.get(name, "") for name in names]
    if not all(value.isascii() and value.isdigit() for value in values):
        return None
    place = Place(*map(int, values))
    return place if place.size > 1 else None


def is_follower() -> bool:
    """Return whether another process than this one speaks to the user."""
    place = torchrun_place()
    return place is not None and place.rank > 0


def leave_to_first() -> None:
    """Wait until torchrun ends this process, because the first one says what both have met.

    Returns where it does not, as with a file that is missing on this machine alone: then this process has to say it.
    """
    if is_follower():
        with suppress(KeyboardInterrupt):
            time.sleep(SECONDS_OF_THE_FIRST)


def require_one_process(command: str) -> None:
    """Raise ConfigurationError under torchrun, for a command that it does nothing for."""
    place = torchrun_place()
    if place is not None:
        raise ConfigurationError(
            f"torchrun has started {command} {place.size} times, expected run_fastflow, whose training it divides: "
            "start it once, with python; the run_... commands use several processes with --workers N or --launcher ray"
        )


def require_no_launcher(launch: LaunchConfig) -> None:
    """Raise ConfigurationError for tasks in other processes: torchrun's have all tasks together, one by one."""
    if not launch.is_in_process:
        typed = f"--workers {launch.workers}" if launch.workers is not None else f"--launcher {launch.launcher}"
        raise ConfigurationError(
            f"{typed} under torchrun, whose processes train each class together: leave {typed.split()[0]} out, or "
            "start the command with python"
        )


def own_runtime(runtime: RuntimeConfig, place: Place, num_gpus: int) -> RuntimeConfig:
    """Return how the process at a place computes: on a GPU of its own, or with its share of the cores.

    Whatever is wrong is found by every process of the machine alike.

    Args:
        runtime: What was asked for.
        place: Of the process.
        num_gpus: CUDA devices of this machine.

    Raises:
        ConfigurationError: There are fewer GPUs than processes, or one was named for all of them.
    """
    threads = runtime.threads or max(1, available_cpus() // place.local_size)
    runtime = replace(runtime, threads=threads)
    if runtime.device == "cpu" or (runtime.device == "auto" and num_gpus == 0):
        return runtime
    if runtime.device not in ("auto", "cuda"):
        raise ConfigurationError(
            f"--device {runtime.device} for {place.local_size} processes of torchrun: use cuda, which gives each a GPU "
            "of its own, or cpu"
        )
    gpus = range(place.local_size) if runtime.gpus == RuntimeConfig.gpus else runtime.gpus
    if len(gpus) < place.local_size or max(gpus) >= num_gpus:
        found = f"--gpu {' '.join(map(str, runtime.gpus))} on {num_gpus} CUDA device(s)"
        raise ConfigurationError(
            f"torchrun has started {place.local_size} processes on this machine, found {found}: give each process a "
            f"GPU of its own (--nproc_per_node {max(1, num_gpus)} without --gpu), or use --device cpu"
        )
    return replace(runtime, gpus=(gpus[place.local_rank],))

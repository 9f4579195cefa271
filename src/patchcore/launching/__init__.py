"""Where the tasks of a command run: here one by one, in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from patchcore.configs import RAY, LaunchConfig, RuntimeConfig
from patchcore.launching.contract import Ended, Executor, InThisProcess, Job, Message

__all__ = ["Ended", "Executor", "InThisProcess", "Job", "Message", "open_executor"]


@contextmanager
def open_executor(launch: LaunchConfig, runtime: RuntimeConfig) -> Iterator[Executor]:
    """Open what runs tasks, and close it when the context ends.

    Args:
        launch: Where tasks run.
        runtime: Device and threads that were asked for.

    Raises:
        ConfigurationError: It cannot be had.
    """
    if launch.launcher == RAY:
        from patchcore.launching.ray_cluster import RayCluster

        cluster = RayCluster(launch, runtime)
        try:
            yield cluster
        finally:
            cluster.close()
    elif launch.is_in_process:
        yield InThisProcess()
    else:
        from patchcore.launching.local import LocalProcesses

        yield LocalProcesses(launch.workers or 1)

"""What executes the tasks of a command: the contract, and the executor that is no more than a loop."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from patchcore.configs import RuntimeConfig
from patchcore.runtime import log_to_file, resolve_device, resolve_precision, set_threads

if TYPE_CHECKING:
    import torch

Message = tuple[int, str]
"""Level and text of something that a worker has to tell the user."""

RETRIES = 2  # of a task whose worker was lost: one that takes its worker down each time is not tried for ever


@dataclass(frozen=True)
class Job:
    """One task.

    Attributes:
        key: What the caller knows it by.
        name: What messages call it.
        log: File of its log.
        call: Does it and returns the result; picklable, result too, where it is to run in another process. What it
            raises ends the whole run, so that it returns what has gone wrong with it alone.
    """

    key: Any
    name: str
    log: Path
    call: Callable[[], Any]


@dataclass(frozen=True)
class Ended:
    """How a task has ended.

    Attributes:
        key: That of its job.
        value: What its call returned; None where it was lost.
        messages: What its worker has to tell the user.
        lost: Why there is no value, "" where there is one.
    """

    key: Any
    value: Any
    messages: Sequence[Message] = ()
    lost: str = ""


class Executor(Protocol):
    """Runs tasks that do not depend on one another.

    Attributes:
        is_in_process: Whether tasks run one after the other in this process, which shows what they log itself.
    """

    is_in_process: bool

    def settle(self, runtime: RuntimeConfig) -> tuple[RuntimeConfig, torch.device]:
        """Decide how a task computes.

        Args:
            runtime: What was asked for.

        Returns:
            The same with threads and precision decided, and the device as the task will see it.

        Raises:
            ConfigurationError: There is no such device, or it cannot compute so.
        """

    def require_visible(self, paths: Sequence[Path]) -> None:
        """Raise ConfigurationError unless the paths exist wherever a task may run."""

    def run(self, jobs: Iterable[Job]) -> Generator[Ended, None, None]:
        """Run jobs and yield each as it ends; closing the iterator hands out no more.

        What still runs then ends with the executor at the latest.

        Args:
            jobs: Taken one by one as there is room for them, as late as possible.
        """


class InThisProcess:
    """One task after the other, each when it is asked for."""

    is_in_process = True

    def settle(self, runtime: RuntimeConfig) -> tuple[RuntimeConfig, torch.device]:
        set_threads(runtime.threads)
        device = resolve_device(runtime.device, runtime.gpus, warn=False)
        return replace(runtime, precision=resolve_precision(runtime.precision, device)), device

    def require_visible(self, paths: Sequence[Path]) -> None:
        """They are: whoever asks has looked."""

    def run(self, jobs: Iterable[Job]) -> Generator[Ended, None, None]:
        for job in jobs:
            with log_to_file(job.log):
                value = job.call()
            yield Ended(job.key, value)

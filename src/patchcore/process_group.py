"""The processes that train one network together: what they tell one another, and how their gradients become one.

Each has a share of the training images. Whatever decides how the training goes on, such as a loss, is the same number
in all of them, so that they decide alike.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from patchcore.errors import ConfigurationError, DataError, ProcessLost
from patchcore.failures import is_out_of_memory, reason
from patchcore.torchrun import Place

LOGGER = logging.getLogger(__name__)

T = TypeVar("T")

Loss = Callable[[Any], torch.Tensor]
# The first process evaluates alone, for however long that takes; whether one is lost is torchrun's to see.
WAIT_AT_MOST = timedelta(days=30)
STRIDES_OF_1X1 = "Grad strides do not match bucket view strides"  # which have two spellings for 1x1 convolutions
LOST_PEER = re.compile("gloo|[Cc]onnection (was )?(closed|reset|refused)|Broken pipe|remote process exited")


class Processes:
    """One process: what every operation means where there is no other. Those of `Group` do the same among several.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are.
    """

    rank = 0
    size = 1

    @property
    def is_first(self) -> bool:
        """Whether this process speaks to the user and writes files."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return which of `count` images this process has: as many as the others have, or one more or less.

        The images of one process follow those of the process before it, and the first has no fewer than another.
        """
        bounds = [-(-count * rank // self.size) for rank in (self.rank, self.rank + 1)]
        return range(*bounds)

    def gathered(self, value: T) -> list[T]:
        """Return what each process gives, in the order of their numbers."""
        return [value]

    def from_first(self, value: T) -> T:
        """Return what the first process gives."""
        return value

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of the tensors of all processes, which have one shape."""
        return value

    def mean(self, total: torch.Tensor, count: int) -> torch.Tensor:
        """Return the mean of what all processes have, float64.

        Args:
            total: Sum of what this process has.
            count: How many that are; may be 0 here, not everywhere.
        """
        counts = torch.tensor(count, dtype=torch.float64, device=total.device)
        return self.sum(total.double()) / self.sum(counts)

    def averaging(self, parameters: Iterable[nn.Parameter], loss: Loss) -> Loss:
        """Return a loss whose backward pass leaves the mean gradient over the processes in each of them.

        All processes have to run both passes equally often. Their parameters become those of the first.

        Args:
            parameters: What is trained.
            loss: Of this process.
        """
        return loss

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait for one another at the end of the context, and raise in all processes what is raised in one.

        What all ask of one another within it has to come before anything that one may find by itself.

        Raises:
            DataError: A process has found this, or something wrong with the configuration.
        """
        yield

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Enclose what all processes do alike: where one of them fails by itself, none can go on.

        Raises:
            ProcessLost: One has failed by itself; a DataError or ConfigurationError, which all have met, goes through.
        """
        yield


ALONE = Processes()


class Group(Processes):
    """The processes of torch's default group.

    Args:
        rank: Number of this process.
        size: How many there are.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def gathered(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        box = [value if self.is_first else None]
        dist.broadcast_object_list(box, src=0)
        found: T = box[0]  # type: ignore[assignment]
        return found

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    def averaging(self, parameters: Iterable[nn.Parameter], loss: Loss) -> Loss:
        averaged: Loss = DistributedDataParallel(_LossOf(parameters, loss))
        return averaged

    @contextmanager
    def together(self) -> Iterator[None]:
        failure: DataError | ConfigurationError | None = None
        try:
            yield
        except (DataError, ConfigurationError) as error:
            failure = error
        found = self.gathered(None if failure is None else str(failure))
        messages = [message for message in found if message is not None]
        if failure is not None:
            raise failure
        if messages:
            raise DataError(messages[0])

    @contextmanager
    def in_step(self) -> Iterator[None]:
        try:
            yield
        except (DataError, ConfigurationError):
            raise
        except Exception as error:
            LOGGER.debug("a training of %d processes ends", self.size, exc_info=True)
            if LOST_PEER.search(str(error)):
                why = "another process has ended, which torchrun names: this one cannot go on without it"
                raise ProcessLost(why, is_elsewhere=True) from error
            is_mishap = is_out_of_memory(error) or isinstance(error, OSError)
            if not (self.is_first or is_mishap):
                raise  # a defect, whose traceback only the first process has a log for
            why = f"process {self.rank} of {self.size} failed: {reason(error)}"
            raise ProcessLost(why, is_elsewhere=False) from error


class _LossOf(nn.Module):
    """A loss as the forward pass of a module, as torch wants it.

    It has the parameters alone: the buffers of the network, which torch would send with each pass, do not change.

    Args:
        parameters: What the loss depends on.
        loss: The loss.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], loss: Loss) -> None:
        super().__init__()
        self.parameters_of_loss = nn.ParameterList(parameters)
        self.loss = loss

    def forward(self, batch: Any) -> torch.Tensor:
        return self.loss(batch)


@contextmanager
def open_group(place: Place, device: torch.device) -> Iterator[Group]:
    """Join the processes that torchrun has started; all but the first print nothing while the context lasts.

    Where the first leaves it without an exception, the others are told that nothing is left to do.

    Args:
        place: Of this process.
        device: Where it computes.

    Raises:
        ConfigurationError: They do not find one another.
    """
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # numbers and messages go by the CPU, gradients by the GPUs
    with contextlib.nullcontext() if place.rank == 0 else _silence():
        warnings.filterwarnings("ignore", message=STRIDES_OF_1X1)
        try:
            dist.init_process_group(backend, timeout=WAIT_AT_MOST)
        except (RuntimeError, ValueError) as error:
            raise ConfigurationError(
                f"the {place.size} processes cannot join ({' '.join(str(error).split())}): start them with torchrun, "
                "which tells them where the first is"
            ) from error
        group = Group(place.rank, place.size)
        yield group
        if group.is_first:
            group.from_first(None)
        dist.destroy_process_group()


@contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield

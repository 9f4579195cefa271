"""What a GPU computes batch by batch, on its way into arrays of the host that cannot be page-locked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

Fill = Callable[[Sequence[torch.Tensor]], object]
"""Writes into tensors float32, of which those on the host are not read before the device has come that far."""

Write = Callable[[Sequence[torch.Tensor], Fill], None]
"""From arrays float32 of the host and what fills arrays of their shapes; they hold the values once all is written."""


class Mark(Protocol):
    """A place in the work that a device has been given."""

    def synchronize(self) -> None:
        """Wait until the device has come to it."""


class StagedWrites:
    """Takes what a device computes over two page-locked slots, so that neither side waits for the other.

    A copy from a GPU into memory that the system may move, such as mapped files, blocks the host until the batch is
    computed; while the host then reads the next images, the GPU has nothing to do. Here a batch is copied into a
    slot, for which nobody waits. The host gives the GPU the next batch first, and only then empties the slot into the
    arrays, after the mark that the GPU sets behind its copy.

    The slots are made with the first batch, each of its size: 4 bytes for each number that it writes, which torch
    rounds up to a power of two. They lie outside of any budget.

    Args:
        mark: Sets a mark behind everything that the device was asked for so far.
        page_locked: Returns memory float32 [n] of the host that the device writes by itself.
    """

    def __init__(self, mark: Callable[[], Mark], page_locked: Callable[[int], torch.Tensor]) -> None:
        self._mark = mark
        self._free, self._full = _Slot(page_locked), _Slot(page_locked)

    def write(self, arrays: Sequence[torch.Tensor], fill: Fill) -> None:
        """Let a batch be computed, and meanwhile write the one before.

        Args:
            arrays: Where the batch goes, float32; complete once the next call or `finish` has returned.
            fill: Copies the batch into tensors of the same shapes, without waiting for the device.
        """
        slot = self._free
        fill(slot.rooms_for(arrays))
        slot.filled_at(self._mark())
        self._full.empty()
        self._free, self._full = self._full, slot

    def finish(self) -> None:
        """Write what is still in a slot."""
        self._full.empty()


class _Slot:
    """Page-locked memory for one batch, and where that is to go."""

    def __init__(self, page_locked: Callable[[int], torch.Tensor]) -> None:
        self._page_locked = page_locked
        self._memory: torch.Tensor | None = None
        self._arrays: Sequence[torch.Tensor] = ()
        self._rooms: list[torch.Tensor] = []
        self._mark: Mark | None = None

    def rooms_for(self, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return parts of the memory in the shapes of the arrays; the slot must be empty."""
        sizes = [array.numel() for array in arrays]
        if self._memory is None or len(self._memory) < sum(sizes):
            self._memory = self._page_locked(sum(sizes))
        parts = self._memory[: sum(sizes)].split(sizes)
        self._arrays = arrays
        self._rooms = [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
        return self._rooms

    def filled_at(self, mark: Mark) -> None:
        """Note behind which mark the device has filled the slot."""
        self._mark = mark

    def empty(self) -> None:
        """Write into the arrays what the device has put here, once it has; nothing to do for an empty slot."""
        if self._mark is None:
            return
        self._mark.synchronize()
        for array, room in zip(self._arrays, self._rooms, strict=True):
            array.copy_(room)
        self._mark, self._arrays, self._rooms = None, (), []


@contextmanager
def writes_from(device: torch.device) -> Iterator[Write]:
    """Give what writes results of a device into arrays of the host; they are complete when the context ends.

    On CUDA they are staged. Elsewhere they are written at once, without a further copy.

    Where an exception ends the context, what is still in a slot is dropped: nobody may use the arrays then, and to
    wait for a device that has failed would hide why. Memory that the device still writes to is kept by torch until it
    has.
    """
    if device.type != "cuda":
        yield _write_at_once
        return
    staged = StagedWrites(lambda: _mark_on(device), _page_locked)
    yield staged.write
    staged.finish()  # not where an exception comes out of the line above


def _write_at_once(arrays: Sequence[torch.Tensor], fill: Fill) -> None:
    fill(arrays)


def _mark_on(device: torch.device) -> Mark:
    """Set a mark on the device's own stream, which is not that of the current device where there are several."""
    event = torch.cuda.Event(blocking=True)  # who waits leaves the core to the threads that read images
    event.record(torch.cuda.current_stream(device))
    return event


def _page_locked(num_values: int) -> torch.Tensor:
    return torch.empty(num_values, dtype=torch.float32, pin_memory=True)

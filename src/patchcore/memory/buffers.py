"""Arrays that grow with the number of images: in memory up to a budget, beyond it in files without a name."""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
import tempfile
import weakref
from pathlib import Path

import torch

from patchcore.errors import DataError

FLOAT_BYTES = 4


class Buffers:
    """Makes float32 arrays, each in memory if the budget still holds it whole, else in a memory-mapped file.

    The files have no name, so that nothing is left of them however the process ends, and their space on the disk
    is claimed before they are used: a write into a mapping that finds the disk full would kill the process.

    Both kinds begin at a page boundary. Matrix products round by how their operands are aligned, and so what is
    computed from the arrays does not depend on the budget.
    """

    def __init__(self, budget_bytes: int | None = None, folder: Path | None = None) -> None:
        """Store the limit.

        Args:
            budget_bytes: What all arrays in memory may take together; None for no limit.
            folder: Where the files are, on a disk: a folder in memory would save none. None: that of `tempfile`.
        """
        self.budget_bytes = budget_bytes
        self.folder = folder if folder is not None else Path(tempfile.gettempdir())
        self.held_bytes = 0

    def empty(self, *shape: int) -> torch.Tensor:
        """Return an array float32 of this shape, all 0; its space is given back when the last view of it is gone.

        Raises:
            DataError: There is not enough memory, or the array has to go to a file and the disk has no room for it.
        """
        num_bytes = math.prod(shape) * FLOAT_BYTES
        if num_bytes == 0:  # which cannot be mapped
            return torch.empty(shape)
        if self.budget_bytes is None or self.held_bytes + num_bytes <= self.budget_bytes:
            memory = _anonymous(num_bytes)
            self.held_bytes += num_bytes
            weakref.finalize(memory, self._give_back, num_bytes).atexit = False
        else:
            memory = _mapped_file(num_bytes, self.folder)
        return torch.frombuffer(memory, dtype=torch.float32).view(shape)

    def _give_back(self, num_bytes: int) -> None:
        self.held_bytes -= num_bytes


def _anonymous(num_bytes: int) -> mmap.mmap:
    """Map memory."""
    try:
        return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise DataError(
            f"features need {num_bytes / 1e6:.0f} MB more memory than there is: type a --memory_budget above which "
            "they go to files, or give fewer images (--limit_train)"
        ) from error


def _mapped_file(num_bytes: int, folder: Path) -> mmap.mmap:
    """Map a new file without a name, whose blocks are there."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:  # asked first: the attempt would fill the disk for a moment, also for other programs
        raise _no_room(num_bytes, free, folder)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            else:
                file.truncate(num_bytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise _no_room(num_bytes, free, folder) from error
            raise
        return mmap.mmap(file.fileno(), num_bytes)


def _no_room(num_bytes: int, free: int, folder: Path) -> DataError:
    return DataError(
        f"features above --memory_budget need a file of {num_bytes / 1e6:.0f} MB, found {free / 1e6:.0f} MB free "
        f"for it in {str(folder)!r}: free some space there, write the results to a larger disk, or raise the budget"
    )

"""What a machine runs out of while it works: recognised from the error, and said in one line with the remedy."""

from __future__ import annotations

import errno
import os
import re

OUT_OF_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory|ALLOC_FAILED|bad_alloc")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory of the CPU or the GPU did not suffice, which fewer images at a time may mend."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


def reason(error: BaseException) -> str:
    """Return why a class failed, in one line: what the machine lacks and the remedy, or the error itself."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if is_out_of_memory(error):
        return (
            f"out of memory ({text}): use --memory_budget (PatchCore), a smaller --imagesize or sampler -p, or fewer "
            "images (--limit_train)"
        )
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        place = f" at {os.fsdecode(error.filename)}" if isinstance(error.filename, (str, bytes)) else ""
        return f"no room on the disk{place} ({error.strerror}): make room, then go on with --skip_existing"
    return text

"""Tasks for worker processes that import next to nothing, so that the processes start at once."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path


def own_process() -> int:
    return os.getpid()


def talk(warning: str) -> str:
    print("to standard output")
    os.write(2, b"from another language\n")
    logging.getLogger("patchcore.any").info("a detail")
    logging.getLogger("patchcore.any").warning("%s", warning)
    return "said"


def die_until(marker: Path, times: int) -> str:
    """Kill the process that this runs in, until it has been called more often than `times`."""
    with marker.open("a") as file:
        file.write("x")
    if len(marker.read_text()) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


def raise_error() -> None:
    raise ZeroDivisionError("a defect")

"""What a worker process does with a task: everything that it prints and logs goes to a file, warnings to the user."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchcore.launching.contract import Job, Message
from patchcore.runtime import log_to_file

STANDARD_STREAMS = (1, 2)


@dataclass(frozen=True)
class Reply:
    """What a worker sends back: the value of the call, and the warnings that were logged on the way."""

    value: Any
    messages: list[Message]


class _Warnings(logging.Handler):
    """Keeps what is worth the user's attention."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[Message] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append((record.levelno, record.getMessage()))


def run_logged(job: Job) -> Reply:
    """Run a task with its output, bars included, in its log."""
    logger = logging.getLogger("patchcore")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False  # a worker has no terminal of its own
    warnings = _Warnings()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    logger.addHandler(warnings)
    try:
        with _output_to(job.log), log_to_file(job.log):
            return Reply(job.call(), warnings.messages)
    finally:
        logger.removeHandler(warnings)


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Append to a file what this process prints, libraries in other languages included, while the context lasts."""
    with path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1) as file:
        kept = [os.dup(stream) for stream in STANDARD_STREAMS]
        try:
            for stream in STANDARD_STREAMS:
                os.dup2(file.fileno(), stream)
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            for stream, own in zip(STANDARD_STREAMS, kept, strict=True):
                os.dup2(own, stream)
                os.close(own)

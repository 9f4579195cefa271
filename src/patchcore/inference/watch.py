"""A stored model on files as they land, each once, also if the call is ended and started again.

A file is scored once its size and time have not changed for a while and it can be read: what is still being written
waits. The state is one line of JSON per image, added after its outputs are written; the table follows from it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from patchcore.configs import require_positive
from patchcore.errors import ConfigurationError
from patchcore.inference.inputs import InputFile, find_inputs
from patchcore.inference.outputs import OutputNames, table_row
from patchcore.inference.run import STATE, TABLE, PredictionJob, Recorder, Tally, opened_recorder, report
from patchcore.storage.files import csv_line, write_bytes, write_csv

LOGGER = logging.getLogger(__name__)

SETTLED_SECONDS = 0.5  # without a change of size or time: who copies a file writes more often than that
POLL_SECONDS = 0.25
RETRY_SECONDS = 2.0  # between attempts at a file that cannot be read yet
PATIENCE_SECONDS = 30.0
SCANS_SHARE = 5  # a scan of many files is followed by a pause of so many times its length

Version = tuple[int, int]
"""Size in bytes and time of the last change, ns: a file that is replaced has another."""


class WatchState:
    """Which versions of which files are done, and their records, in files that a restart takes up.

    Args:
        out: Folder of the outputs.
        job: What the results depend on; a state of other results is refused.

    Raises:
        ConfigurationError: The folder holds results of another kind, or the state is damaged.
    """

    def __init__(self, out: Path, job: PredictionJob) -> None:
        self.job = job
        self._origin = _origin(job)  # once: the model's folder may hold another one by the time this one ends
        self._done: dict[str, Version] = {}
        self._names: list[str] = []
        self._state_path, self._table_path = out / STATE, out / TABLE
        if not self._state_path.exists() or not self._state_path.stat().st_size:  # a power cut may leave it empty
            if self._table_path.exists():
                raise ConfigurationError(
                    f"{str(self._table_path)!r} is of another call: choose another --out for --watch"
                )
            write_bytes(self._state_path, json.dumps(self._origin).encode("ascii") + b"\n")
        self._take_up()
        # Without buffers: a line is in the file whole or not at all when Ctrl-C comes.
        self._state = self._state_path.open("ab", buffering=0)
        self._table = self._table_path.open("ab", buffering=0)

    def __enter__(self) -> WatchState:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._state.close()
        self._table.close()
        self._take_up()  # Ctrl-C may have come between a line of the state and its row

    @property
    def names(self) -> list[str]:
        """Names of outputs that are in use."""
        return self._names

    def __len__(self) -> int:
        return len(self._done)

    def is_done(self, file: InputFile, version: Version) -> bool:
        """Return whether this version of a file has its record."""
        return self._done.get(file.key) == version

    def add(self, file: InputFile, version: Version, name: str, told: dict[str, Any]) -> None:
        """Write down that a file is done."""
        line = json.dumps({"file": file.key, "version": version, "name": name, "record": told})
        self._state.write(line.encode("ascii") + b"\n")
        os.fsync(self._state.fileno())
        self._table.write(csv_line(table_row(told, self.job.choice)).encode("utf-8", "surrogateescape"))
        self._done[file.key] = version

    def _take_up(self) -> None:
        """Read the state, drop a line that was cut off, and write the table anew: it may lack a row, or half of one."""
        content = self._state_path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with self._state_path.open("r+b") as file:
                file.truncate(len(whole))
        lines = iter(whole.splitlines())
        try:
            origin = json.loads(next(lines, b"null"))
            if origin != self._origin:
                raise ConfigurationError(
                    f"{str(self._state_path)!r} is of another model, --roi, --mm_per_px, --resize or --precision: "
                    "choose another --out"
                )
            write_csv(self._table_path, self.job.choice.columns, self._rows(lines))
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(
                f"{str(self._state_path)!r} is damaged ({error}): choose another --out, or remove it to score all anew"
            ) from error

    def _rows(self, lines: Iterator[bytes]) -> Iterator[list[str]]:
        """Take over each line of the state, and yield its row of the table."""
        for line in lines:
            entry = json.loads(line)
            size, changed = entry["version"]
            self._done[entry["file"]] = (size, changed)
            if entry["name"]:
                self._names.append(entry["name"])
            yield table_row(entry["record"], self.job.choice)


def _origin(job: PredictionJob) -> dict[str, Any]:
    """Return what tells results that belong into one table from others."""
    model = sorted(job.model.iterdir()) if job.model.is_dir() else [job.model]
    roi = _digest([job.roi]) if job.roi is not None else None
    return {
        "state_version": 1,
        "model": _digest(model),
        "roi": roi,
        "mm_per_px": job.choice.mm_per_px,
        "resize_px": job.resize_px,
        "precision": job.runtime.precision,
    }


def _digest(files: Iterable[Path]) -> str:
    """Return the SHA-256 of the contents of files, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        if path.is_file():
            with path.open("rb") as file:
                while chunk := file.read(2**20):
                    digest.update(chunk)
    return digest.hexdigest()


@dataclass
class _Waiting:
    """A file that is not done: its version, since when it has been that, and when it can be tried."""

    version: Version
    since: float
    not_before: float


class _Landing:
    """Tells which files have landed.

    Args:
        state: What is done.
        patience: Seconds after which a file that cannot be read counts as broken.
    """

    def __init__(self, state: WatchState, patience: float) -> None:
        self.state = state
        self.patience = patience
        self._waiting: dict[str, _Waiting] = {}

    def landed(self, files: Iterator[InputFile]) -> dict[str, tuple[InputFile, Version]]:
        """Return what can be tried now, by key."""
        now, found = time.monotonic(), {}
        still_there: dict[str, _Waiting] = {}
        for file in files:
            version = _version(file)
            if version is None or self.state.is_done(file, version):
                continue
            waiting = self._waiting.get(file.key)
            if waiting is None or waiting.version != version:
                waiting = _Waiting(version, now, now + SETTLED_SECONDS)
            still_there[file.key] = waiting
            if now >= waiting.not_before:
                found[file.key] = (file, version)
        self._waiting = still_there
        return found

    def is_settled(self, file: InputFile, version: Version, told: dict[str, Any]) -> bool:
        """Return whether a record stands: the file has not changed meanwhile, and is not one that may yet be whole."""
        if _version(file) != version:
            return False
        waiting, now = self._waiting[file.key], time.monotonic()
        if told["error"] is not None and now - waiting.since < self.patience:
            waiting.not_before = now + min(RETRY_SECONDS, self.patience)
            return False
        del self._waiting[file.key]
        return True


def _version(file: InputFile) -> Version | None:
    try:
        status = os.stat(file.path)
    except OSError:  # gone again
        return None
    return status.st_size, status.st_mtime_ns


def watch_files(
    job: PredictionJob,
    announce: Callable[[str], None],
    tell: Callable[[str], None] | None,
    patience: float = PATIENCE_SECONDS,
) -> Tally:
    """Score files as they land, until Ctrl-C.

    Args:
        job: What to score with what; `out` is needed.
        announce: Receives lines for a person.
        tell: Receives one line of JSON per image; None where nobody asked.
        patience: Seconds after which a file that cannot be read gets its record with an error.

    Returns:
        What was scored in this call.

    Raises:
        ConfigurationError: Wrong arguments, found before any image is scored.
    """
    require_positive("--patience", patience)
    if not job.launch.is_in_process:
        raise ConfigurationError(
            f"--watch with --launcher {job.launch.launcher}: files are scored here as they land: leave one of them out"
        )
    if job.out is None:
        raise ConfigurationError("--watch keeps its state in the folder of the outputs: type --out")
    tally = Tally()
    with (
        _ended_by_sigterm(),
        opened_recorder(job, announce, watching=True) as recorder,
        WatchState(job.out, job) as state,
    ):
        recorder.names = OutputNames(state.names)
        before = f", {len(state)} files were done before" if len(state) else ""
        announce(f"watching {', '.join(job.inputs)} - Ctrl-C ends it{before}")
        try:
            _watch(recorder, state, _Landing(state, patience), tally, tell)
        except KeyboardInterrupt:
            announce(f"ended: {tally}: {job.out / TABLE}")
    return tally


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Take SIGTERM, by which services are ended, for Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _watch(
    recorder: Recorder, state: WatchState, landing: _Landing, tally: Tally, tell: Callable[[str], None] | None
) -> None:
    job = recorder.job
    while True:
        started = time.monotonic()
        landed = landing.landed(find_inputs(job.inputs, job.out))
        scan_seconds = time.monotonic() - started
        for file, name, told in recorder.records([file for file, _ in landed.values()]):
            version = landed[file.key][1]
            if not landing.is_settled(file, version, told):
                recorder.names.release(name)
                continue
            report(told, tell)  # first: a call that is killed in between tells it again, rather than never
            state.add(file, version, name, told)
            tally.count(told)
        time.sleep(max(POLL_SECONDS, SCANS_SHARE * scan_seconds))

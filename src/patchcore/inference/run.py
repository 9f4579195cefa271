"""A stored model on files: one record for each, the files that go with it, and a table of all."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from patchcore.configs import LaunchConfig, RuntimeConfig
from patchcore.errors import ConfigurationError
from patchcore.inference.detector import BATCH_SIZE, LoadedDetector, Outcome, RegionOfInterest, load_with
from patchcore.inference.inputs import InputFile, find_inputs, require_inputs
from patchcore.inference.outputs import (
    MAPS,
    MASKS,
    OVERLAYS,
    OutputChoice,
    OutputNames,
    failure_record,
    record,
    table_row,
    write_outputs,
)
from patchcore.runtime import progress
from patchcore.storage.files import UNFINISHED, csv_line, escaped, remove_unfinished
from patchcore.storage.folder_lock import FolderInUseError, locked
from patchcore.storage.run_folder import require_output_folder

LOGGER = logging.getLogger(__name__)

TABLE = "predictions.csv"
STATE = "watch_state.jsonl"

FileRecord = tuple[InputFile, str, dict[str, Any]]
"""A file, the name of its outputs, "" where there are none, and its record."""


@dataclass(frozen=True)
class PredictionJob:
    """What to score with what, and what to leave of it.

    Attributes:
        model: A model folder, or the export of a model.
        inputs: Files, folders and globs.
        out: Folder of the outputs; None writes none.
        choice: Which outputs.
        roi: Mask of what counts in every image; None for everything.
        runtime: How the machine computes.
        batch_size: Images that the model takes at once.
        num_workers: Threads that read images and write outputs; None for one per CPU core.
        needs_decision: Whether a model without thresholds is an error.
        resize_px: The model's resize, which folders of the original PatchCore do not store; None for what is stored.
        launch: Where images are scored.
    """

    model: Path
    inputs: tuple[str, ...]
    out: Path | None
    choice: OutputChoice = field(default_factory=OutputChoice)
    roi: Path | None = None
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    batch_size: int = BATCH_SIZE
    num_workers: int | None = None
    needs_decision: bool = False
    resize_px: int | None = None
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        self.launch.require_machine(self.runtime.device, self.runtime.gpus, self.runtime.threads)


@dataclass(frozen=True)
class ModelAbilities:
    """What a model can say of an image.

    Attributes:
        method: Its method.
        has_thresholds: Whether it decides.
        has_maps: Whether it locates what it finds.
    """

    method: str
    has_thresholds: bool
    has_maps: bool

    @classmethod
    def of(cls, loaded: LoadedDetector) -> ModelAbilities:
        return cls(loaded.detector.method, loaded.has_thresholds, loaded.has_maps)


@dataclass
class Tally:
    """How many images were scored, called anomalous, and could not be scored."""

    scored: int = 0
    anomalous: int = 0
    failed: int = 0

    def count(self, told: dict[str, Any]) -> None:
        """Count one record."""
        if told["error"] is not None:
            self.failed += 1
        else:
            self.scored += 1
            self.anomalous += told["decision"] == 1

    def __str__(self) -> str:
        failed = f", {self.failed} not scored (column error)" if self.failed else ""
        return f"{self.scored} images scored, {self.anomalous} anomalous{failed}"


class Records(Protocol):
    """Scores files and writes what is left of each."""

    def records(self, files: Sequence[InputFile]) -> Generator[FileRecord, None, None]:
        """Score files; in order, and the outputs of each are written before its record is yielded."""


class Recorder:
    """Scores files in this process.

    Args:
        job: What to leave.
        loaded: The model.
        region: What counts in every image.
        pool: Threads that read images and write outputs.
        names: Names of outputs.
    """

    def __init__(
        self,
        job: PredictionJob,
        loaded: LoadedDetector,
        region: RegionOfInterest | None,
        pool: ThreadPoolExecutor,
        names: OutputNames,
    ) -> None:
        self.job = job
        self.loaded = loaded
        self.region = region
        self.pool = pool
        self.names = names
        calibration = loaded.detector.calibration_
        self._scale = calibration.pixel if calibration else None

    def records(self, files: Sequence[InputFile]) -> Generator[FileRecord, None, None]:
        started: deque[InputFile] = deque()
        writing: deque[tuple[InputFile, str, Future[dict[str, Any]]]] = deque()

        def paths() -> Iterator[Path]:
            for file in files:
                started.append(file)
                yield file.path

        backlog = self.loaded.batch_size + 2 * self.loaded.num_workers  # bounds the images that are held
        for outcome in self.loaded.stream(paths(), self.region, self.pool):
            file = started.popleft()
            name = self.names.claim(file.label) if outcome.result is not None else ""
            writing.append((file, name, self.pool.submit(self._record, file, name, outcome)))
            while len(writing) > backlog:
                yield _finished(*writing.popleft())
        while writing:
            yield _finished(*writing.popleft())

    def _record(self, file: InputFile, name: str, outcome: Outcome) -> dict[str, Any]:
        """Write the outputs of one image, and return its record."""
        if outcome.result is None:
            return failure_record(file.path, str(outcome.error))
        findings = outcome.result.findings()
        files: dict[str, str] = {}
        if self.job.out is not None and findings is not None:
            files = write_outputs(
                self.job.out, name, outcome.image, outcome.result, findings, self.job.choice, self._scale
            )
        return record(file.path, outcome.result, findings, self.job.choice, files)


def _finished(file: InputFile, name: str, future: Future[dict[str, Any]]) -> FileRecord:
    try:
        return file, name, future.result()
    except MemoryError:  # maps and pictures are of the size of the image, however little of it the model sees
        return file, name, failure_record(file.path, "out of memory for the outputs of this image: end other programs")


@contextmanager
def opened_recorder(job: PredictionJob, announce: Callable[[str], None], watching: bool) -> Iterator[Recorder]:
    """Check the arguments, load the model, and keep the folder of the outputs for this call alone.

    Args:
        job: What to score with what.
        announce: Receives what a user should know of the model.
        watching: Whether images may still be to come.

    Raises:
        ConfigurationError: Wrong arguments, found before any image is scored.
    """
    require_places(job, watching)
    loaded, region = open_model(job)
    say_what_is_missing(job, ModelAbilities.of(loaded), announce)
    with kept_for_this_call(job.out), loaded.workers() as pool:
        remove_unfinished_outputs(job.out)
        yield Recorder(job, loaded, region, pool, OutputNames())


def require_places(job: PredictionJob, watching: bool) -> None:
    """Raise ConfigurationError unless there are images, or may yet be, and the outputs can be written."""
    require_inputs(job.inputs, job.out, may_be_empty=watching)
    if job.out is not None:
        require_output_folder(job.out)


def open_model(job: PredictionJob) -> tuple[LoadedDetector, RegionOfInterest | None]:
    """Load the model, and read what counts in every image."""
    loaded = load_with(job.model, job.runtime, job.batch_size, job.num_workers, job.resize_px)
    return loaded, loaded.region(job.roi)


def say_what_is_missing(job: PredictionJob, model: ModelAbilities, announce: Callable[[str], None]) -> None:
    """Tell what this model cannot say of an image; raise ConfigurationError if it was asked for."""
    if not model.has_thresholds:
        if job.needs_decision:
            raise ConfigurationError(
                f"model {str(job.model)!r} was stored without calibration, so that nothing is a defect to "
                "--fail_on_defect: train it with --calibration kfold, or leave the option out"
            )
        announce("the model was stored without calibration: no decisions, masks and contours, raw scores alone")
    if not model.has_maps:
        announce(f"method {model.method} has no anomaly maps: no areas, boxes, overlays, masks and heat maps")


@contextmanager
def kept_for_this_call(out: Path | None) -> Iterator[None]:
    """Make the folder of the outputs, and keep other calls out of it."""
    if out is None:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as locks:
        try:
            locks.enter_context(locked(out))
        except FolderInUseError as error:
            raise ConfigurationError(
                f"--out {str(out)!r} is in use by another call: wait for its end, or choose another folder"
            ) from error
        yield


def remove_unfinished_outputs(out: Path | None) -> None:
    """Remove what a killed process has left; not all below the folder, which may be one that the user works in."""
    if out is None:
        return
    for path in out.glob(".*" + UNFINISHED):
        if path.is_file():
            path.unlink(missing_ok=True)
    for name in (OVERLAYS, MASKS, MAPS):
        remove_unfinished(out / name)


def predict_files(job: PredictionJob, announce: Callable[[str], None], tell: Callable[[str], None] | None) -> Tally:
    """Score files, and write the table of all once all are done.

    Args:
        job: What to score with what.
        announce: Receives lines for a person.
        tell: Receives one line of JSON per image; None where nobody asked.

    Raises:
        ConfigurationError: Wrong arguments, found before any image is scored.
    """
    if job.out is not None and (job.out / STATE).exists():
        raise ConfigurationError(
            f"--out {str(job.out)!r} holds the results of a watched folder: choose another, or go on with --watch"
        )
    tally = Tally()
    with _opened(job, announce) as recorder:
        if job.out is not None:  # an older table would stand beside the pictures of this call if it were ended
            (job.out / TABLE).unlink(missing_ok=True)
        files = list(find_inputs(job.inputs, job.out))
        with _table(job) as add, closing(recorder.records(files)) as records:
            for _, _, told in progress(records, "images", total=len(files)):
                tally.count(told)
                report(told, tell)
                add(table_row(told, job.choice))
    where = f": {job.out / TABLE}" if job.out is not None else ""
    announce(f"{tally}{where}")
    return tally


def _opened(job: PredictionJob, announce: Callable[[str], None]) -> AbstractContextManager[Records]:
    """Return what scores the files: this process, or others."""
    if job.launch.is_in_process:
        return opened_recorder(job, announce, watching=False)
    from patchcore.inference.distributed import opened_workers

    return opened_workers(job, announce)


def report(told: dict[str, Any], tell: Callable[[str], None] | None) -> None:
    """Say what is wrong with a file, and hand its record to who asked for it."""
    if told["error"] is not None:
        LOGGER.warning("%s: %s", " ".join(str(told["path"]).split()), told["error"])
    if tell is not None:
        tell(json.dumps(escaped(told), ensure_ascii=False, allow_nan=False))


@contextmanager
def _table(job: PredictionJob) -> Iterator[Callable[[Sequence[str]], None]]:
    """Give what adds a row to the table, which gets its name once it is whole; the rows are not held in memory."""
    if job.out is None:
        yield lambda row: None
        return
    handle, temporary = tempfile.mkstemp(dir=job.out, prefix=".", suffix=UNFINISHED)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            file.write(csv_line(job.choice.columns))

            def add(row: Sequence[str]) -> None:
                file.write(csv_line(row))

            yield add
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, job.out / TABLE)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

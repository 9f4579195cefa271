"""A stored model on files, by workers: each scores some batches at a time, and the records come back in order.

What is left is what one process leaves, byte for byte at equal threads: batches are cut at the same places, and the
names of outputs are decided here, in the order of the files.
"""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patchcore.configs import LaunchConfig
from patchcore.errors import ConfigurationError
from patchcore.inference.detector import LoadedDetector, RegionOfInterest
from patchcore.inference.inputs import InputFile, input_places
from patchcore.inference.outputs import OutputNames, failure_record, output_files
from patchcore.inference.run import (
    FileRecord,
    ModelAbilities,
    PredictionJob,
    Recorder,
    kept_for_this_call,
    open_model,
    remove_unfinished_outputs,
    require_places,
    say_what_is_missing,
)
from patchcore.launching import Ended, Executor, Job, Message, open_executor
from patchcore.runtime import warn_without_gpu
from patchcore.storage.run_folder import write_probe

LOGGER = logging.getLogger(__name__)

MAX_BATCHES = 16  # of a task: as much is done anew where a worker is lost, and comes back at once
MIN_TASKS = 32  # where there are so many batches: workers of different speed shall end together
LOGS = "logs"

Told = tuple[str, dict[str, Any]]
"""The name that the outputs of an image were written under, "" where there are none, and its record."""


def task_size(num_images: int, batch_size: int) -> int:
    """Return how many images a task has: whole batches, so that no batch differs from those of one process."""
    num_batches = -(-num_images // batch_size)
    return batch_size * max(1, min(MAX_BATCHES, num_batches // MIN_TASKS))


def in_order(ended: Iterable[Ended]) -> Iterator[Ended]:
    """Yield tasks that have ended by their keys 0, 1, 2, ..., each as soon as all before it are there."""
    waiting: dict[int, Ended] = {}
    number = 0
    for end in ended:
        waiting[end.key] = end
        while number in waiting:
            yield waiting.pop(number)
            number += 1


# ---------------------------------------------------------------- in a worker


@functools.lru_cache(maxsize=1)  # a worker does many tasks with one model
def _model(job: PredictionJob) -> tuple[LoadedDetector, RegionOfInterest | None]:
    return open_model(job)


@contextmanager
def _working_in(folder: Path | None) -> Iterator[None]:
    """Work in a folder, so that relative paths are found, and messages name them as they were typed."""
    if folder is None:
        yield
        return
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class _GivenNames(OutputNames):
    """Names that were decided elsewhere and came as labels."""

    def claim(self, label: str) -> str:
        return label


@dataclass(frozen=True)
class _Task:
    """What every task of a prediction has.

    Attributes:
        job: What to score with what, as the workers compute.
        folder: Where its relative paths begin; None if it has none.
        log: File of the task's log, which is of use only where the worker is lost.
    """

    job: PredictionJob
    folder: Path | None
    log: Path

    @contextmanager
    def _opened(self) -> Iterator[tuple[LoadedDetector, RegionOfInterest | None]]:
        with _working_in(self.folder):
            yield _model(self.job)
        self.log.unlink(missing_ok=True)


@dataclass(frozen=True)
class OpenModel(_Task):
    """Opens the model as every worker will, and says what it can."""

    def __call__(self) -> ModelAbilities:
        with self._opened() as (loaded, _):
            return ModelAbilities.of(loaded)


@dataclass(frozen=True)
class ScoreImages(_Task):
    """Scores images and writes their outputs.

    Attributes:
        files: The images, with the names of their outputs for labels.
    """

    files: tuple[InputFile, ...]

    def __call__(self) -> list[Told]:
        with self._opened() as (loaded, region), loaded.workers() as pool:
            recorder = Recorder(self.job, loaded, region, pool, _GivenNames())
            return [(name, told) for _, name, told in recorder.records(self.files)]


# ---------------------------------------------------------------- in the process of the command


class DistributedRecorder:
    """Hands images out to workers.

    Outputs are written under the names that they have if every image can be scored. An image that cannot takes none, so
    that one process would have given its name to the next image of that name: such outputs get that name afterwards.
    None is in use then, because a name that comes earlier than the expected one was expected by an earlier image.

    Args:
        job: What to score with what, as the workers compute.
        executor: Runs tasks.
        folder: Where relative paths of the job begin; None if it has none.
    """

    def __init__(self, job: PredictionJob, executor: Executor, folder: Path | None) -> None:
        self.job = job
        self._executor = executor
        self._folder = folder
        self._said: set[Message] = set()
        self._handed_out: dict[int, ScoreImages] = {}

    def open_model(self) -> ModelAbilities:
        """Open the model in a worker.

        Raises:
            ConfigurationError: It cannot be opened, or the region of interest is none.
        """
        log = self._log("model", None)
        job = Job("model", f"model {str(self.job.model)!r}", log, OpenModel(self.job, self._folder, log))
        (ended,) = self._executor.run([job])
        self._say(ended.messages)
        if ended.lost:
            raise ConfigurationError(f"{job.name} cannot be opened: {ended.lost}")
        abilities: ModelAbilities = ended.value
        return abilities

    def records(self, files: Sequence[InputFile]) -> Generator[FileRecord, None, None]:
        names, size = OutputNames(), task_size(len(files), self.job.batch_size)
        with closing(self._executor.run(self._jobs(files, size))) as ended:
            for end in in_order(ended):
                self._say(end.messages)
                task = self._handed_out.pop(end.key)
                results = self._lost(task.files, end.lost) if end.lost else end.value
                part = files[end.key * size : (end.key + 1) * size]
                for file, (written, told) in zip(part, results, strict=True):
                    name = names.claim(file.label) if written else ""
                    yield file, name, told if name == written else self._renamed(written, name, told)

    def remove_unfinished_logs(self) -> None:
        """Remove the logs of tasks that have ended with this command; no worker may be at work any more."""
        for task in self._handed_out.values():
            task.log.unlink(missing_ok=True)

    def _jobs(self, files: Sequence[InputFile], size: int) -> Iterator[Job]:
        """Yield the tasks, and enter each under its number as it is handed out."""
        expected = OutputNames()
        for number, first in enumerate(range(0, len(files), size)):
            part = files[first : first + size]
            log = self._log(f"images_{first + 1}", self.job.out)
            named = tuple(InputFile(file.path, expected.claim(file.label)) for file in part)
            task = self._handed_out[number] = ScoreImages(self.job, self._folder, log, named)
            yield Job(number, f"images {first + 1} to {first + len(part)}", log, task)

    def _lost(self, files: Sequence[InputFile], why: str) -> list[Told]:
        """Return what is told of images whose task is lost for good, and remove what it has written."""
        for file in files:
            for place in self._outputs(file.label).values():
                place.unlink(missing_ok=True)
        return [("", failure_record(file.path, f"not scored: {why}")) for file in files]

    def _renamed(self, written: str, name: str, told: dict[str, Any]) -> dict[str, Any]:
        """Give the outputs of an image another name, and return its record with that."""
        places = self._outputs(name)
        for kind, place in self._outputs(written).items():
            with suppress(FileNotFoundError):  # methods without maps have none
                os.replace(place, places[kind])
        renamed = {kind: place for kind, place in output_files(name, self.job.choice).items() if told[kind]}
        return {**told, **renamed}

    def _outputs(self, name: str) -> dict[str, Path]:
        """Return the files that the outputs of a name may have."""
        out = self.job.out
        return {} if out is None else {kind: out / place for kind, place in output_files(name, self.job.choice).items()}

    def _say(self, messages: Sequence[Message]) -> None:
        """Log what workers have to tell the user, once although each of them opens the model."""
        for level, text in messages:
            if (level, text) not in self._said:
                self._said.add((level, text))
                LOGGER.log(level, "%s", text)

    def _log(self, name: str, out: Path | None) -> Path:
        """Return where the worker of a task logs: in the folder of the outputs, or on the node that it runs on."""
        if out is not None:
            return Path(os.path.abspath(out)) / LOGS / f"{name}.log"
        return Path(tempfile.gettempdir()) / f"patchcore_predict_{os.getpid()}_{name}.log"


@contextmanager
def opened_workers(job: PredictionJob, announce: Callable[[str], None]) -> Iterator[DistributedRecorder]:
    """Check the arguments, here and wherever workers run, and keep the folder of the outputs for this call alone.

    Args:
        job: What to score with what.
        announce: Receives what a user should know of the model.

    Raises:
        ConfigurationError: Wrong arguments, found before any image is scored.
    """
    require_places(job, watching=False)
    with ExitStack() as workers:
        executor = workers.enter_context(open_executor(job.launch, job.runtime))
        runtime, device = executor.settle(job.runtime)
        folder = _folder_of_relative_paths(job)
        _require_visible(executor, job, folder)
        warn_without_gpu(job.runtime.device, device)
        num_workers = job.num_workers or job.launch.cpus_per_task or runtime.threads  # the cores that a task has
        settled = replace(job, inputs=(), runtime=runtime, num_workers=num_workers, launch=LaunchConfig())
        recorder = DistributedRecorder(settled, executor, folder)
        say_what_is_missing(job, recorder.open_model(), announce)
        with kept_for_this_call(job.out):
            remove_unfinished_outputs(job.out)
            try:
                yield recorder
            finally:
                workers.close()  # nobody writes any more
                recorder.remove_unfinished_logs()
                _tidy_up(job.out)


def _folder_of_relative_paths(job: PredictionJob) -> Path | None:
    """Return the folder that relative paths of a job begin in; None if all are absolute."""
    typed = [*map(Path, job.inputs), job.model, *(path for path in (job.out, job.roi) if path is not None)]
    return None if all(path.is_absolute() for path in typed) else Path.cwd()


def _require_visible(executor: Executor, job: PredictionJob, folder: Path | None) -> None:
    """Raise ConfigurationError unless images, model and folder of the outputs are there wherever workers run."""
    places = [*input_places(job.inputs), job.model, *(path for path in (job.roi, folder) if path is not None)]
    seen = [path for path in places if path.exists()]  # what is not here, as a link to nowhere, is told elsewhere
    with write_probe(job.out) if job.out is not None else nullcontext() as probe:
        executor.require_visible([*seen, probe] if probe is not None else seen)


def _tidy_up(out: Path | None) -> None:
    """Remove what workers that were lost or ended have left, but for the logs of those that were lost."""
    remove_unfinished_outputs(out)
    if out is not None:
        with suppress(OSError):  # there is none, or it has logs
            (out / LOGS).rmdir()

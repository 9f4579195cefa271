"""One class and seed of a run as a task that any process can do."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import patchcore.methods  # enters every detector into the registry, in workers too
from patchcore.class_run import ClassTask, learn_class, train_class
from patchcore.configs import DatasetConfig, OutputConfig, PreprocessingConfig, RunConfig, RuntimeConfig
from patchcore.detector import DETECTORS, DetectorBuilder
from patchcore.errors import ConfigurationError, DataError
from patchcore.failures import reason
from patchcore.process_group import Processes
from patchcore.runtime import resolve_device, set_threads
from patchcore.storage import run_folder
from patchcore.storage.run_folder import ClassResult

LOGGER = logging.getLogger(__name__)

RUN_LOG = "run.log"
assert patchcore.methods


def worker_log(folder: Path, category: str, seed: int) -> Path:
    """Return where a worker logs what it does for a class."""
    return folder / "logs" / f"{category}_{seed}.log"


@dataclass(frozen=True)
class ClassJob:
    """Does something for a class of a run, so that what goes wrong there loses no other class.

    Attributes:
        task: The run.
        category: The class.
        process: Does it.
        log: Where the traceback of a defect goes, for the message.
    """

    task: ClassTask
    category: str
    process: Callable[[str], ClassResult]
    log: Path

    def __call__(self) -> ClassResult | str:
        """Process the class and return its result, or why it failed."""
        category = self.category
        LOGGER.debug("%s begins", category)
        try:
            # A record says that all files are whole, which ends with the first that is written anew.
            run_folder.remove_class_result(self.task.folder, self.task.row_name(category))
            return self.process(category)
        except DataError as error:
            LOGGER.error("%s failed: %s", category, error)
            return str(error)
        except Exception as error:  # a defect met in one class must not lose the others
            why = reason(error)
            LOGGER.exception("%s failed: %s (traceback in %s)", category, why, self.log)
            return why
        except BaseException as error:
            LOGGER.debug("%s ended by %s", category, type(error).__name__)
            raise


@dataclass(frozen=True)
class TrainInWorker:
    """Trains and evaluates classes in another process, which makes its own detectors.

    Attributes:
        task: The run; its device is that of the process.
        seed: The seed.
        method: Name in the registry of detectors.
        config: Configuration of the method for the class.
        run: What was asked for, threads and precision settled.
    """

    task: ClassTask
    seed: int
    method: str
    config: Any
    run: RunConfig

    def __call__(self, category: str) -> ClassResult:
        runtime = self.run.runtime
        set_threads(runtime.threads)
        device = resolve_device(runtime.device, runtime.gpus, warn=False)
        builder = _builder(self.method, self.config, self.task.dataset.preprocessing, limited(runtime))
        return train_class(replace(self.task, device=device), category, self.seed, {category: builder}, self.run)


@functools.lru_cache(maxsize=1)  # a worker meets the same configuration again with the next class
def _builder(method: str, config: Any, preprocessing: PreprocessingConfig, runtime: RuntimeConfig) -> DetectorBuilder:
    return DETECTORS[method].prepare(config, preprocessing, runtime)


def train_along(
    processes: Processes, method: str, config_of: Callable[[str], Any], run: RunConfig, dataset: DatasetConfig
) -> None:
    """Train, with a share of the images, each class that the first process trains, until it says that none is left.

    What is wrong with a class is found by all processes, and said by the first.

    Args:
        processes: Of which this one is not the first.
        method: Name in the registry of detectors.
        config_of: Configuration of the method for a class.
        run: What was asked for.
        dataset: What to read.
    """
    set_threads(run.runtime.threads)
    device = resolve_device(run.runtime.device, run.runtime.gpus, warn=False)
    task = ClassTask(Path(run.results_path), dataset, OutputConfig(), device, run.epochs, processes=processes)
    nothing_left: tuple[str, int] | None = None
    while True:
        with processes.in_step():
            begun = processes.from_first(nothing_left)
            if begun is None:
                return
            category, seed = begun
            builder = _builder(method, config_of(category), dataset.preprocessing, run.runtime)
            with suppress(DataError, ConfigurationError):
                learn_class(task, category, seed, builder, run)


def limited(runtime: RuntimeConfig) -> RuntimeConfig:
    """Give the search no more threads than --threads: faiss sets a number that torch shares, and would undo it."""
    workers = runtime.faiss_num_workers
    if workers is None or runtime.threads is None:
        return runtime
    return replace(runtime, faiss_num_workers=min(workers, runtime.threads))

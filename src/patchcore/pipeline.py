"""The loop over seeds and classes: train, calibrate, evaluate, write.

Everything a user can get wrong is checked before the first run folder is made; what is wrong with the files of
one class ends that class alone.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import patchcore
import patchcore.methods  # enters every detector into the registry
from patchcore.calibration_data import require_calibration_images
from patchcore.class_data import open_dataset
from patchcore.class_jobs import RUN_LOG, ClassJob, TrainInWorker, limited, train_along, worker_log
from patchcore.class_run import ClassTask, evaluate_class, train_class
from patchcore.class_shares import Crew
from patchcore.config_json import config_to_dict
from patchcore.configs import (
    DatasetConfig,
    OutputConfig,
    PatchCoreConfig,
    PreprocessingConfig,
    RunConfig,
    RuntimeConfig,
)
from patchcore.datasets.inspection import DatasetSplit, resolve_categories
from patchcore.datasets.registry import dataset_class
from patchcore.detector import DETECTORS, DetectorBuilder
from patchcore.errors import ConfigurationError
from patchcore.launching import Executor, InThisProcess, Job, open_executor
from patchcore.process_group import ALONE, Processes
from patchcore.resuming import Earlier, finished_classes, new_folder, reopen
from patchcore.run_record import Announce, RunRecord, write_seed_table
from patchcore.runtime import (
    progress,
    reset_peak_memory,
    resolve_device,
    resolve_precision,
    set_threads,
    warn_without_gpu,
)
from patchcore.storage import run_folder
from patchcore.storage.files import remove_unfinished
from patchcore.storage.run_folder import ClassResult
from patchcore.stored_models import TypedModel, match_models, open_models
from patchcore.tracking import Tracker, open_tracker, require_trackers

LOGGER = logging.getLogger(__name__)

ConfigOf = Callable[[str], Any]


def train_and_evaluate(
    method: str,
    config_of: ConfigOf,
    run: RunConfig,
    dataset: DatasetConfig,
    announce: Announce,
    processes: Processes | None = None,
) -> bool:
    """Train and evaluate one method on every class, for every seed.

    Args:
        method: Name in the registry of detectors.
        config_of: Configuration of the method for a class.
        run: Where to write, seeds and outputs.
        dataset: What to read.
        announce: Receives the lines meant for the user: the run folder first and last, the result table.
        processes: Those that train each class together, of which the first does all the rest; None for this one alone.

    Returns:
        Whether every class was finished; True where the first process knows.

    Raises:
        ConfigurationError: Something is wrong with the arguments; nothing has been written then.
    """
    processes = processes or ALONE
    if not processes.is_first:
        train_along(processes, method, config_of, run, dataset)
        return True
    categories = resolve_categories(dataset, dataset_class(dataset.name).categories)
    dataset = replace(dataset, categories=tuple(categories))
    require_trackers(run.tracking, run.log_project)
    parent = Path(run.results_path) / run.log_project
    run_folder.require_writable(parent)
    with ExitStack() as stack:
        configs = {category: config_of(category) for category in categories}
        executor = stack.enter_context(open_executor(run.launch, run.runtime))
        typed_device = run.runtime.device
        if not executor.is_in_process:
            _require_visible(executor, run, dataset)
        crew = _crew(executor, run.runtime, configs)
        if crew is not None:
            executor = InThisProcess()  # the classes come one by one, as tasks are shares of them
        runtime, device = executor.settle(run.runtime)
        run = replace(run, runtime=runtime)
        identities = {seed: _identity(method, configs, run, dataset, seed) for seed in run.seeds}
        outputs = possible_outputs(method, run.outputs)
        row_names = {category: run_folder.row_name(dataset.name, category) for category in categories}
        folders = {seed: parent / seed_folder_name(run, seed) for seed in run.seeds if run.skip_existing}
        reopened = reopen(folders, identities, stack)
        earlier = {seed: finished_classes(folder, row_names, outputs) for seed, folder in reopened.items()}
        to_do = [(seed, c) for seed in run.seeds for c in categories if earlier.get(seed, {}).get(c) is None]
        left = [c for c in categories if any(c == category for _, category in to_do)]
        require_calibration_images(run, replace(dataset, categories=tuple(left)), DETECTORS[method].has_maps)
        # Not for classes that are finished: what they were trained with may take long to load. Workers load it anew,
        # after it is known to be there.
        builders = _prepare(method, {c: configs[c] for c in left}, dataset.preprocessing, limited(run.runtime))
        warn_without_gpu(typed_device, device)
        if outputs != run.outputs:
            LOGGER.warning("%s has no anomaly maps: neither pictures nor raw maps are written", method)
        training = _Training(
            method, configs, run, dataset, outputs, device, identities, reopened, earlier, announce, stack,
            builders if executor.is_in_process else None, crew, processes,
        )  # fmt: skip
        finished = _run_seeds(executor, run.seeds, training.begin, training.job, len(to_do))
        if len(run.seeds) > 1:
            stem = f"{run_folder.group_without_seed(run.log_group)}_seeds"
            exact = parent / f"{stem}.csv"
            path = exact if run.skip_existing else run_folder.free_file(parent, stem, ".csv")
            write_seed_table(path, [record.results for record in finished], announce)
    return not any(record.failures for record in finished)


def require_same_runs(
    method: str, config_of: ConfigOf, run: RunConfig, dataset: DatasetConfig, folders: Mapping[int, Path]
) -> None:
    """Raise ConfigurationError if a folder that --skip_existing would take over holds another run.

    Args:
        method: Name in the registry of detectors.
        config_of: Configuration of the method for a class.
        run: What was asked for.
        dataset: What to read, its classes named.
        folders: Run folder of each seed.
    """
    used = {seed: folder for seed, folder in folders.items() if not run_folder.is_unused(folder)}
    if not used or run.runtime.precision == "auto":  # which that is depends on the machine that tasks run on
        return
    configs = {category: config_of(category) for category in dataset.categories}
    for seed, folder in used.items():
        run_folder.require_same_config(folder, _identity(method, configs, run, dataset, seed))


@dataclass(frozen=True)
class _Training:
    """A run that has been checked: opens its folders, and makes its tasks.

    Attributes:
        method: Name in the registry of detectors.
        configs: Configuration of each class.
        run: What was asked for, threads and precision settled.
        dataset: What to read, its classes named.
        outputs: The optional files that the method can leave.
        device: Where tasks compute.
        identities: What makes two runs the same, of each seed.
        reopened: The folders that are taken over from an earlier call.
        earlier: What it has finished, of each seed.
        announce: Receives the lines meant for the user.
        stack: Holds folders, trackers and locks until the end.
        builders: What makes the detector of each class in this process; None where tasks run in others.
        crew: What reads the training images in shares; None where whoever trains a class reads them.
        processes: Those that train each class together.
    """

    method: str
    configs: Mapping[str, Any]
    run: RunConfig
    dataset: DatasetConfig
    outputs: OutputConfig
    device: torch.device
    identities: Mapping[int, dict[str, Any]]
    reopened: Mapping[int, Path]
    earlier: Mapping[int, Earlier]
    announce: Announce
    stack: ExitStack
    builders: Mapping[str, DetectorBuilder] | None
    crew: Crew | None
    processes: Processes

    def begin(self, seed: int) -> RunRecord:
        """Open the run folder of a seed."""
        run, identity = self.run, self.identities[seed]
        name = seed_folder_name(run, seed)
        parent = Path(run.results_path) / run.log_project
        folder = self.reopened.get(seed) or new_folder(parent, name, run.skip_existing, self.stack)
        if run_folder.is_unused(folder):
            run_folder.write_run_config(folder, identity, _environment(self.device))
        if self.builders is None or self.crew is not None:  # a worker that is lost or ended leaves what it was writing
            self.stack.callback(remove_unfinished, folder)
        seedless = run_folder.group_without_seed(run.log_group)  # seeds of several commands belong together too
        tracker = open_tracker(run.tracking, folder, run.log_project, seedless, identity)
        task = ClassTask(folder, self.dataset, self.outputs, self.device, run.epochs, name, self.processes)
        record = RunRecord(task, self.earlier.get(seed, {}), tracker, _environment(self.device), self.announce)
        return self.stack.enter_context(record)

    def job(self, seed: int, task: ClassTask, category: str) -> Job:
        """Return the task of a class."""
        process: Callable[[str], ClassResult]
        if self.builders is not None:
            log = task.folder / RUN_LOG
            task = _anywhere(task) if self.crew is not None else task
            process = functools.partial(
                train_class, task, seed=seed, builders=self.builders, run=self.run, crew=self.crew
            )
        else:
            task = _anywhere(task)
            log = worker_log(task.folder, category, seed)
            process = TrainInWorker(task, seed, self.method, self.configs[category], _run_anywhere(self.run))
        name = f"{category}, seed {seed}" if len(self.run.seeds) > 1 else category
        return Job((seed, category), name, log, ClassJob(task, category, process, log))


def _run_seeds(
    executor: Executor,
    seeds: Sequence[int],
    begin: Callable[[int], RunRecord],
    job: Callable[[int, ClassTask, str], Job],
    num_jobs: int,
) -> list[RunRecord]:
    """Do every class of every seed: the one loop, whatever executes it.

    Args:
        executor: Does the tasks.
        seeds: In order.
        begin: Opens the run folder of a seed, when the first of its tasks is about to begin.
        job: Makes the task of a class.
        num_jobs: How many there are, for the bar.

    Returns:
        The record of each seed.
    """
    records: dict[int, RunRecord] = {}

    def jobs() -> Iterator[Job]:
        for number, seed in enumerate(seeds, start=1):
            if len(seeds) > 1:
                LOGGER.info("seed %d (%d of %d)", seed, number, len(seeds))
            record = records[seed] = begin(seed)
            if not record.left:
                record.finish()
            for category in record.left:
                yield job(seed, record.task, category)

    hidden = executor.is_in_process  # which shows a bar for each class
    with closing(executor.run(jobs())) as ended, progress(None, "classes", num_jobs, hidden) as bar:
        for end in ended:
            seed, category = end.key
            loss = [(logging.ERROR, f"{category} failed: {end.lost}")] if end.lost else []
            if records[seed].add(category, end.lost or end.value, [*end.messages, *loss]):
                records[seed].finish()
            bar.update()
    return [records[seed] for seed in seeds]


def _crew(executor: Executor, runtime: RuntimeConfig, configs: Mapping[str, Any]) -> Crew | None:
    """Return what reads the images of a class in shares; None for methods and configurations that do not learn so."""
    config = next(iter(configs.values()))
    shards = config.sampler.shards if isinstance(config, PatchCoreConfig) else None
    if shards is None:
        return None
    threads = torch.get_num_threads()
    crew = Crew(executor, executor.settle(runtime)[0], shards.count)
    set_threads(runtime.threads or threads)  # those of a task are not those of this process
    return crew


def _require_visible(executor: Executor, run: RunConfig, dataset: DatasetConfig) -> None:
    """Raise ConfigurationError unless the images, and the folder that results go to, are there wherever tasks run."""
    data = [Path(path) for path in (dataset.path, run.validation_path) if path is not None]
    images = [path / category for path in data for category in dataset.categories]
    with run_folder.write_probe(Path(run.results_path) / run.log_project) as probe:
        executor.require_visible([*data, *images, probe])


def _anywhere(task: ClassTask) -> ClassTask:
    """Return a task that means the same in a process with another working directory."""
    dataset = replace(task.dataset, path=os.path.abspath(task.dataset.path))
    return replace(task, folder=task.folder.absolute(), dataset=dataset)


def _run_anywhere(run: RunConfig) -> RunConfig:
    path = run.validation_path
    return replace(run, validation_path=None if path is None else os.path.abspath(path))


def possible_outputs(method: str, outputs: OutputConfig) -> OutputConfig:
    """Leave out what takes anomaly maps where a method has none: a run that goes on must not look for it."""
    if DETECTORS[method].has_maps:
        return outputs
    return replace(outputs, segmentation_images=False, anomaly_maps=False)


def seed_folder_name(run: RunConfig, seed: int) -> str:
    """Return the name of the run folder of a seed, but for a number that is appended where it is taken."""
    return run.log_group if len(run.seeds) == 1 else run_folder.seed_group(run.log_group, seed)


def _prepare(
    method: str, configs: Mapping[str, Any], preprocessing: PreprocessingConfig, runtime: RuntimeConfig
) -> dict[str, DetectorBuilder]:
    """Return what makes the detector of each class; classes with equal configurations share it."""
    distinct: list[tuple[Any, DetectorBuilder]] = []
    builders: dict[str, DetectorBuilder] = {}
    for category, config in configs.items():
        builder = next((known for other, known in distinct if other == config), None)
        if builder is None:
            builder = DETECTORS[method].prepare(config, preprocessing, runtime)
            distinct.append((config, builder))
        builders[category] = builder
    return builders


def _method_config(configs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the one configuration of all classes, or one for each where they differ."""
    first, *others = [config_to_dict(config) for config in configs.values()]
    if all(other == first for other in others):
        return {"method_config": first}
    return {"method_config_of_class": {category: config_to_dict(config) for category, config in configs.items()}}


def _identity(
    method: str, configs: Mapping[str, Any], run: RunConfig, dataset: DatasetConfig, seed: int
) -> dict[str, Any]:
    """Return what makes two runs the same run: everything that can change a file in the run folder."""
    data = config_to_dict(dataset)
    del data["num_workers"], data["batch_size"]
    data["path"] = str(Path(dataset.path).resolve())
    return {
        "method": method,
        **_method_config(configs),
        "dataset": data,
        "seed": seed,
        "calibration": run.calibration,
        "threshold_rule": str(run.threshold_rule),
        "validation_data": None if run.validation_path is None else str(Path(run.validation_path).resolve()),
        "outputs": config_to_dict(run.outputs),
        **_precision(run.runtime),
    }


def _precision(runtime: RuntimeConfig) -> dict[str, str]:
    """Return the numbers of the backbone where they are not float32, which older runs do not state."""
    return {} if runtime.precision == "float32" else {"precision": runtime.precision}


def _environment(device: torch.device) -> dict[str, Any]:
    return {
        "command": shlex.join(sys.argv),
        "device": str(device),
        "patchcore": patchcore.__version__,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def load_and_evaluate(
    methods: Sequence[str],
    model_paths: Sequence[str],
    dataset: DatasetConfig,
    save_folder: str,
    outputs: OutputConfig,
    runtime: RuntimeConfig,
    announce: Announce,
    typed: TypedModel | None = None,
) -> bool:
    """Evaluate stored models; the numbers are those of the run that trained them.

    Args:
        methods: The methods the models may be of.
        model_paths: Model folders, exports or bare state dicts.
        dataset: What to read; its preprocessing is taken from the models.
        save_folder: Where the tables go; a number is appended if it exists.
        outputs: Optional files.
        runtime: How the machine computes.
        announce: Receives the lines meant for the user.
        typed: Options that the models must agree with, and what describes a bare state dict.

    Returns:
        Whether every class was finished.

    Raises:
        ConfigurationError: Something is wrong with the arguments or a model; nothing has been written then.
    """
    matched = match_models(model_paths, methods, typed or TypedModel(), dataset.categories)
    preprocessing = next(iter(matched.values()))[1].preprocessing  # that of all
    dataset = replace(dataset, categories=tuple(matched), preprocessing=preprocessing)
    resolve_categories(dataset, dataset_class(dataset.name).categories, needs_training=False)
    target = Path(save_folder)
    if target.name in ("", "..") or target.is_file():
        raise ConfigurationError(f"SAVE_FOLDER is {save_folder!r}, expected the path of a folder to create")
    run_folder.require_writable(target.parent)
    set_threads(runtime.threads)
    device = resolve_device(runtime.device, runtime.gpus, warn=False)
    runtime = replace(runtime, precision=resolve_precision(runtime.precision, device))
    models = open_models(matched, limited(runtime))
    warn_without_gpu(runtime.device, device)
    folder = run_folder.claim_folder(target.parent, target.name)
    task = ClassTask(folder, dataset, outputs, device)
    identity = {
        "methods": {category: model.header.method for category, model in models.items()},
        "models": {category: str(model.folder.resolve()) for category, model in models.items()},
        "dataset": config_to_dict(dataset),
        "outputs": config_to_dict(outputs),
        **_precision(runtime),
    }
    run_folder.write_run_config(folder, identity, _environment(device))

    def process(category: str) -> ClassResult:
        reset_peak_memory()
        test = open_dataset(dataset, category, DatasetSplit.TEST, 0)
        detector = models[category].restore(device)
        test.check_files(detector.smallest_side_px)
        return evaluate_class(task, category, detector, test, {})

    def job(seed: int, task: ClassTask, category: str) -> Job:
        log = task.folder / RUN_LOG
        return Job((seed, category), category, log, ClassJob(task, category, process, log))

    with RunRecord(task, {}, nullcontext(Tracker([])), _environment(device), announce) as record:
        _run_seeds(InThisProcess(), [0], lambda _: record, job, len(matched))
    return not record.failures

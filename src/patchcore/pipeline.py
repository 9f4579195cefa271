"""The loop over seeds and classes: train, calibrate, evaluate, write.

Everything a user can get wrong is checked before the first run folder is made; what is wrong with the files of
one class ends that class alone.
"""

from __future__ import annotations

import functools
import logging
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import patchcore
import patchcore.methods  # enters every detector into the registry
from patchcore.calibration_data import require_calibration_images
from patchcore.class_data import open_dataset
from patchcore.class_run import ClassTask, evaluate_class, train_class
from patchcore.config_json import config_to_dict
from patchcore.configs import (
    DatasetConfig,
    OutputConfig,
    PreprocessingConfig,
    RunConfig,
    RuntimeConfig,
)
from patchcore.datasets.inspection import DatasetSplit, resolve_categories
from patchcore.datasets.registry import dataset_class
from patchcore.detector import DETECTORS, DetectorBuilder
from patchcore.errors import ConfigurationError, DataError
from patchcore.evaluation.report import false_alarm_report, text_table
from patchcore.failures import reason
from patchcore.resuming import Earlier, finished_classes, new_folder, remove_checkpoint, reopen
from patchcore.runtime import (
    log_to_file,
    reset_peak_memory,
    resolve_device,
    resolve_precision,
    set_threads,
    warn_without_gpu,
)
from patchcore.storage import run_folder
from patchcore.storage.run_folder import ClassResult
from patchcore.stored_models import TypedModel, match_models, open_models
from patchcore.tracking import Tracker, open_tracker, require_trackers

LOGGER = logging.getLogger(__name__)

TABLE_COLUMNS = ("instance_auroc", "full_pixel_auroc", "full_pro", "image_f1_max", "precision", "recall")

Announce = Callable[[str], None]
ConfigOf = Callable[[str], Any]


def train_and_evaluate(
    method: str, config_of: ConfigOf, run: RunConfig, dataset: DatasetConfig, announce: Announce
) -> bool:
    """Train and evaluate one method on every class, for every seed.

    Args:
        method: Name in the registry of detectors.
        config_of: Configuration of the method for a class.
        run: Where to write, seeds and outputs.
        dataset: What to read.
        announce: Receives the lines meant for the user: the run folder first and last, the result table.

    Returns:
        Whether every class was finished.

    Raises:
        ConfigurationError: Something is wrong with the arguments; nothing has been written then.
    """
    categories = resolve_categories(dataset, dataset_class(dataset.name).categories)
    dataset = replace(dataset, categories=tuple(categories))
    require_trackers(run.tracking, run.log_project)
    parent = Path(run.results_path) / run.log_project
    run_folder.require_writable(parent)
    set_threads(run.runtime.threads)
    device = resolve_device(run.runtime.device, run.runtime.gpus, warn=False)
    run = replace(run, runtime=replace(run.runtime, precision=resolve_precision(run.runtime.precision, device)))
    configs = {category: config_of(category) for category in categories}
    identities = {seed: _identity(method, configs, run, dataset, seed) for seed in run.seeds}
    outputs = _possible_outputs(method, run.outputs)
    row_names = {category: run_folder.row_name(dataset.name, category) for category in categories}
    with ExitStack() as locks:
        folders = {seed: parent / _group(run, seed) for seed in run.seeds if run.skip_existing}
        reopened = reopen(folders, identities, locks)
        earlier = {seed: finished_classes(folder, row_names, outputs) for seed, folder in reopened.items()}
        left = [c for c in categories if any(earlier.get(seed, {}).get(c) is None for seed in run.seeds)]
        require_calibration_images(run, replace(dataset, categories=tuple(left)), DETECTORS[method].has_maps)
        # Not for classes that are finished: what they were trained with may take long to load.
        runtime = _limited(run.runtime)
        builders = _prepare(method, {c: configs[c] for c in left}, dataset.preprocessing, runtime)
        warn_without_gpu(run.runtime.device, device)
        if outputs != run.outputs:
            LOGGER.warning("%s has no anomaly maps: neither pictures nor raw maps are written", method)
        finished: list[list[ClassResult]] = []
        complete = True
        for number, (seed, identity) in enumerate(identities.items(), start=1):
            if len(identities) > 1:
                LOGGER.info("seed %d (%d of %d)", seed, number, len(identities))
            folder = reopened.get(seed) or new_folder(parent, _group(run, seed), run.skip_existing, locks)
            if run_folder.is_unused(folder):
                run_folder.write_run_config(folder, identity, _environment(device))
            task = ClassTask(folder, dataset, outputs, device, run.epochs, _group(run, seed))
            process = functools.partial(train_class, task, seed=seed, builders=builders, run=run)
            results, failures = _run_seed(task, process, earlier.get(seed, {}), run, identity, announce)
            finished.append(results)
            complete = complete and not failures
        if len(run.seeds) > 1:
            _write_seed_table(parent, run, finished, announce)
    return complete


def _run_seed(
    task: ClassTask,
    process: Callable[[str], ClassResult],
    earlier: Earlier,
    run: RunConfig,
    identity: dict[str, Any],
    announce: Announce,
) -> tuple[list[ClassResult], dict[str, str]]:
    """Do in one run folder what is left; returns what `_process_classes` does."""
    announce(f"results: {task.folder}")
    seedless = run_folder.group_without_seed(run.log_group)  # seeds of several commands belong together too
    with (
        log_to_file(task.folder / "run.log"),
        open_tracker(run.tracking, task.folder, run.log_project, seedless, identity) as tracker,
    ):
        results, failures = _process_classes(task, process, earlier, tracker)
        tracker.log_mean(run_folder.mean_metrics(results))
    _announce_results(task.folder, task.outputs, results, failures, announce)
    return results, failures


def _possible_outputs(method: str, outputs: OutputConfig) -> OutputConfig:
    """Leave out what takes anomaly maps where a method has none: a run that goes on must not look for it."""
    if DETECTORS[method].has_maps:
        return outputs
    return replace(outputs, segmentation_images=False, anomaly_maps=False)


def _limited(runtime: RuntimeConfig) -> RuntimeConfig:
    """Give the search no more threads than --threads: faiss sets a number that torch shares, and would undo it."""
    workers = runtime.faiss_num_workers
    if workers is None or runtime.threads is None:
        return runtime
    return replace(runtime, faiss_num_workers=min(workers, runtime.threads))


def _group(run: RunConfig, seed: int) -> str:
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


def _process_classes(
    task: ClassTask, process: Callable[[str], ClassResult], earlier: Earlier, tracker: Tracker
) -> tuple[list[ClassResult], dict[str, str]]:
    """Process every class, writing the tables after each, so that an interrupted run keeps what it has.

    Args:
        task: The run.
        process: What is done for a class.
        earlier: What an earlier call left, for --skip_existing.
        tracker: Gets the numbers of each class.

    Returns:
        Results of the finished classes, and the reason for each failed one by row name.
    """
    outcomes: dict[str, ClassResult | str] = {}
    LOGGER.debug("%s", _environment(task.device))
    row_names = {category: task.row_name(category) for category in task.dataset.categories}
    if earlier:  # an interruption must not take finished classes out of the tables
        outcomes = {row_name: earlier.get(category) or "not done yet" for category, row_name in row_names.items()}
        run_folder.write_tables(task.folder, outcomes)
    for step, (category, row_name) in enumerate(row_names.items()):
        known = earlier.get(category)
        if known is None:
            if category in earlier:
                LOGGER.warning("%s: finished before, but files of it are gone: done anew", category)
            outcomes[row_name] = _outcome(task, category, process)
            run_folder.write_tables(task.folder, outcomes)
        elif isinstance(known, ClassResult):
            LOGGER.info("%s: finished before, skipped", category)
            remove_checkpoint(task.checkpoint(category))  # which a kill right after the record has left
        else:
            LOGGER.error("%s failed: %s", category, known)
        outcome = outcomes[row_name]
        if isinstance(outcome, ClassResult):
            tracker.log_class(step, outcome)
    results = [outcome for outcome in outcomes.values() if isinstance(outcome, ClassResult)]
    return results, {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, str)}


def _outcome(task: ClassTask, category: str, process: Callable[[str], ClassResult]) -> ClassResult | str:
    """Process one class and return its result, or why it failed."""
    LOGGER.debug("%s begins", category)
    try:
        # A record says that all files are whole, which ends with the first that is written anew.
        run_folder.remove_class_result(task.folder, task.row_name(category))
        return process(category)
    except DataError as error:
        LOGGER.error("%s failed: %s", category, error)
        return str(error)
    except Exception as error:  # a defect met in one class must not lose the others
        why = reason(error)
        LOGGER.exception("%s failed: %s (traceback in %s)", category, why, task.folder / "run.log")
        return why
    except BaseException as error:
        LOGGER.debug("%s ended by %s", category, type(error).__name__)
        raise


def _announce_results(
    folder: Path,
    outputs: OutputConfig,
    results: Sequence[ClassResult],
    failures: dict[str, str],
    announce: Announce,
) -> None:
    """Print the table of a run, where its pictures are, what failed, and the run folder last."""
    rows = [(r.row_name, r.metrics) for r in results]
    if len(results) > 1:
        rows.append((run_folder.MEAN_ROW, run_folder.mean_metrics(results)))
    cells = [[name, *(_short(m[c]) for c in TABLE_COLUMNS)] for name, m in rows]
    if results:
        announce(text_table((run_folder.ROW_NAMES, *TABLE_COLUMNS), cells))
    alarms = {r.row_name: r.false_alarms for r in results if r.false_alarms}
    if alarms:
        announce(false_alarm_report(run_folder.ROW_NAMES, alarms))
    if outputs.models and results:
        announce(f"models: {folder / 'models'}")
    if outputs.segmentation_images and results:
        announce(f"pictures: {folder / 'segmentation_images'}")
    for name, why in failures.items():
        announce(f"failed: {name}: {why}")
    announce(f"results: {folder}")


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _short_with_std(mean: float | None, std: float | None) -> str:
    return _short(mean) if std is None else f"{_short(mean)} ± {std:.4f}"


def _write_seed_table(
    parent: Path, run: RunConfig, finished: Sequence[Sequence[ClassResult]], announce: Announce
) -> None:
    """Write mean and standard deviation over seeds beside the run folders, under a name not yet taken."""
    stem = f"{run_folder.group_without_seed(run.log_group)}_seeds"
    path = run_folder.free_file(parent, stem, ".csv") if not run.skip_existing else parent / f"{stem}.csv"
    statistics = run_folder.seed_statistics(finished)
    run_folder.write_seed_table(path, statistics)
    cells = [[s.row_name, *(_short_with_std(*s.columns[c]) for c in TABLE_COLUMNS)] for s in statistics]
    announce(text_table((run_folder.ROW_NAMES, *TABLE_COLUMNS), cells))
    announce(f"mean and standard deviation over {len(finished)} seeds: {path}")


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
    models = open_models(matched, _limited(runtime))
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
    announce(f"results: {folder}")

    def process(category: str) -> ClassResult:
        reset_peak_memory()
        test = open_dataset(dataset, category, DatasetSplit.TEST, 0)
        detector = models[category].restore(device)
        test.check_files(detector.smallest_side_px)
        return evaluate_class(task, category, detector, test, {})

    with log_to_file(folder / "run.log"):
        results, failures = _process_classes(task, process, {}, Tracker([]))
    _announce_results(folder, outputs, results, failures, announce)
    return not failures

"""The frame of every command that trains, and of every command that evaluates stored models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from patchcore.cli.grammar import EXIT_FAILED, announce, quiet_libraries
from patchcore.cli.steps import CALIBRATION_OPTION, LAUNCH_OPTIONS, RUNTIME_OPTIONS, THRESHOLD_OPTIONS, TRACKING_OPTIONS
from patchcore.configs import (
    DatasetConfig,
    EpochConfig,
    LaunchConfig,
    OutputConfig,
    RunConfig,
    RuntimeConfig,
    ThresholdRule,
    TrackingConfig,
    require_at_least,
)
from patchcore.configs.typed import TypedRun, TypedSetting
from patchcore.runtime import log_to_console
from patchcore.torchrun import is_follower

SAVE_MODEL_OPTION = click.option("--save_model", is_flag=True, help="One model folder per class.")
SKIP_EXISTING_OPTION = click.option(
    "--skip_existing", is_flag=True, help="Reuse the run folder of this name, do what is missing."
)
RESUME_OPTION = click.option(
    "--skip_existing",
    "--resume",
    "skip_existing",
    is_flag=True,
    help="Reuse the run folder of this name, do what is missing, and go on from the last checkpoint.",
)
PICTURES_OPTION = click.option("--save_segmentation_images", is_flag=True, help="One picture per test image.")
MAPS_OPTION = click.option("--save_anomaly_scores", is_flag=True, help="Raw anomaly maps beside the image scores.")


def run_options(
    save_model: Callable[[Any], Any],
    skip_existing: Callable[[Any], Any],
    seed_help: str = "Repeatable.",
    log_group_help: str = "Name of the run folder.",
) -> tuple[Callable[[Any], Any], ...]:
    """Return the options that `run_config` takes.

    Args:
        save_model: The option that asks for model folders, as `save_model`.
        skip_existing: The option that reuses a run folder, as `skip_existing`.
        seed_help: What --seed does.
        log_group_help: What --log_group does.
    """
    return (
        *RUNTIME_OPTIONS,
        click.option("--seed", "seeds", type=int, multiple=True, default=(0,), show_default=True, help=seed_help),
        click.option("--log_group", default="group", show_default=True, help=log_group_help),
        click.option("--log_project", default="project", show_default=True, help="Folder above the run folder."),
        PICTURES_OPTION,
        save_model,
        MAPS_OPTION,
        skip_existing,
        CALIBRATION_OPTION,
        *THRESHOLD_OPTIONS,
        *TRACKING_OPTIONS,
        *LAUNCH_OPTIONS,
    )


def run_config(
    *,
    results_path: str,
    gpus: tuple[int, ...],
    device: str,
    threads: int | None,
    seeds: tuple[int, ...],
    log_group: str,
    log_project: str,
    save_segmentation_images: bool,
    save_model: bool,
    save_anomaly_scores: bool,
    skip_existing: bool,
    calibration: str,
    threshold_rule: str,
    validation_path: str | None,
    log_online: bool,
    tensorboard: bool,
    launcher: str,
    workers: int | None,
    ray_address: str | None,
    gpus_per_task: float | None,
    cpus_per_task: int | None,
    epochs: EpochConfig | None = None,
) -> RunConfig:
    """Return the run that `run_options` describe; `epochs` is None for methods without any."""
    return RunConfig(
        results_path=results_path,
        log_project=log_project,
        log_group=log_group,
        seeds=seeds,
        calibration=calibration,
        threshold_rule=ThresholdRule.parse(threshold_rule),
        validation_path=validation_path,
        outputs=OutputConfig(save_segmentation_images, save_model, save_anomaly_scores),
        skip_existing=skip_existing,
        runtime=RuntimeConfig(device, gpus, threads),
        tracking=TrackingConfig(log_online, tensorboard),
        epochs=epochs or EpochConfig(),
        launch=LaunchConfig(launcher, workers, ray_address, gpus_per_task, cpus_per_task),
    )


def prepare_console() -> None:
    """Send the toolkit's own log to the terminal, and nobody else's; of several processes that of the first."""
    log_to_console()
    if is_follower():
        logging.getLogger("patchcore").setLevel(logging.CRITICAL)
    quiet_libraries()


class CollectedRuns:
    """As the object of click's context, takes the runs that commands describe, which then do no work.

    Attributes:
        runs: One for each command.
    """

    def __init__(self) -> None:
        self.runs: list[TypedRun] = []


def train(method: str, config_of: Callable[[str], Any], run: RunConfig, dataset: DatasetConfig) -> int:
    """Train and evaluate a method on every class and return the exit code.

    Args:
        method: Name in the registry of detectors.
        config_of: Configuration of the method for a class.
        run: Where to write, seeds and outputs.
        dataset: What to read.
    """
    prepare_console()
    context = click.get_current_context(silent=True)
    if context is not None and isinstance(context.find_root().obj, CollectedRuns):
        context.find_root().obj.runs.append(TypedRun(method, config_of, run, dataset))
        return 0
    from patchcore.pipeline import train_and_evaluate

    return 0 if train_and_evaluate(method, config_of, run, dataset, announce) else EXIT_FAILED


STORED_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    *RUNTIME_OPTIONS,
    click.option("--seed", type=int, default=0, help="Accepted for old scripts; changes nothing in a stored model."),
    PICTURES_OPTION,
    MAPS_OPTION,
)


@dataclass(frozen=True)
class Evaluation:
    """Where and how stored models are evaluated.

    Attributes:
        save_folder: Where the tables go.
        outputs: Optional files.
        runtime: How the machine computes.
    """

    save_folder: str
    outputs: OutputConfig
    runtime: RuntimeConfig


def evaluation(
    *,
    save_folder: str,
    gpus: tuple[int, ...],
    device: str,
    threads: int | None,
    seed: int,
    save_segmentation_images: bool,
    save_anomaly_scores: bool,
) -> Evaluation:
    """Return what `STORED_OPTIONS` describe."""
    require_at_least("--seed", seed, 0)
    outputs = OutputConfig(save_segmentation_images, False, save_anomaly_scores)
    return Evaluation(save_folder, outputs, RuntimeConfig(device, gpus, threads))


def evaluate(
    methods: tuple[str, ...],
    model_paths: Sequence[str],
    dataset: DatasetConfig,
    place: Evaluation,
    settings: Sequence[TypedSetting] = (),
    overrides: Sequence[TypedSetting] = (),
    describe: Callable[[str], Any] | None = None,
) -> int:
    """Evaluate stored models, whose configuration rules, and return the exit code.

    Args:
        methods: The methods the models may be of.
        model_paths: Model folders, exports or bare state dicts.
        dataset: What to read; its preprocessing is taken from the models.
        place: Where and how.
        settings: What was typed and has to agree with the models.
        overrides: What was typed and replaces the models' own value.
        describe: ModelHeader of a bare state dict of a class; None where what was typed does not describe one.
    """
    prepare_console()
    from patchcore.pipeline import load_and_evaluate
    from patchcore.stored_models import TypedModel

    complete = load_and_evaluate(
        methods=methods,
        model_paths=model_paths,
        dataset=dataset,
        save_folder=place.save_folder,
        outputs=place.outputs,
        runtime=place.runtime,
        announce=announce,
        typed=TypedModel(tuple(settings), tuple(overrides), describe),
    )
    return 0 if complete else EXIT_FAILED

"""The commands `run_fastflow` and `load_and_evaluate_fastflow`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from patchcore.cli.fastflow_options import (
    MODEL_OPTIONS,
    POST_PROCESSING_OPTIONS,
    TILE_OPTIONS,
    TRAINING_OPTIONS,
    fastflow_dataset_step,
    typed_fastflow,
)
from patchcore.cli.grammar import EXIT_FAILED, ChainedCommand, announce, quiet_libraries
from patchcore.cli.steps import (
    CALIBRATION_OPTION,
    RUNTIME_OPTIONS,
    TRACKING_OPTIONS,
    refuse,
    runtime_config,
    with_options,
)
from patchcore.cli.typed_fastflow import TypedDataset, TypedFastFlow
from patchcore.config_json import config_to_dict
from patchcore.configs import (
    EpochConfig,
    FastFlowConfig,
    OutputConfig,
    PreprocessingConfig,
    RunConfig,
    RuntimeConfig,
    SearchConfig,
    TrackingConfig,
    require_at_least,
)
from patchcore.runtime import log_to_console

LOGGER = logging.getLogger(__name__)

NOT_TRAINED = "stored models are not trained again"
DEFAULT_CHECKPOINT_EVERY = 10


@click.group(
    "run_fastflow",
    cls=ChainedCommand,
    required_steps=("dataset", "fastflow"),
    once=("--log_group", "--checkpoint", "--category"),
)
@click.argument("results_path")
@with_options(
    *RUNTIME_OPTIONS,
    click.option(
        "--seed",
        "seeds",
        type=int,
        multiple=True,
        default=(0,),
        show_default=True,
        help="Repeatable; changes nothing with --eval_only.",
    ),
    click.option(
        "--log_group", default="group", show_default=True, help="Name of the run folder; two different ones: an error."
    ),
    click.option("--log_project", default="project", show_default=True, help="Folder above the run folder."),
    click.option("--save_segmentation_images", is_flag=True, help="One picture per test image."),
    click.option("--save_model", is_flag=True, help="One model folder per class, with an export for plain torch."),
    click.option("--save_anomaly_scores", is_flag=True, help="Raw anomaly maps beside the image scores."),
    click.option("--eval_only", is_flag=True, help="Evaluate --checkpoint, train nothing."),
    click.option("--checkpoint", default=None, help="Model folder, .pth export or bare state dict to evaluate."),
    click.option(
        "--skip_existing",
        "--resume",
        "skip_existing",
        is_flag=True,
        help="Reuse the run folder of this name, do what is missing, and go on from the last checkpoint.",
    ),
    CALIBRATION_OPTION,
    *TRACKING_OPTIONS,
)
def run_fastflow(**options: Any) -> None:
    """Train FastFlow on good images and evaluate it: RESULTS_PATH, then the steps dataset and fastflow.

    Tables, scores and pictures go to RESULTS_PATH/LOG_PROJECT/LOG_GROUP, or LOG_GROUP_0, _1, ... if that exists.
    """


@run_fastflow.result_callback()
def _run(
    steps: list[tuple[str, Any]],
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
    eval_only: bool,
    checkpoint: str | None,
    skip_existing: bool,
    calibration: str,
    log_online: bool,
    tensorboard: bool,
) -> int:
    step = dict(steps)
    dataset: TypedDataset = step["dataset"]
    model, epochs = step["fastflow"]
    run = RunConfig(
        results_path=results_path,
        log_project=log_project,
        log_group=log_group,
        seeds=seeds,
        calibration=calibration,
        outputs=OutputConfig(save_segmentation_images, save_model, save_anomaly_scores),
        skip_existing=skip_existing,
        runtime=runtime_config(gpus, device, threads),
        tracking=TrackingConfig(log_online, tensorboard),
        epochs=epochs,
    )
    if eval_only != (checkpoint is not None):
        found, missing = ("--eval_only", "--checkpoint") if checkpoint is None else ("--checkpoint", "--eval_only")
        raise click.UsageError(f"{found} without {missing}: type both to evaluate a stored model, or neither to train")
    if checkpoint is None:
        return _train(model, dataset, run)
    _refuse_training_options(run)
    save_folder = str(Path(results_path) / log_project / log_group)
    return _evaluate((checkpoint,), model, dataset, save_folder, run.outputs, run.runtime)


def _refuse_training_options(run: RunConfig) -> None:
    """Refuse what a run of --eval_only has no use for; scripts that type its default still run."""
    refuse("--save_model", run.outputs.models, False, NOT_TRAINED)
    refuse("--resume (--skip_existing)", run.skip_existing, False, NOT_TRAINED)
    refuse("--calibration", run.calibration, RunConfig.calibration, "the thresholds of a stored model are its own")
    refuse("--eval_every", run.epochs.eval_every, None, NOT_TRAINED)
    refuse("--checkpoint_every", run.epochs.checkpoint_every, DEFAULT_CHECKPOINT_EVERY, NOT_TRAINED)
    refuse("--log_online", run.tracking.wandb, False, "trackers follow runs that train")
    refuse("--tensorboard", run.tracking.tensorboard, False, "trackers follow runs that train")


def _train(model: TypedFastFlow, typed: TypedDataset, run: RunConfig) -> int:
    preprocessing = model.preprocessing(typed)
    tiles = model.tiles.config(preprocessing.imagesize_px)
    dataset = typed.config(preprocessing)
    if "patience" in model.settings and dataset.train_val_split == 1:
        raise click.UsageError(
            "--patience watches held-out images, --train_val_split 1 holds none out: give a smaller share, such as 0.8"
        )
    log_to_console()
    quiet_libraries()
    if tiles is not None and preprocessing.max_side_px is None and tiles.patch_size == preprocessing.imagesize_px:
        LOGGER.warning(
            "tiles of %d px are the whole images: give a smaller --patch_size or --preserve_high_res", tiles.patch_size
        )
    from patchcore.pipeline import train_and_evaluate

    def config_of(category: str) -> FastFlowConfig:
        preset = model.preset(category)
        if preset is not None:
            LOGGER.info("%s: preset %s of %s, %s", category, preset.category, preset.backbone, preset.source)
        return model.config_of(category, typed)

    complete = train_and_evaluate("fastflow", config_of, run, dataset, SearchConfig(), announce)
    return 0 if complete else EXIT_FAILED


def _evaluate(
    paths: tuple[str, ...],
    model: TypedFastFlow,
    dataset: TypedDataset,
    save_folder: str,
    outputs: OutputConfig,
    runtime: RuntimeConfig,
) -> int:
    """Evaluate stored models; their configuration rules, and typed options must agree with it."""
    refuse("--train_val_split", dataset.train_val_split, 1.0, NOT_TRAINED)
    refuse("--limit_train", dataset.limit_train, None, NOT_TRAINED)
    log_to_console()
    quiet_libraries()
    from patchcore.pipeline import load_and_evaluate
    from patchcore.stored_models import ModelHeader, TypedModel, typed_header

    def describe(category: str) -> ModelHeader:
        config = config_to_dict(model.config_of(category, dataset))
        return typed_header("fastflow", config, model.preprocessing(dataset), dataset.name, category)

    complete = load_and_evaluate(
        methods=("fastflow",),
        model_paths=paths,
        dataset=dataset.config(PreprocessingConfig()),
        save_folder=save_folder,
        outputs=outputs,
        runtime=runtime,
        search=SearchConfig(),
        announce=announce,
        typed=TypedModel(
            settings=tuple(model.stored_settings(dataset)),
            overrides=tuple(model.tiles.overrides()),
            describe=describe if model.backbone is not None else None,
        ),
    )
    return 0 if complete else EXIT_FAILED


@run_fastflow.command("fastflow", short_help="The method: --backbone BACKBONE [OPTIONS]")
@with_options(
    *MODEL_OPTIONS,
    *TRAINING_OPTIONS,
    click.option(
        "--eval_every", type=int, default=None, help="Show test metrics after so many epochs; selects nothing."
    ),
    click.option(
        "--checkpoint_every",
        type=int,
        default=DEFAULT_CHECKPOINT_EVERY,
        show_default=True,
        help="Epochs between checkpoints for --resume.",
    ),
    *TILE_OPTIONS,
    *POST_PROCESSING_OPTIONS,
)
def fastflow_step(
    eval_every: int | None, checkpoint_every: int, **options: Any
) -> tuple[str, tuple[TypedFastFlow, EpochConfig]]:
    """FastFlow: backbone, flows, training, tiles, maps.

    The options of the command, such as --log_group or --eval_only with --checkpoint, may stand here as well.
    """
    return "fastflow", (typed_fastflow(options), EpochConfig(eval_every, checkpoint_every))


@click.group("load_and_evaluate_fastflow", cls=ChainedCommand, required_steps=("fastflow_loader", "dataset"))
@click.argument("save_folder")
@with_options(
    *RUNTIME_OPTIONS,
    click.option("--seed", type=int, default=0, help="Accepted for old scripts; changes nothing in a stored model."),
    click.option("--save_segmentation_images", is_flag=True, help="One picture per test image."),
    click.option("--save_anomaly_scores", is_flag=True, help="Raw anomaly maps beside the image scores."),
)
def load_and_evaluate_fastflow(**options: Any) -> None:
    """Evaluate stored models: SAVE_FOLDER, then the steps fastflow_loader and dataset."""


@load_and_evaluate_fastflow.result_callback()
def _load_and_evaluate(
    steps: list[tuple[str, Any]],
    save_folder: str,
    gpus: tuple[int, ...],
    device: str,
    threads: int | None,
    seed: int,
    save_segmentation_images: bool,
    save_anomaly_scores: bool,
) -> int:
    require_at_least("--seed", seed, 0)
    step = dict(steps)
    paths, model = step["fastflow_loader"]
    outputs = OutputConfig(save_segmentation_images, False, save_anomaly_scores)
    return _evaluate(paths, model, step["dataset"], save_folder, outputs, runtime_config(gpus, device, threads))


@load_and_evaluate_fastflow.command("fastflow_loader", short_help="The models: -p MODEL [-p MODEL ...]")
@with_options(
    click.option(
        "-p",
        "--fastflow_paths",
        "paths",
        multiple=True,
        required=True,
        help="Model folder, .pth export, or bare state dict that --backbone and the like describe; repeatable.",
    ),
    *MODEL_OPTIONS,
    *TILE_OPTIONS,
    *POST_PROCESSING_OPTIONS,
)
def fastflow_loader_step(paths: tuple[str, ...], **options: Any) -> tuple[str, tuple[tuple[str, ...], TypedFastFlow]]:
    """Name the models; what is typed of them must agree with what they say, but for --low_memory."""
    return "fastflow_loader", (paths, typed_fastflow(options))


run_fastflow.add_command(fastflow_dataset_step)
load_and_evaluate_fastflow.add_command(fastflow_dataset_step)

"""The commands `run_fastflow` and `load_and_evaluate_fastflow`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from patchcore.cli.commands import (
    RESUME_OPTION,
    STORED_OPTIONS,
    Evaluation,
    evaluate,
    evaluation,
    prepare_console,
    run_config,
    run_options,
    train,
)
from patchcore.cli.fastflow_options import (
    MODEL_OPTIONS,
    POST_PROCESSING_OPTIONS,
    TILE_OPTIONS,
    TRAINING_OPTIONS,
    fastflow_dataset_step,
    typed_fastflow,
)
from patchcore.cli.grammar import EXIT_FAILED, ChainedCommand, announce
from patchcore.cli.steps import refuse, with_options
from patchcore.cli.training_options import DEFAULT_CHECKPOINT_EVERY, EPOCH_OPTIONS, require_held_out_for
from patchcore.cli.typed_dataset import TypedDataset
from patchcore.cli.typed_fastflow import TypedFastFlow
from patchcore.config_json import config_to_dict
from patchcore.configs import (
    LOCAL,
    DatasetConfig,
    EpochConfig,
    FastFlowConfig,
    PreprocessingConfig,
    RunConfig,
    ThresholdRule,
)
from patchcore.torchrun import Place, own_runtime, require_no_launcher, require_one_process, torchrun_place

LOGGER = logging.getLogger(__name__)

NOT_TRAINED = "stored models are not trained again"
STORED_HERE = "stored models are evaluated in this process"


@click.group(
    "run_fastflow",
    cls=ChainedCommand,
    required_steps=("dataset", "fastflow"),
    once=("--log_group", "--checkpoint", "--category"),
    under_torchrun=True,
)
@click.argument("results_path")
@with_options(
    *run_options(
        click.option("--save_model", is_flag=True, help="One model folder per class, with an export for plain torch."),
        RESUME_OPTION,
        seed_help="Repeatable; changes nothing with --eval_only.",
        log_group_help="Name of the run folder; two different ones: an error.",
    ),
    click.option("--eval_only", is_flag=True, help="Evaluate --checkpoint, train nothing."),
    click.option("--checkpoint", default=None, help="Model folder, .pth export or bare state dict to evaluate."),
)
def run_fastflow(**options: Any) -> None:
    """Train FastFlow on good images and evaluate it: RESULTS_PATH, then the steps dataset and fastflow.

    Tables, scores and pictures go to RESULTS_PATH/LOG_PROJECT/LOG_GROUP, or LOG_GROUP_0, _1, ... if that exists.
    Started by torchrun, the processes train together, with the losses of one process.
    """


@run_fastflow.result_callback()
def _run(steps: list[tuple[str, Any]], eval_only: bool, checkpoint: str | None, **frame: Any) -> int:
    step = dict(steps)
    dataset: TypedDataset = step["dataset"]
    model, epochs = step["fastflow"]
    run = run_config(**frame, epochs=epochs)
    if eval_only != (checkpoint is not None):
        found, missing = ("--eval_only", "--checkpoint") if checkpoint is None else ("--checkpoint", "--eval_only")
        raise click.UsageError(f"{found} without {missing}: type both to evaluate a stored model, or neither to train")
    if checkpoint is None:
        return _train(model, dataset, run)
    require_one_process("run_fastflow --eval_only")
    _refuse_training_options(run)
    save_folder = str(Path(run.results_path) / run.log_project / run.log_group)
    return _evaluate((checkpoint,), model, dataset, Evaluation(save_folder, run.outputs, run.runtime))


def _refuse_training_options(run: RunConfig) -> None:
    """Refuse what a run of --eval_only has no use for; scripts that type its default still run."""
    refuse("--save_model", run.outputs.models, False, NOT_TRAINED)
    refuse("--resume (--skip_existing)", run.skip_existing, False, NOT_TRAINED)
    refuse("--calibration", run.calibration, RunConfig.calibration, "the thresholds of a stored model are its own")
    refuse(
        "--threshold_rule",
        str(run.threshold_rule),
        str(ThresholdRule()),
        "the thresholds of a stored model are its own",
    )
    refuse("--validation_data", run.validation_path, None, "the thresholds of a stored model are its own")
    refuse("--eval_every", run.epochs.eval_every, None, NOT_TRAINED)
    refuse("--checkpoint_every", run.epochs.checkpoint_every, DEFAULT_CHECKPOINT_EVERY, NOT_TRAINED)
    refuse("--launcher", run.launch.launcher, LOCAL, STORED_HERE)
    refuse("--workers", run.launch.workers, None, STORED_HERE)
    refuse("--log_online", run.tracking.wandb, False, "trackers follow runs that train")
    refuse("--tensorboard", run.tracking.tensorboard, False, "trackers follow runs that train")


def _train(model: TypedFastFlow, typed: TypedDataset, run: RunConfig) -> int:
    preprocessing = model.preprocessing(typed)
    tiles = model.tiles.config(preprocessing.imagesize_px)
    dataset = typed.config(preprocessing)
    require_held_out_for(model.settings.get("patience"), dataset.train_val_split)
    prepare_console()
    if tiles is not None and preprocessing.max_side_px is None and tiles.patch_size == preprocessing.imagesize_px:
        LOGGER.warning(
            "tiles of %d px are the whole images: give a smaller --patch_size or --preserve_high_res", tiles.patch_size
        )

    def config_of(category: str) -> FastFlowConfig:
        preset = model.preset(category)
        if preset is not None:
            LOGGER.info("%s: preset %s of %s, %s", category, preset.category, preset.backbone, preset.source)
        return model.config_of(category, typed)

    place = torchrun_place()
    if place is None:
        return train("fastflow", config_of, run, dataset)
    require_no_launcher(run.launch)
    return _train_together(place, config_of, run, dataset)


def _train_together(
    place: Place, config_of: Callable[[str], FastFlowConfig], run: RunConfig, dataset: DatasetConfig
) -> int:
    """Train as one of the processes that torchrun has started."""
    import torch

    from patchcore.pipeline import train_and_evaluate
    from patchcore.process_group import open_group
    from patchcore.runtime import resolve_device

    runtime = own_runtime(run.runtime, place, torch.cuda.device_count())
    run = replace(run, runtime=runtime)
    with open_group(place, resolve_device(runtime.device, runtime.gpus, warn=False)) as processes:
        is_complete = train_and_evaluate("fastflow", config_of, run, dataset, announce, processes)
    return 0 if is_complete else EXIT_FAILED


def _evaluate(paths: tuple[str, ...], model: TypedFastFlow, dataset: TypedDataset, place: Evaluation) -> int:
    """Evaluate stored models; their configuration rules, and typed options must agree with it."""
    refuse("--train_val_split", dataset.train_val_split, 1.0, NOT_TRAINED)
    refuse("--limit_train", dataset.limit_train, None, NOT_TRAINED)

    def describe(category: str) -> Any:
        from patchcore.stored_models import typed_header

        config = config_to_dict(model.config_of(category, dataset))
        return typed_header("fastflow", config, model.preprocessing(dataset), dataset.name, category)

    return evaluate(
        ("fastflow",),
        paths,
        dataset.config(PreprocessingConfig()),
        place,
        settings=model.stored_settings(dataset),
        overrides=model.tiles.overrides(),
        describe=describe if model.backbone is not None else None,
    )


@run_fastflow.command("fastflow", short_help="The method: --backbone BACKBONE [OPTIONS]")
@with_options(
    *MODEL_OPTIONS,
    *TRAINING_OPTIONS,
    *EPOCH_OPTIONS,
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
@with_options(*STORED_OPTIONS)
def load_and_evaluate_fastflow(**options: Any) -> None:
    """Evaluate stored models: SAVE_FOLDER, then the steps fastflow_loader and dataset."""


@load_and_evaluate_fastflow.result_callback()
def _load_and_evaluate(steps: list[tuple[str, Any]], **frame: Any) -> int:
    step = dict(steps)
    paths, model = step["fastflow_loader"]
    return _evaluate(paths, model, step["dataset"], evaluation(**frame))


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

"""The commands `run_fastflow` and `load_and_evaluate_fastflow`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from patchcore.cli.grammar import EXIT_FAILED, ChainedCommand, ShortenedStep, announce, quiet_libraries
from patchcore.cli.steps import (
    AUGMENT_OPTION,
    CALIBRATION_OPTION,
    CATEGORIES_OPTION,
    DATASET_ARGUMENTS,
    RUNTIME_OPTIONS,
    TRACKING_OPTIONS,
    TRAIN_VAL_SPLIT_OPTION,
    refuse,
    refuse_augment,
    runtime_config,
    with_options,
)
from patchcore.config_json import config_to_dict
from patchcore.configs import (
    IMAGE_SCORES,
    MAP_MODES,
    NORMALIZATIONS,
    RESIZE_MODES,
    SCHEDULES,
    BackboneConfig,
    DatasetConfig,
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
from patchcore.errors import ConfigurationError
from patchcore.presets import fastflow_backbone, fastflow_preset, with_settings
from patchcore.runtime import log_to_console

DEFAULT_IMAGESIZE_PX = 224
RESIZE_RATIO = 256 / 224  # of resize and crop, as in the defaults for 224 px
DEFAULT_GROUP = "group"
DEFAULT_BACKBONE = "resnet18"
MPDD = "mpdd"

# Where a typed option is in FastFlowConfig.
SETTING_PATHS: dict[str, tuple[str, ...]] = {
    "flow_steps": ("flow_steps",),
    "hidden_ratio": ("hidden_ratio",),
    "conv3x3_only": ("conv3x3_only",),
    "clamp": ("clamp",),
    "feature_noise": ("feature_noise",),
    "map_mode": ("map_mode",),
    "image_score": ("image_score",),
    "epochs": ("training", "epochs"),
    "lr": ("training", "lr"),
    "weight_decay": ("training", "weight_decay"),
    "schedule": ("training", "schedule"),
    "grad_clip": ("training", "grad_clip"),
    "patience": ("training", "patience"),
}
PATCH_OPTIONS = ("enable_patch_inference", "patch_size", "patch_stride", "low_memory")


@dataclass(frozen=True)
class TypedDataset:
    """The step `dataset` as typed; None where nothing was."""

    name: str
    path: str
    categories: tuple[str, ...]
    batch_size: int | None
    num_workers: int
    train_val_split: float
    limit_train: int | None
    limit_test: int | None
    resize: int | None
    imagesize: int | None
    resize_mode: str | None

    def config(self, preprocessing: PreprocessingConfig) -> DatasetConfig:
        return DatasetConfig(
            name=self.name,
            path=self.path,
            categories=self.categories,
            train_val_split=self.train_val_split,
            batch_size=DatasetConfig.batch_size if self.batch_size is None else self.batch_size,
            num_workers=self.num_workers,
            preprocessing=preprocessing,
            limit_train=self.limit_train,
            limit_test=self.limit_test,
        )


@dataclass(frozen=True)
class TypedFastFlow:
    """The options of the model as typed.

    Attributes:
        backbone: As typed; None if not.
        layers: As typed; empty for the backbone's own.
        weights: As in BackboneConfig; None if not typed.
        normalization: As in BackboneConfig; None if not typed.
        input_size: Side of the images that the backbone gets, px; None if not typed.
        use_class_specific: Take the preset of each class.
        settings: Every other option that was typed, by its name in SETTING_PATHS.
    """

    backbone: str | None
    layers: tuple[str, ...]
    weights: str | None
    normalization: str | None
    input_size: int | None
    use_class_specific: bool
    settings: Mapping[str, Any]

    def backbone_config(self) -> BackboneConfig:
        """Return the backbone, with the layers that stand for it when none is typed."""
        typed = self.backbone or DEFAULT_BACKBONE
        known = fastflow_backbone(typed)
        layers = self.layers or known.layers
        if not layers:
            raise ConfigurationError(f"backbone {typed!r} has no layers of its own here: name each with --layers")
        weights = self.weights or "pretrained"
        path = weights if weights in ("pretrained", "random") else os.path.abspath(weights)
        return BackboneConfig(known.name, layers, path, self.normalization or "imagenet")

    def config_of(self, category: str, batch_size: int | None) -> FastFlowConfig:
        """Return the configuration of a class: default, then preset, then what was typed; the later beats the earlier.

        Args:
            category: The class.
            batch_size: Images per step as typed; None leaves the default's or the preset's.
        """
        config = FastFlowConfig(self.backbone_config())
        if self.use_class_specific:
            config = with_settings(config, fastflow_preset(config.backbone.name, category).settings)
        batches = {} if batch_size is None else {"batch_size": batch_size}
        return with_settings(config, {**batches, **self.settings})

    def preprocessing(self, dataset: TypedDataset) -> PreprocessingConfig:
        """Return resize and crop: of the typed sizes, the backbone's or 224 px, which must not contradict each other.

        Raises:
            ConfigurationError: Two of them differ.
        """
        made_for = fastflow_backbone(self.backbone or DEFAULT_BACKBONE).input_size
        sizes = {"--imagesize": dataset.imagesize, "--input_size": self.input_size, "the backbone's size": made_for}
        given = {name: size for name, size in sizes.items() if size is not None}
        (first, size), *others = given.items() or [("default", DEFAULT_IMAGESIZE_PX)]
        for name, other in others:
            if other != size:
                raise ConfigurationError(
                    f"{first} is {size} but {name} is {other}: leave {first} out or make it {other}"
                )
        resize = round(size * RESIZE_RATIO) if dataset.resize is None else dataset.resize
        return PreprocessingConfig(resize, size, dataset.resize_mode or PreprocessingConfig.resize_mode)


def _shared() -> tuple[Callable[[Any], Any], ...]:
    """Return the run options that the step `fastflow` accepts as well; two different values are an error."""
    return (
        click.option("--log_group", default=None, help=f"Name of the run folder; {DEFAULT_GROUP} if left out."),
        click.option("--save_segmentation_images", is_flag=True, help="One picture per test image."),
        click.option("--save_model", is_flag=True, help="One model folder per class, with an export for plain torch."),
        click.option("--eval_only", is_flag=True, help="Evaluate --checkpoint, train nothing."),
        click.option("--checkpoint", default=None, help="Model folder, .pth export or bare state dict to evaluate."),
    )


MODEL_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--backbone", default=None, help=f"Backbone (see the README); {DEFAULT_BACKBONE} if left out."),
    click.option("--layers", multiple=True, help="Layer that gets a flow; repeatable; the backbone's own if left out."),
    click.option("--weights", default=None, help="pretrained (default), random or a path."),
    click.option("--normalization", type=click.Choice(NORMALIZATIONS), help="imagenet (default) or the backbone's."),
    click.option("--flow_steps", type=int, default=None, help="Coupling steps per flow; 8 if left out."),
    click.option("--hidden_ratio", type=float, default=None, help="Width of a coupling network; 1.0 if left out."),
    click.option("--conv3x3_only", is_flag=True, default=None, help="3x3 convolutions alone, not 1x1 in turn."),
    click.option("--clamp", type=float, default=None, help="Largest log-scale of a coupling; 2.0 if left out."),
    click.option("--input_size", type=int, default=None, help="Side of the backbone's input, px; 224 if left out."),
    click.option("--map_mode", type=click.Choice(MAP_MODES), help="How likelihoods become a map; nll if left out."),
    click.option("--image_score", type=click.Choice(IMAGE_SCORES), help="What of a map is the score; max if left out."),
    click.option("--use_class_specific", is_flag=True, help="The preset of each class; typed options still win."),
    click.option("--enable_patch_inference", is_flag=True, help="Refused: not available yet."),
    click.option("--patch_size", type=int, default=None, help="Side of a tile, px."),
    click.option("--patch_stride", type=int, default=None, help="Distance of tiles, px."),
    click.option("--low_memory", is_flag=True, help="Score tiles in bounded batches."),
)

TRAINING_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--epochs", type=int, default=None, help="Passes over the training images; 50 if left out."),
    click.option("--lr", type=float, default=None, help="Highest learning rate; 1e-3 if left out."),
    click.option("--weight_decay", type=float, default=None, help="Decoupled weight decay; 1e-5 if left out."),
    click.option("--schedule", type=click.Choice(SCHEDULES), help="Of the learning rate; one_cycle if left out."),
    click.option("--grad_clip", type=float, default=None, help="Longest gradient; 1.0 if left out, 0 for none."),
    click.option("--feature_noise", type=float, default=None, help="Noise on training features; 0 if left out."),
    click.option(
        "--patience", type=int, default=None, help="Stop after so many epochs without progress on held-out images."
    ),
)


def _typed_model(options: Mapping[str, Any]) -> TypedFastFlow:
    """Gather the options of MODEL_OPTIONS and TRAINING_OPTIONS."""
    for name in PATCH_OPTIONS:
        refuse(f"--{name}", options[name] or None, None, "tiles are not scored yet")
    settings = {name: options[name] for name in SETTING_PATHS if options.get(name) is not None}
    if settings.get("grad_clip") == 0:
        settings["grad_clip"] = None
    return TypedFastFlow(
        backbone=options["backbone"],
        layers=options["layers"],
        weights=options["weights"],
        normalization=options["normalization"],
        input_size=options["input_size"],
        use_class_specific=options["use_class_specific"],
        settings=settings,
    )


@click.group("run_fastflow", cls=ChainedCommand, required_steps=("dataset", "fastflow"))
@click.argument("results_path")
@with_options(
    *RUNTIME_OPTIONS,
    click.option("--seed", "seeds", type=int, multiple=True, default=(0,), show_default=True, help="Repeatable."),
    click.option("--log_project", default="project", show_default=True, help="Folder above the run folder."),
    *_shared(),
    click.option("--save_anomaly_scores", is_flag=True, help="Raw anomaly maps beside the image scores."),
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
    log_project: str,
    save_anomaly_scores: bool,
    skip_existing: bool,
    calibration: str,
    log_online: bool,
    tensorboard: bool,
    **shared: Any,
) -> int:
    step = dict(steps)
    dataset: TypedDataset = step["dataset"]
    model, epochs, shared_of_step = step["fastflow"]
    joined = {name: _one_value(f"--{name}", value, shared_of_step[name]) for name, value in shared.items()}
    run = RunConfig(
        results_path=results_path,
        log_project=log_project,
        log_group=joined["log_group"] or DEFAULT_GROUP,
        seeds=seeds,
        calibration=calibration,
        outputs=OutputConfig(joined["save_segmentation_images"], joined["save_model"], save_anomaly_scores),
        skip_existing=skip_existing,
        runtime=runtime_config(gpus, device, threads),
        tracking=TrackingConfig(log_online, tensorboard),
        epochs=epochs,
    )
    checkpoint = joined["checkpoint"]
    if joined["eval_only"] != (checkpoint is not None):
        found, missing = ("--eval_only", "--checkpoint") if checkpoint is None else ("--checkpoint", "--eval_only")
        raise click.UsageError(f"{found} without {missing}: type both to evaluate a stored model, or neither to train")
    if checkpoint is not None:
        save_folder = str(Path(results_path) / log_project / run.log_group)
        return _evaluate((checkpoint,), model, dataset, save_folder, run.outputs, run.runtime)
    return _train(model, dataset, run)


def _one_value(option: str, of_command: Any, of_step: Any) -> Any:
    """Return what was typed of an option that both command and step accept."""
    if of_command and of_step and of_command != of_step:
        raise click.UsageError(f"{option} is {of_command!r} and, on fastflow, {of_step!r}: type it once")
    return of_command or of_step


def _train(model: TypedFastFlow, typed: TypedDataset, run: RunConfig) -> int:
    dataset = typed.config(model.preprocessing(typed))
    if "patience" in model.settings and dataset.train_val_split == 1:
        raise click.UsageError(
            "--patience watches held-out images, --train_val_split 1 holds none out: give a smaller share, such as 0.8"
        )
    log_to_console()
    quiet_libraries()
    from patchcore.pipeline import train_and_evaluate

    def config_of(category: str) -> FastFlowConfig:
        return model.config_of(category, typed.batch_size)

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
    refuse("--train_val_split", dataset.train_val_split, 1.0, "stored models are not trained again")
    refuse("--limit_train", dataset.limit_train, None, "stored models are not trained again")
    log_to_console()
    quiet_libraries()
    from patchcore.pipeline import (
        ModelHeader,
        TypedModel,
        TypedPreprocessing,
        TypedSetting,
        load_and_evaluate,
        typed_header,
    )

    settings = [TypedSetting(f"--{name}", SETTING_PATHS[name], value) for name, value in model.settings.items()]
    if model.backbone is not None:
        settings.append(TypedSetting("--backbone", ("backbone", "name"), fastflow_backbone(model.backbone).name))
    if model.layers:
        settings.append(TypedSetting("--layers", ("backbone", "layers"), list(model.layers)))
    if model.weights in ("pretrained", "random"):
        settings.append(TypedSetting("--weights", ("backbone", "weights"), model.weights))
    if model.normalization is not None:
        settings.append(TypedSetting("--normalization", ("backbone", "normalization"), model.normalization))

    def describe(category: str) -> ModelHeader:
        config = config_to_dict(model.config_of(category, None))
        return typed_header("fastflow", config, model.preprocessing(dataset), dataset.name, category)

    imagesize = _one_value("--imagesize", dataset.imagesize, model.input_size)
    complete = load_and_evaluate(
        methods=("fastflow",),
        model_paths=paths,
        typed=TypedPreprocessing(dataset.resize, imagesize, dataset.resize_mode),
        dataset=dataset.config(PreprocessingConfig()),
        save_folder=save_folder,
        outputs=outputs,
        runtime=runtime,
        search=SearchConfig(),
        announce=announce,
        typed_model=TypedModel(tuple(settings), describe if model.backbone is not None else None),
    )
    return 0 if complete else EXIT_FAILED


@click.command(
    "dataset",
    cls=ShortenedStep,
    shortened_by="--category",
    short_help="What to read: --category CLASS DATA_PATH, or [-d CLASS ...] mvtec|mpdd|folder DATA_PATH",
)
@with_options(
    CATEGORIES_OPTION,
    click.option("--category", default=None, help="The one class; the name of the data set is left out then."),
    click.option("--dataset_name", default=None, help=f"Data set of --category; {MPDD} if left out."),
    TRAIN_VAL_SPLIT_OPTION,
    click.option("--resize", type=int, default=None, help="Length after the resize, px; 256 for 224 px images."),
    click.option("--imagesize", type=int, default=None, help="Side of the centre crop, px; 224 if left out."),
    click.option("--resize_mode", type=click.Choice(RESIZE_MODES), help="What --resize gives; shorter if left out."),
    click.option("--batch_size", type=int, default=None, help="Images per batch, and per step of the training."),
    click.option(
        "--num_workers", type=int, default=8, show_default=True, help="Processes that read images, at most one a core."
    ),
    click.option("--limit_train", type=int, default=None, help="Train on so many images, drawn with the seed."),
    click.option("--limit_test", type=int, default=None, help="Test on so many images per defect type."),
    click.option("--preserve_high_res", is_flag=True, help="Refused: not available yet."),
    click.option("--max_side", type=int, default=None, help="Refused: not available yet."),
    AUGMENT_OPTION,
    *DATASET_ARGUMENTS,
)
def fastflow_dataset_step(
    name: str,
    data_path: str,
    categories: tuple[str, ...],
    category: str | None,
    dataset_name: str | None,
    augment: bool,
    preserve_high_res: bool,
    max_side: int | None,
    **typed: Any,
) -> tuple[str, TypedDataset]:
    """Read images in the MVTec AD layout: DATA_PATH holds the classes."""
    refuse_augment(augment)
    refuse("--preserve_high_res", preserve_high_res or None, None, "tiles are not scored yet")
    refuse("--max_side", max_side, None, "tiles are not scored yet")
    if category is not None and categories not in ((), (category,)):
        raise click.UsageError(f"--category {category} and -d {' '.join(categories)}: name classes with one of the two")
    if name and dataset_name not in (None, name):
        raise click.UsageError(f"the data set is {name!r} and --dataset_name {dataset_name!r}: name it once")
    chosen = (category,) if category is not None else categories
    return "dataset", TypedDataset(name or dataset_name or MPDD, data_path, chosen, **typed)


@run_fastflow.command("fastflow", short_help="The method: --backbone BACKBONE [OPTIONS]")
@with_options(
    *MODEL_OPTIONS,
    *TRAINING_OPTIONS,
    click.option(
        "--eval_every", type=int, default=None, help="Show test metrics after so many epochs; selects nothing."
    ),
    click.option(
        "--checkpoint_every", type=int, default=10, show_default=True, help="Epochs between checkpoints for --resume."
    ),
    *_shared(),
)
def fastflow_step(
    eval_every: int | None,
    checkpoint_every: int,
    log_group: str | None,
    save_segmentation_images: bool,
    save_model: bool,
    eval_only: bool,
    checkpoint: str | None,
    **options: Any,
) -> tuple[str, tuple[TypedFastFlow, EpochConfig, dict[str, Any]]]:
    """FastFlow: backbone, flows, training, maps."""
    shared = {
        "log_group": log_group,
        "save_segmentation_images": save_segmentation_images,
        "save_model": save_model,
        "eval_only": eval_only,
        "checkpoint": checkpoint,
    }
    return "fastflow", (_typed_model(options), EpochConfig(eval_every, checkpoint_every), shared)


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
)
def fastflow_loader_step(paths: tuple[str, ...], **options: Any) -> tuple[str, tuple[tuple[str, ...], TypedFastFlow]]:
    """Name the models; what is typed of them must agree with what they say."""
    return "fastflow_loader", (paths, _typed_model(options))


run_fastflow.add_command(fastflow_dataset_step)
load_and_evaluate_fastflow.add_command(fastflow_dataset_step)

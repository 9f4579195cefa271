"""The options that the FastFlow commands share, and their step `dataset`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from patchcore.cli.grammar import ShortenedStep
from patchcore.cli.steps import (
    AUGMENT_OPTION,
    CATEGORIES_OPTION,
    DATASET_ARGUMENTS,
    TRAIN_VAL_SPLIT_OPTION,
    refuse_augment,
    with_options,
)
from patchcore.cli.training_options import training_options
from patchcore.cli.typed_dataset import DEFAULT_MAX_SIDE_PX, TYPED_READING_OPTIONS, TypedDataset
from patchcore.cli.typed_fastflow import DEFAULT_BACKBONE, SETTING_PATHS, TypedFastFlow, TypedTiles
from patchcore.configs import (
    IMAGE_SCORES,
    MAP_MODES,
    NORMALIZATIONS,
    PRECISIONS,
    RESIZE_MODES,
    SMOOTHINGS,
    TrainingConfig,
)

MPDD = "mpdd"

MODEL_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--backbone", default=None, help=f"Backbone (see the README); {DEFAULT_BACKBONE} if left out."),
    click.option("--layers", multiple=True, help="Layer that gets a flow; repeatable; the backbone's own if left out."),
    click.option("--weights", default=None, help="pretrained (default), random or a path."),
    click.option("--normalization", type=click.Choice(NORMALIZATIONS), help="imagenet (default) or the backbone's."),
    click.option("--flow_steps", type=int, default=None, help="Coupling steps per flow; 8 if left out."),
    click.option("--hidden_ratio", type=float, default=None, help="Width of a coupling network; 1.0 if left out."),
    click.option("--conv3x3_only", is_flag=True, default=None, help="3x3 convolutions alone, not 1x1 in turn."),
    click.option("--clamp", type=float, default=None, help="Largest log-scale of a coupling; 2.0 if left out."),
    click.option("--precision", type=click.Choice(PRECISIONS), help="Arithmetic of the flows; float32 if left out."),
    click.option("--input_size", type=int, default=None, help="Side of the backbone's input, px; 224 if left out."),
    click.option("--map_mode", type=click.Choice(MAP_MODES), help="How likelihoods become maps; prob if left out."),
    click.option("--image_score", type=click.Choice(IMAGE_SCORES), help="What of a map is the score; max if left out."),
    click.option(
        "--use_class_specific",
        is_flag=True,
        help="The preset of each class; typed options still win, and so does what a stored model says of itself.",
    ),
)

TILE_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--enable_patch_inference", is_flag=True, help="Train on and score overlapping tiles of the images."),
    click.option("--patch_size", type=int, default=None, help="Side of a tile, px; the input size if left out."),
    click.option("--patch_stride", type=int, default=None, help="Distance of tiles, px; half a tile if left out."),
    click.option("--training_tiles", type=int, default=None, help="Tiles drawn per training image; 4 if left out."),
    click.option("--low_memory", is_flag=True, help="Score tiles in bounded batches; the maps stay the same."),
)

POST_PROCESSING_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--smoothing", type=click.Choice(SMOOTHINGS), help="Of the maps; none if left out."),
    click.option("--smoothing_px", type=float, default=None, help="Its sigma or radius, px; 4 if left out."),
    click.option(
        "--adaptive_normalization", is_flag=True, default=None, help="Measure each map from its own median and spread."
    ),
    click.option(
        "--multi_scale",
        type=float,
        multiple=True,
        help="Size at which each image is scored, as a multiple; repeatable, the maps are averaged; 1 if left out.",
    ),
)

TRAINING_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    *training_options(TrainingConfig()),
    click.option("--feature_noise", type=float, default=None, help="Noise on training features; 0 if left out."),
)


def typed_fastflow(options: Mapping[str, Any]) -> TypedFastFlow:
    """Gather the options of the model; TRAINING_OPTIONS may be missing."""
    settings = {name: options[name] for name in SETTING_PATHS if options.get(name) not in (None, ())}
    if settings.get("grad_clip") == 0:
        settings["grad_clip"] = None
    if "multi_scale" in settings:
        settings["multi_scale"] = list(settings["multi_scale"])
    return TypedFastFlow(
        backbone=options["backbone"],
        layers=options["layers"],
        weights=options["weights"],
        normalization=options["normalization"],
        input_size=options["input_size"],
        use_class_specific=options["use_class_specific"],
        tiles=TypedTiles(
            enabled=options["enable_patch_inference"],
            patch_size=options["patch_size"],
            patch_stride=options["patch_stride"],
            training_tiles=options["training_tiles"],
            low_memory=options["low_memory"],
        ),
        settings=settings,
    )


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
    click.option(
        "--resize",
        type=int,
        default=None,
        help="Length after the resize, px; 256 for 224 px images; no effect with --preserve_high_res.",
    ),
    click.option(
        "--imagesize",
        type=int,
        default=None,
        help="Side of the centre crop or, with --preserve_high_res, of the resized tiles, px; 224 if left out.",
    ),
    click.option("--resize_mode", type=click.Choice(RESIZE_MODES), help="What --resize gives; shorter if left out."),
    click.option("--preserve_high_res", is_flag=True, help="Keep images whole and at their own resolution, for tiles."),
    click.option(
        "--max_side",
        type=int,
        default=None,
        help=f"Longest side with --preserve_high_res, px; {DEFAULT_MAX_SIDE_PX} if left out.",
    ),
    *TYPED_READING_OPTIONS,
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
    **typed: Any,
) -> tuple[str, TypedDataset]:
    """Read images in the MVTec AD layout: DATA_PATH holds the classes."""
    refuse_augment(augment)
    if category is not None and categories not in ((), (category,)):
        raise click.UsageError(f"--category {category} and -d {' '.join(categories)}: name classes with one of the two")
    if name and dataset_name not in (None, name):
        raise click.UsageError(f"the data set is {name!r} and --dataset_name {dataset_name!r}: name it once")
    chosen = (category,) if category is not None else categories
    if dataset_name is None:  # an empty name is no default where one was to be typed: a variable may be unset
        dataset_name = name if category is None else MPDD
    return "dataset", TypedDataset(dataset_name, data_path, chosen, **typed)

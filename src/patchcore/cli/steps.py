"""The steps and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from patchcore.configs import (
    BACKBONE_PRECISIONS,
    CALIBRATION_METHODS,
    LAUNCHERS,
    LOCAL,
    RESIZE_MODES,
    DatasetConfig,
    PreprocessingConfig,
    SamplerConfig,
    ThresholdRule,
)
from patchcore.configs.typed import TypedSetting

F = TypeVar("F", bound=Callable[..., Any])


def with_options(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Apply several click decorators, the first one listed first in --help."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def not_empty(ctx: click.Context, option: click.Parameter, path: str | None) -> str | None:
    """Refuse an empty path, which would mean the working directory; a callback of click options."""
    if path is not None and not path.strip():
        raise click.UsageError(f"{option.opts[0]} is empty, expected a path: is a variable not set?")
    return path


RUNTIME_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--gpu", "gpus", type=int, multiple=True, default=(0,), show_default=True, help="GPU index; the first is used."
    ),
    click.option(
        "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps; auto takes --gpu if any."
    ),
    click.option("--threads", type=int, default=None, help="CPU threads; torch's own choice if left out."),
)

PRECISION_OPTION = click.option(
    "--precision",
    type=click.Choice(BACKBONE_PRECISIONS),
    default="float32",
    show_default=True,
    help="Numbers of the backbone; auto: the fastest that this device computes with in hardware.",
)

CALIBRATION_OPTION = click.option(
    "--calibration",
    type=click.Choice(CALIBRATION_METHODS),
    default="kfold",
    show_default=True,
    help="Normal images for thresholds: out-of-fold training images, held-out ones, or none.",
)

THRESHOLD_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--threshold_rule",
        default=str(ThresholdRule()),
        show_default=True,
        help="mean3std, quantile:Q (a share Q of good images stays below), or f1 (highest F1 on --validation_data).",
    ),
    click.option(
        "--validation_data",
        "validation_path",
        default=None,
        help="Good and defective images for f1, in the layout of DATA_PATH: test and ground_truth are read.",
    ),
)


TRACKING_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--log_online", is_flag=True, help="Send the numbers to Weights & Biases, project --log_project."),
    click.option("--tensorboard", is_flag=True, help="Write the numbers as TensorBoard event files."),
)


RAY_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--ray_address", default=None, help="Ray cluster, HOST:PORT or auto; one is started here if left out."
    ),
    click.option(
        "--gpus_per_task", type=float, default=None, help="GPUs of a Ray task; 1 if left out and the cluster has any."
    ),
    click.option("--cpus_per_task", type=int, default=None, help="Cores of a Ray task; --threads if left out, else 1."),
)

LAUNCH_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--launcher",
        type=click.Choice(LAUNCHERS),
        default=LOCAL,
        show_default=True,
        help="Where the tasks of a run, one per class and seed, execute: on this machine or on a Ray cluster.",
    ),
    click.option(
        "--workers",
        type=int,
        default=None,
        help="Processes of --launcher local; of several --gpu each gets one. If left out, this process does it all.",
    ),
    *RAY_OPTIONS,
)


PREPROCESSING_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--resize", type=int, default=256, show_default=True, help="Length after the resize, px."),
    click.option("--imagesize", type=int, default=224, show_default=True, help="Side of the centre crop, px."),
    click.option(
        "--resize_mode",
        type=click.Choice(RESIZE_MODES),
        default="shorter",
        show_default=True,
        help="What --resize gives: the shorter side, both sides, or the longer side with padding.",
    ),
)

READING_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--batch_size", type=int, default=2, show_default=True, help="Images per batch, at least."),
    click.option(
        "--num_workers",
        type=int,
        default=8,
        show_default=True,
        help="Threads that read images, at most one a core.",
    ),
    click.option("--limit_test", type=int, default=None, help="Test on so many images per defect type."),
)

CATEGORIES_OPTION = click.option(
    "-d",
    "--subdatasets",
    "categories",
    multiple=True,
    help="Class; repeatable; every class found if left out.",
)

TRAIN_VAL_SPLIT_OPTION = click.option(
    "--train_val_split", type=float, default=1.0, show_default=True, help="Share of the training images trained on."
)

AUGMENT_OPTION = click.option("--augment", is_flag=True, help="Refused: no method here trains on augmented images yet.")


def refuse(option: str, value: object, default: object, reason: str) -> None:
    """Refuse a value that would change nothing: an option without effect misleads."""
    if value != default:
        typed = option if value is True else f"{option} {value}"
        has_no_default = default is None or default is False or default == ()
        remedy = "leave it out" if has_no_default else f"use {default} or leave it out"
        raise click.UsageError(f"{typed} is not available, {reason}: {remedy}")


def refuse_augment(augment: bool) -> None:
    if augment:
        raise click.UsageError("--augment is not available: the original declares it without any effect: leave it out")


def typed_preprocessing(resize: int | None, imagesize: int | None, resize_mode: str | None) -> list[TypedSetting]:
    """Return what was typed of resize and crop, which stored models have to agree with."""
    values = {"resize_px": resize, "imagesize_px": imagesize, "resize_mode": resize_mode}
    return [
        TypedSetting(f"--{name.removesuffix('_px')}", ("preprocessing", name), value)
        for name, value in values.items()
        if value is not None
    ]


DATASET_ARGUMENTS: tuple[Callable[[Any], Any], ...] = (
    click.argument("name"),
    click.argument("data_path"),
)


@click.command("dataset", short_help="What to read: [OPTIONS] mvtec|mpdd|folder DATA_PATH")
@with_options(
    CATEGORIES_OPTION,
    TRAIN_VAL_SPLIT_OPTION,
    *PREPROCESSING_OPTIONS,
    *READING_OPTIONS,
    click.option("--limit_train", type=int, default=None, help="Train on so many images, drawn with the seed."),
    AUGMENT_OPTION,
    *DATASET_ARGUMENTS,
)
def dataset_step(
    name: str,
    data_path: str,
    categories: tuple[str, ...],
    train_val_split: float,
    resize: int,
    imagesize: int,
    resize_mode: str,
    batch_size: int,
    num_workers: int,
    limit_train: int | None,
    limit_test: int | None,
    augment: bool,
) -> tuple[str, DatasetConfig]:
    """Read images in the MVTec AD layout: NAME is mvtec, mpdd or folder, DATA_PATH holds the classes."""
    refuse_augment(augment)
    config = DatasetConfig(
        name=name,
        path=data_path,
        categories=categories,
        train_val_split=train_val_split,
        batch_size=batch_size,
        num_workers=num_workers,
        preprocessing=PreprocessingConfig(resize, imagesize, resize_mode),
        limit_train=limit_train,
        limit_test=limit_test,
    )
    return "dataset", config


@click.command("dataset", short_help="What to read: [OPTIONS] mvtec|mpdd|folder DATA_PATH")
@with_options(
    CATEGORIES_OPTION,
    click.option("--resize", type=int, default=None, help="The model's; a typed one must agree."),
    click.option("--imagesize", type=int, default=None, help="The model's; a typed one must agree."),
    click.option("--resize_mode", type=click.Choice(RESIZE_MODES), help="The model's; a typed one must agree."),
    *READING_OPTIONS,
    click.option("--train_val_split", type=float, default=1.0, help="Only 1: stored models are not trained again."),
    AUGMENT_OPTION,
    *DATASET_ARGUMENTS,
)
def stored_dataset_step(
    name: str,
    data_path: str,
    categories: tuple[str, ...],
    train_val_split: float,
    resize: int | None,
    imagesize: int | None,
    resize_mode: str | None,
    batch_size: int,
    num_workers: int,
    limit_test: int | None,
    augment: bool,
) -> tuple[str, tuple[DatasetConfig, list[TypedSetting]]]:
    """Read the test images; resize and crop are those of the models, typed ones must agree."""
    refuse("--train_val_split", train_val_split, 1.0, "stored models are not trained again")
    refuse_augment(augment)
    dataset = DatasetConfig(
        name=name,
        path=data_path,
        categories=categories,
        batch_size=batch_size,
        num_workers=num_workers,
        limit_test=limit_test,
    )
    return "dataset", (dataset, typed_preprocessing(resize, imagesize, resize_mode))


@click.command("sampler", short_help="Memory bank: [-p SHARE] identity|random|greedy_coreset|approx_greedy_coreset")
@click.option("-p", "--percentage", type=float, default=0.1, show_default=True, help="Share of the patches kept.")
@click.argument("name")
def sampler_step(name: str, percentage: float) -> tuple[str, SamplerConfig]:
    """Choose the memory bank: NAME is identity, random, greedy_coreset or approx_greedy_coreset."""
    return "sampler", SamplerConfig(name, percentage)

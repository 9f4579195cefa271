"""The options of every method that is trained in epochs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import click

from patchcore.configs import SCHEDULES, TrainingConfig

DEFAULT_CHECKPOINT_EVERY = 10

EPOCH_OPTIONS: tuple[Callable[[Any], Any], ...] = (
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
)


def training_options(defaults: TrainingConfig) -> tuple[Callable[[Any], Any], ...]:
    """Return the options of the gradient loop, None where not typed, with the defaults in their help."""
    clip = "none if left out" if defaults.grad_clip is None else f"{defaults.grad_clip:g} if left out, 0 for none"
    return (
        click.option(
            "--epochs", type=int, default=None, help=f"Passes over the training images; {defaults.epochs} if left out."
        ),
        click.option("--lr", type=float, default=None, help=f"Highest learning rate; {defaults.lr:g} if left out."),
        click.option(
            "--weight_decay",
            type=float,
            default=None,
            help=f"Decoupled weight decay; {defaults.weight_decay:g} if left out.",
        ),
        click.option(
            "--schedule",
            type=click.Choice(SCHEDULES),
            help=f"Of the learning rate; {defaults.schedule} if left out.",
        ),
        click.option("--grad_clip", type=float, default=None, help=f"Longest gradient; {clip}."),
        click.option(
            "--patience", type=int, default=None, help="Stop after so many epochs without progress on held-out images."
        ),
    )


def typed_training(defaults: TrainingConfig, typed: Mapping[str, Any]) -> TrainingConfig:
    """Return a training with what was typed of `training_options`."""
    settings = {name: value for name, value in typed.items() if value is not None}
    if settings.get("grad_clip") == 0:
        settings["grad_clip"] = None
    return replace(defaults, **settings)


def require_held_out_for(patience: int | None, train_val_split: float) -> None:
    """Refuse early stopping where no images are held out."""
    if patience is not None and train_val_split == 1:
        raise click.UsageError(
            "--patience watches held-out images, --train_val_split 1 holds none out: give a smaller share, such as 0.8"
        )

"""The step `dataset` of the commands that train in epochs, as it was typed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from patchcore.cli.steps import typed_preprocessing
from patchcore.configs import DatasetConfig, PreprocessingConfig, TrainingConfig
from patchcore.configs.typed import ANY_VALUE, TypedSetting
from patchcore.errors import ConfigurationError

DEFAULT_IMAGESIZE_PX = 224
DEFAULT_MAX_SIDE_PX = 1024
RESIZE_RATIO = 256 / 224  # of resize and crop, as in the defaults for 224 px

TYPED_READING_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--batch_size", type=int, default=None, help="Images per batch, and per step of the training."),
    click.option(
        "--num_workers", type=int, default=8, show_default=True, help="Threads that read images, at most one a core."
    ),
    click.option("--limit_train", type=int, default=None, help="Train on so many images, drawn with the seed."),
    click.option("--limit_test", type=int, default=None, help="Test on so many images per defect type."),
)


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
    preserve_high_res: bool = False
    max_side: int | None = None

    def config(self, preprocessing: PreprocessingConfig) -> DatasetConfig:
        return DatasetConfig(
            name=self.name,
            path=self.path,
            categories=self.categories,
            train_val_split=self.train_val_split,
            batch_size=TrainingConfig.batch_size if self.batch_size is None else self.batch_size,
            num_workers=self.num_workers,
            preprocessing=preprocessing,
            limit_train=self.limit_train,
            limit_test=self.limit_test,
        )

    def preprocessing(self, imagesize_px: int) -> PreprocessingConfig:
        """Return how images become what a detector sees.

        Args:
            imagesize_px: Side of the centre crop, or of the resized tiles of images that keep their resolution.

        Raises:
            ConfigurationError: An option that has no effect beside the others was typed.
        """
        usual_resize = round(imagesize_px * RESIZE_RATIO)
        if not self.preserve_high_res:
            if self.max_side is not None:
                raise ConfigurationError(
                    f"--max_side {self.max_side} bounds images that keep their resolution: type --preserve_high_res "
                    "as well, or leave --max_side out"
                )
            resize = usual_resize if self.resize is None else self.resize
            return PreprocessingConfig(resize, imagesize_px, self.resize_mode or PreprocessingConfig.resize_mode)
        if self.resize_mode is not None:
            raise ConfigurationError(
                f"--resize_mode {self.resize_mode} has no effect with --preserve_high_res, which keeps the shape of "
                "each image: leave one of the two out"
            )
        max_side = DEFAULT_MAX_SIDE_PX if self.max_side is None else self.max_side
        return PreprocessingConfig(usual_resize, imagesize_px, max_side_px=max_side)

    def stored_settings(self) -> list[TypedSetting]:
        """Return what stored models have to agree with."""
        settings = typed_preprocessing(self.resize, self.imagesize, self.resize_mode)
        path = ("preprocessing", "max_side_px")
        if self.preserve_high_res:
            settings.append(TypedSetting("--preserve_high_res", path, ANY_VALUE))
        if self.max_side is not None:
            settings.append(TypedSetting("--max_side", path, self.max_side))
        return settings

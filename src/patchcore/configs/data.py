"""Configurations of images and data sets."""

from __future__ import annotations

from dataclasses import dataclass, field

from patchcore.configs.checks import require_at_least, require_choice, require_fraction
from patchcore.errors import ConfigurationError

RESIZE_MODES = ("shorter", "square", "letterbox")
DEMO_CATEGORIES = ("metal_plate", "bracket_black", "bracket_brown", "bracket_white")


@dataclass(frozen=True)
class PreprocessingConfig:
    """From an image file to the square that a detector sees.

    Attributes:
        resize_px: Length that the resize gives: of the shorter side ("shorter"), of both sides ("square") or
            of the longer side, the rest padded ("letterbox").
        imagesize_px: Side of the square cut from the centre afterwards, <= resize_px.
        resize_mode: One of RESIZE_MODES.
        max_side_px: Keep each image whole and at its own resolution, but its longer side no longer than this; there is
            neither resize nor crop then, and `imagesize_px` is the size of the backbone's input. None: resize and crop.
    """

    resize_px: int = 256
    imagesize_px: int = 224
    resize_mode: str = "shorter"
    max_side_px: int | None = None

    def __post_init__(self) -> None:
        require_choice("resize mode", self.resize_mode, RESIZE_MODES)
        require_at_least("--imagesize", self.imagesize_px, 32, 8192)
        require_at_least("--resize", self.resize_px, 32, 16384)
        if self.max_side_px is not None:
            require_at_least("--max_side", self.max_side_px, 32, 16384)
        if self.imagesize_px > self.resize_px:
            raise ConfigurationError(
                f"--imagesize {self.imagesize_px} is larger than --resize {self.resize_px}: a crop cannot be larger "
                f"than the resized image, use --resize {self.imagesize_px} or more"
            )


@dataclass(frozen=True)
class DatasetConfig:
    """Which images a run reads, and how.

    Attributes:
        name: Name in the registry of data sets, for example "mpdd".
        path: Folder that holds one folder per class.
        categories: Classes to process; empty means every class found.
        train_val_split: Share of the training images used for training, in (0, 1]; the rest is held out.
        batch_size: Images per batch, at least; ten images of 224 px, or as many pixels, are put together in any case.
        num_workers: Threads that read images ahead; at most one per CPU core is started, 0 reads none ahead.
        preprocessing: Resize and crop.
        limit_train: Use so many training images per class, drawn with the seed; None uses all.
        limit_test: Use so many test images per defect type, the same ones for every seed; None uses all.
    """

    name: str
    path: str
    categories: tuple[str, ...] = ()
    train_val_split: float = 1.0
    batch_size: int = 2
    num_workers: int = 8
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    limit_train: int | None = None
    limit_test: int | None = None

    def __post_init__(self) -> None:
        require_fraction("--train_val_split", self.train_val_split)
        require_at_least("--batch_size", self.batch_size, 1, 65536)
        require_at_least("--num_workers", self.num_workers, 0)
        if self.limit_train is not None:
            require_at_least("--limit_train", self.limit_train, 1)
        if self.limit_test is not None:
            require_at_least("--limit_test", self.limit_test, 1)
        repeated = sorted({c for c in self.categories if self.categories.count(c) > 1})
        if repeated:
            raise ConfigurationError(f"class {', '.join(repeated)} is named more than once: name each -d once")


@dataclass(frozen=True)
class DemoConfig:
    """The rendered demo set.

    Attributes:
        categories: Names from DEMO_CATEGORIES.
        image_size_px: Side of the square images, >= 64.
        num_train: Training images per category, >= 1.
        num_test_good: Good test images per category, >= 0.
        num_test_defect: Test images per defect type, >= 0.
        seed: Same seed, same bytes; >= 0.
    """

    categories: tuple[str, ...] = DEMO_CATEGORIES
    image_size_px: int = 256
    num_train: int = 40
    num_test_good: int = 16
    num_test_defect: int = 10
    seed: int = 0


@dataclass(frozen=True)
class TrainingSource:
    """What a model was trained on; with the seed it also derives the seeds of every random choice.

    Attributes:
        dataset: Name of the data set.
        category: Class of the part.
        seed: Seed of the run.
    """

    dataset: str = ""
    category: str = ""
    seed: int = 0

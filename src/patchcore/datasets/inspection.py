"""Images of one class in the MVTec AD folder layout: listing, and pairing with masks.

<root>/<category>/train/good/*.png
<root>/<category>/test/<defect_type>/*.png          "good" holds normal images
<root>/<category>/ground_truth/<defect_type>/*_mask.png
"""

from __future__ import annotations

import copy
import difflib
import enum
import functools
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from patchcore.configs import DatasetConfig, PreprocessingConfig
from patchcore.datasets.images import (
    crop_image,
    crop_labels,
    place,
    place_of_file,
    read_image,
    read_mask,
    size_mismatch,
    upright_size,
)
from patchcore.errors import ConfigurationError, DataError
from patchcore.runtime import derive_seed, progress

LOGGER = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
GOOD = "good"
DARK_LEVEL = 32  # 12 bits that a camera stored as 16 reach 16 of 255

T = TypeVar("T")


class DatasetSplit(enum.Enum):
    """Part of a data set."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


@dataclass(frozen=True)
class ImageRecord:
    """One image file.

    Attributes:
        path: The file.
        category: Class of the part.
        defect_type: Folder of a test image; "good" for normal ones.
        mask_path: Ground truth of an anomalous image; None where the class has no ground truth at all.
    """

    path: Path
    category: str
    defect_type: str
    mask_path: Path | None = None

    @property
    def is_anomalous(self) -> bool:
        return self.defect_type != GOOD


@dataclass(frozen=True)
class Fault:
    """Something in the folders of a class at which a run stops.

    Attributes:
        kind: "same name", "two masks", "missing mask" or "mask without image".
        path: The file.
        message: One line for the user.
    """

    kind: str
    path: Path
    message: str


def list_images(folder: Path) -> list[Path]:
    """Return the image files of a folder, sorted by name; hidden files and other kinds are passed over.

    A link whose target is gone counts as a file: reading it fails by name, where passing it over would silently
    shrink the set.

    Raises:
        DataError: Two files differ in their suffix alone, so that masks and pictures could not be told apart.
    """
    return _without_faults(*survey_images(folder))


def survey_images(folder: Path) -> tuple[list[Path], list[Fault]]:
    """Return the image files of a folder, sorted by name, and the faults at which `list_images` stops."""
    paths = sorted(p for p in folder.iterdir() if is_image_file(p)) if folder.is_dir() else []
    faults: list[Fault] = []
    stems: dict[str, Path] = {}
    for path in paths:
        other = stems.setdefault(path.stem, path)
        if other is not path:
            message = f"{path}: {other.name} has the same name but for its suffix: rename one of them"
            faults.append(Fault("same name", path, message))
    return paths, faults


def _without_faults(found: list[T], faults: Sequence[Fault]) -> list[T]:
    if faults:
        raise DataError(faults[0].message)
    return found


def is_image_file(path: Path) -> bool:
    """Return whether a run reads a file as an image: by its suffix, and not hidden."""
    if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
        return False
    return path.is_file() or (path.is_symlink() and not path.exists())  # a broken link is reported when it is read


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder by name, without hidden ones such as .ipynb_checkpoints; none if it is missing."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def found_categories(root: Path) -> list[str]:
    """Return the names of the folders below `root` that look like a class (they hold `train` or `test`)."""
    return [p.name for p in subfolders(root) if (p / "train").is_dir() or (p / "test").is_dir()]


def list_train(root: Path, category: str) -> list[ImageRecord]:
    """List the normal training images of a class."""
    return [ImageRecord(p, category, GOOD) for p in list_images(root / category / "train" / GOOD)]


def list_test(root: Path, category: str) -> list[ImageRecord]:
    """List the test images of a class with their masks, paired by file name.

    A mask is called like its image, with or without "_mask" at the end. A class without any `ground_truth`
    folder has no masks; one with it has a mask for every anomalous image.

    Raises:
        DataError: An image has no mask, or a mask no image.
    """
    return _without_faults(*survey_test(root, category))


def survey_test(root: Path, category: str) -> tuple[list[ImageRecord], list[Fault]]:
    """List the test images of a class with the masks that there are, and the faults at which `list_test` stops."""
    test, truth = root / category / "test", root / category / "ground_truth"
    records: list[ImageRecord] = []
    faults: list[Fault] = []
    for folder in subfolders(test):
        images, found = survey_images(folder)
        faults += found
        masks: dict[str, Path] = {}
        if folder.name != GOOD and truth.is_dir():
            masks, found = _survey_masks(images, truth / folder.name)
            faults += found
        records += [ImageRecord(p, category, folder.name, masks.get(p.stem)) for p in images]
    for folder in subfolders(truth):
        if folder.name != GOOD and not (test / folder.name).is_dir():
            faults += _survey_masks([], folder)[1]
    return records, faults


def _survey_masks(images: Sequence[Path], truth: Path) -> tuple[dict[str, Path], list[Fault]]:
    """Return the masks in a folder by the name of their image, and what does not pair up."""
    paths, faults = survey_images(truth)
    masks: dict[str, Path] = {}
    for mask in paths:
        other = masks.setdefault(mask.stem.removesuffix("_mask"), mask)
        if other is not mask:
            message = f"{mask}: {other.name} is a mask of the same image: remove one of them"
            faults.append(Fault("two masks", mask, message))
    for image in images:
        if image.stem not in masks:
            expected = truth / f"{image.stem}_mask.png"
            remedy = f"add it, or remove the folder {truth.parent.name} of this class to measure image scores alone"
            faults.append(Fault("missing mask", image, f"{image}: no mask found, expected {expected}: {remedy}"))
    for name in sorted(masks.keys() - {image.stem for image in images}):
        orphan, place_of_image = masks[name], f"test/{truth.name}/{name}.png"
        message = f"{orphan}: a mask without an image, expected {place_of_image}: add it or remove the mask"
        faults.append(Fault("mask without image", orphan, message))
    return masks, faults


def draw(records: Sequence[ImageRecord], count: int, seed: int) -> list[ImageRecord]:
    """Draw `count` records without replacement (all if there are fewer), keeping their order."""
    if count >= len(records):
        return list(records)
    chosen = sorted(random.Random(seed).sample(range(len(records)), count))
    return [records[i] for i in chosen]


class InspectionDataset(Dataset[Any]):
    """Images of one class and split, resized and cropped.

    An item is a dictionary: `image` uint8 [3, H, W] RGB, `mask` uint8 [H, W] in {0, 1, IGNORED} (test images of
    a class with ground truth), `index` of its record. H = W = `imagesize_px`, unless `max_side_px` leaves each image
    its own size.

    Args:
        root: Folder of the data set.
        category: Class to read.
        split: TRAIN and VAL share the training images, TEST has the test images.
        preprocessing: Resize and crop.
        train_val_split: Share of the training images in TRAIN; VAL has the rest, drawn with the seed.
        limit: Use so many images only: of TRAIN drawn with the seed, of TEST for each defect type and the same
            ones for every seed, so that runs stay comparable.
        seed: Seed of the two draws.

    Raises:
        DataError: Images and masks do not pair up.
    """

    name: ClassVar[str] = "folder"
    categories: ClassVar[tuple[str, ...]] = ()  # the published classes; others are accepted too

    def __init__(
        self,
        root: str | Path,
        category: str,
        split: DatasetSplit = DatasetSplit.TRAIN,
        preprocessing: PreprocessingConfig | None = None,
        train_val_split: float = 1.0,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        self.root = Path(root)
        self.category = category
        self.split = split
        self.preprocessing = preprocessing or PreprocessingConfig()
        if split is DatasetSplit.TEST:
            self.records = self._test_records(limit)
        else:
            self.records = self._train_records(train_val_split, limit, seed)

    def _train_records(self, train_val_split: float, limit: int | None, seed: int) -> list[ImageRecord]:
        records = list_train(self.root, self.category)
        count = max(1, int(len(records) * train_val_split + 1e-9))
        train = draw(records, count, derive_seed(seed, self.category, "train_val_split"))
        if self.split is DatasetSplit.VAL:
            trained = set(train)
            return [r for r in records if r not in trained]
        if limit is None:
            return train
        return draw(train, limit, derive_seed(seed, self.category, "limit_train"))

    def _test_records(self, limit: int | None) -> list[ImageRecord]:
        records = list_test(self.root, self.category)
        if limit is None:
            return records
        kept: list[ImageRecord] = []
        for defect_type in sorted({r.defect_type for r in records}):
            group = [r for r in records if r.defect_type == defect_type]
            kept += draw(group, limit, derive_seed(0, self.category, defect_type, "limit_test"))
        return kept

    @functools.cached_property
    def has_masks(self) -> bool:
        """Whether pixel metrics are defined: every anomalous image has a mask (or there is none of them)."""
        anomalous = [r for r in self.records if r.is_anomalous]
        return all(r.mask_path for r in anomalous) and (self.root / self.category / "ground_truth").is_dir()

    def subset(self, numbers: Sequence[int]) -> InspectionDataset:
        """Return the same data set with the records of these numbers alone."""
        part = copy.copy(self)
        part.records = [self.records[number] for number in numbers]
        return part

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        image = read_image(record.path)
        placement = place_of_file(record.path, image.height, image.width, self.preprocessing)
        pixels = torch.from_numpy(crop_image(image, placement).copy())  # [H, W, 3]
        item = {"image": pixels.permute(2, 0, 1), "index": index}  # [3, H, W]
        if self.split is DatasetSplit.TEST and self.has_masks:
            labels = self.full_mask(index, (image.height, image.width))
            item["mask"] = torch.from_numpy(crop_labels(labels, placement).astype(np.uint8))  # [H, W]
        return item

    def full_mask(self, index: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """Return the mask of a record before resize and crop; zeros for a normal image.

        Args:
            index: Number of the record.
            size: Height and width of its image, px; None reads them from the file.

        Returns:
            uint8 [H, W] in {0, 1}.

        Raises:
            DataError: The mask has another size than the image.
        """
        mask_path = self.records[index].mask_path
        size = size or upright_size(self.records[index].path)
        if mask_path is None:
            return np.zeros(size, dtype=np.uint8)
        mask = read_mask(mask_path)
        if mask.shape != size:
            raise DataError(size_mismatch(mask_path, mask.shape, self.records[index].path, size))
        return mask

    def check_files(self, smallest_side_px: int = 1) -> None:
        """Read the header of every file; warn of images that the crop cuts much of, and of ones that read as black.

        Args:
            smallest_side_px: Shortest side that an image may have after resize and crop, px.

        Raises:
            DataError: A file is no image or smaller than that, or a mask has another size than its image.
        """
        worst, worst_path = 0.0, None
        for record in progress(self.records, f"{self.category}: checking files"):
            size = upright_size(record.path)
            if record.mask_path is not None and (mask_size := upright_size(record.mask_path)) != size:
                raise DataError(size_mismatch(record.mask_path, mask_size, record.path, size))
            placement = place(*size, self.preprocessing)
            if min(placement.crop_height, placement.crop_width) < smallest_side_px:
                raise DataError(
                    f"{record.path}: scored at {placement.crop_width} x {placement.crop_height} px, smaller than a "
                    f"tile of {smallest_side_px} px: use a smaller --patch_size or larger --max_side, or remove it"
                )
            lost = placement.lost_fraction
            if lost > worst:
                worst, worst_path = lost, record.path
        if worst_path is not None:
            self._warn_of_crop(worst, worst_path)
        if self.records:
            self._warn_of_darkness(self.records[0].path)

    def _warn_of_crop(self, lost: float, path: Path) -> None:
        """Warn where the crop loses more than it loses of a square image."""
        square = (self.preprocessing.resize_px, self.preprocessing.resize_px)
        allowed = place(*square, self.preprocessing).lost_fraction
        if lost > allowed + 0.01:
            LOGGER.warning(
                "%s: the centre crop loses %.0f %% of %s (%.0f %% of a square image): "
                "--resize_mode letterbox keeps long images whole",
                self.category,
                min(100 * lost, 99),  # never "all of it"
                path.name,
                100 * allowed,
            )

    def _warn_of_darkness(self, path: Path) -> None:
        """Warn where an image reads as black, as 12 bits in a 16-bit file do; one image tells for its camera."""
        brightest = int(np.asarray(read_image(path)).max())
        if brightest < DARK_LEVEL:
            LOGGER.warning(
                "%s: the brightest pixel of %s reads as %d of 255: if the camera gave fewer bits than the file "
                "holds, scale the values to the full range of the file",
                self.category,
                path.name,
                brightest,
            )


def resolve_categories(config: DatasetConfig, published: Sequence[str], needs_training: bool = True) -> list[str]:
    """Check the data path and return the classes to process.

    Args:
        config: Data set, path and the classes that were typed.
        published: Order of the known classes of this data set; others follow by name.
        needs_training: Whether training images must be there; stored models are evaluated without.

    Raises:
        ConfigurationError: The path, a class, training images or test images are missing.
    """
    wanted = choose_categories(config, published)
    for category in wanted:
        require_images(Path(config.path), category, needs_training)
    return wanted


def choose_categories(config: DatasetConfig, published: Sequence[str]) -> list[str]:
    """Return the classes to process, whatever images they have.

    Raises:
        ConfigurationError: The path or a class is missing.
    """
    root = Path(config.path)
    with _readable():
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            raise ConfigurationError(f"data path {config.path!r} {what}: expected the folder that holds the classes")
        found = found_categories(root)
        if not found:
            raise ConfigurationError(_no_class(config.path))
        order = {name: i for i, name in enumerate(published)}
        wanted = config.categories or tuple(sorted(found, key=lambda c: (order.get(c, len(order)), c)))
        for category in wanted:
            _require_category(root, category, found)
    return list(wanted)


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"{error.filename!r} cannot be read ({error.strerror}): mend its permissions"
        raise ConfigurationError(message) from error


def _no_class(path: str) -> str:
    if (Path(path) / "train").is_dir():
        return f"data path {path!r} is a class itself: give the folder above it, and the class with -d"
    return f"no class found in {path!r}: expected folders <class>/train/{GOOD} there"


def _require_category(root: Path, category: str, found: Sequence[str]) -> None:
    """Raise ConfigurationError unless there is a folder of the class; what it lacks is told later."""
    if category not in found and category not in [p.name for p in subfolders(root)]:
        near = difflib.get_close_matches(category, found, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigurationError(f"class {category!r} not found in {str(root)!r}: found {', '.join(found)}{hint}")


def require_images(root: Path, category: str, needs_training: bool = True) -> None:
    """Raise ConfigurationError unless the class has test images and, where they are needed, training images."""
    train, test = root / category / "train", root / category / "test"
    with _readable():
        for folder in subfolders(train) + subfolders(test):
            if folder.name != GOOD and folder.name.lower() == GOOD:  # it would count as a defect type
                raise ConfigurationError(f"{str(folder)!r} holds normal images, expected the name {GOOD!r}: rename it")
        if needs_training and not _has_image(train / GOOD):
            expected = ", ".join(IMAGE_SUFFIXES)
            raise ConfigurationError(f"no training images in {str(train / GOOD)!r}: expected {expected} files")
        if not any(_has_image(p) for p in subfolders(test)):
            raise ConfigurationError(f"no test images in {str(test)!r}: expected folders <defect type>/ with images")


def _has_image(folder: Path) -> bool:
    return folder.is_dir() and any(is_image_file(p) for p in folder.iterdir())

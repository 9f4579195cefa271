"""What is in the folders of a class: facts of every file, read as a run would read it, but going on where it stops.

Pixels are looked at once and dropped; what is kept of an image is a few hundred bytes, so that memory does not depend
on its size. Files count as duplicates if they read as the same pixels, in whatever format they are stored. Pictures
that are only similar are not looked for: photographs of good parts under one camera are as like one another as
copies are.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from patchcore.configs import RESIZE_MODES, PreprocessingConfig
from patchcore.datasets.images import (
    Placement,
    StoredForm,
    binary_mask,
    crop_labels,
    place_of_file,
    read_image_and_form,
    read_mask_values,
    size_mismatch,
    upright_size,
)
from patchcore.datasets.inspection import (
    GOOD,
    Fault,
    ImageRecord,
    is_image_file,
    require_images,
    subfolders,
    survey_images,
    survey_test,
)
from patchcore.errors import ConfigurationError, DataError
from patchcore.runtime import progress

TRAIN, TEST = "train", "test"

# A mask uint8 [H, W] in {0, 1} -> its regions numbered from 1 [H, W], and how many there are.
RegionLabeller = Callable[[np.ndarray], tuple[np.ndarray, int]]


@dataclass(frozen=True, slots=True)
class CropLoss:
    """What resize and crop leave out of one mask.

    Attributes:
        defect_px: Defect pixels of the full-size mask outside the crop.
        num_regions: Regions of which no pixel is left.
        is_emptied: Whether the mask had a region and has none left.
    """

    defect_px: int
    num_regions: int
    is_emptied: bool


@dataclass(frozen=True, slots=True)
class MaskFacts:
    """One ground-truth mask; sizes are of the file as it is.

    Attributes:
        error: Why a run cannot use it; None where it can. The other values are 0 or empty then.
        num_values: Distinct values other than 0, of the brightest channel.
        defect_px: Defect pixels.
        defect_fraction: Share of the image that is defect, in [0, 1].
        region_areas: Number of regions of each area in px.
        crops: For each resize mode what it would lose; a mode that a run refuses for this image is missing.
    """

    path: Path
    error: str | None = None
    num_values: int = 0
    defect_px: int = 0
    defect_fraction: float = 0.0
    region_areas: Counter[int] = field(default_factory=Counter)
    crops: dict[str, CropLoss] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pixels:
    """What is kept of the pixels of one image.

    Attributes:
        height, width: Upright size, px.
        form: How the file stores them.
        digest: Hash of size and 8-bit RGB values: equal for equal pictures in any lossless format.
        mean_rgb: Mean of each channel, in [0, 255].
        darkest, brightest: Extremes over all channels, in [0, 255].
    """

    height: int
    width: int
    form: StoredForm
    digest: bytes
    mean_rgb: tuple[float, float, float]
    darkest: int
    brightest: int

    @property
    def brightness(self) -> float:
        return sum(self.mean_rgb) / 3


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """One image file.

    Attributes:
        split: "train" or "test".
        record: File, defect type and mask.
        pixels: None where the file cannot be read.
        error: Why a run cannot read it; None where it can.
        mask: Its mask; None without.
    """

    split: str
    record: ImageRecord
    pixels: Pixels | None
    error: str | None = None
    mask: MaskFacts | None = None


@dataclass(frozen=True)
class ClassFacts:
    """Everything that was found of one class.

    Attributes:
        category: Name of the class.
        refusal: Why a run does not even start with this class; None where it does.
        faults: What in the folders a run stops at.
        images: Training images, then test images by defect type.
        has_truth: Whether there is a `ground_truth` folder.
        passed_over: Files and folders that hold something but are never read, with the reason.
        good_with_defect: Masks of good images that mark a defect, which a run never reads.
    """

    category: str
    refusal: str | None
    faults: list[Fault]
    images: list[ImageFacts]
    has_truth: bool
    passed_over: list[tuple[Path, str]]
    good_with_defect: list[Path]

    @property
    def has_masks(self) -> bool:
        """Whether a run has pixel metrics for this class."""
        return self.has_truth and all(i.record.mask_path for i in self.images if i.record.is_anomalous)

    def of(self, split: str, good: bool | None = None) -> list[ImageFacts]:
        """Return the images of a split; only good or only anomalous ones if that is asked for."""
        return [i for i in self.images if i.split == split and good in (None, not i.record.is_anomalous)]


def explore_class(
    root: Path, category: str, preprocessing: PreprocessingConfig, label_regions: RegionLabeller
) -> ClassFacts:
    """Read every file of a class.

    Args:
        root: Folder that holds the classes.
        category: Name of the class.
        preprocessing: Resize and crop; every resize mode is tried with its sizes.
        label_regions: Numbers the regions of a mask.

    Returns:
        The facts; what cannot be read is in them.
    """
    refusal: str | None = None
    faults: list[Fault] = []
    records: list[tuple[str, ImageRecord]] = []
    passed_over: list[tuple[Path, str]] = []
    good_with_defect: list[Path] = []
    try:
        require_images(root, category)
    except ConfigurationError as error:
        refusal = str(error)
    truth = root / category / "ground_truth"
    try:
        train, faults = survey_images(root / category / TRAIN / GOOD)
        test, test_faults = survey_test(root, category)
        faults += test_faults
        records = [(TRAIN, ImageRecord(p, category, GOOD)) for p in train] + [(TEST, record) for record in test]
        passed_over = list(_passed_over(root / category))
        good_with_defect = _marked(truth / GOOD)
    except OSError as error:  # a folder without permission
        refusal = refusal or f"{error.filename!r} cannot be read ({error.strerror}): mend its permissions"
    watched = progress(records, f"{category}: reading images")
    images = [_image_facts(split, record, preprocessing, label_regions) for split, record in watched]
    return ClassFacts(category, refusal, faults, images, truth.is_dir(), passed_over, good_with_defect)


def duplicates(images: list[ImageFacts]) -> list[list[ImageFacts]]:
    """Return the groups of two or more images that read as the same pixels, in the order of their first image."""
    groups: dict[bytes, list[ImageFacts]] = {}
    for image in images:
        if image.pixels is not None:
            groups.setdefault(image.pixels.digest, []).append(image)
    return [group for group in groups.values() if len(group) > 1]


def crop_window(height: int, width: int, placement: Placement) -> tuple[int, int, int, int]:
    """Return top, left, bottom, right of what the crop keeps, in px of the image before the resize.

    A pixel is kept if its centre is.
    """
    top, bottom = _kept(height, placement.height, placement.top, placement.crop_height)
    left, right = _kept(width, placement.width, placement.left, placement.crop_width)
    return top, left, bottom, right


def _kept(length: int, resized: int, start: int, crop: int) -> tuple[int, int]:
    """Return first and end of the pixels whose centres, resized, lie in [start, start + crop)."""
    scale = length / resized
    first, end = (int(np.ceil(scale * edge - 0.5)) for edge in (start, start + crop))
    return max(0, first), min(length, end)


def _image_facts(
    split: str, record: ImageRecord, preprocessing: PreprocessingConfig, label_regions: RegionLabeller
) -> ImageFacts:
    pixels, error = None, None
    try:
        image, form = read_image_and_form(record.path)
        pixels = _pixels(np.asarray(image), form)
        place_of_file(record.path, pixels.height, pixels.width, preprocessing)
    except DataError as failure:
        error = str(failure)
    mask = None
    if record.mask_path is not None:
        size = (pixels.height, pixels.width) if pixels else None
        mask = _mask_facts(record.mask_path, record.path, size, preprocessing, label_regions)
    return ImageFacts(split, record, pixels, error, mask)


def _pixels(values: np.ndarray, form: StoredForm) -> Pixels:
    """Sum up the pixels uint8 [H, W, 3] of an image."""
    height, width = values.shape[:2]
    digest = hashlib.blake2b(f"{height}x{width}".encode(), digest_size=16)
    digest.update(values.tobytes())
    red, green, blue = values.reshape(-1, 3).mean(axis=0).tolist()
    darkest, brightest = int(values.min()), int(values.max())
    return Pixels(height, width, form, digest.digest(), (red, green, blue), darkest, brightest)


def _mask_facts(
    path: Path,
    image: Path,
    size: tuple[int, int] | None,
    preprocessing: PreprocessingConfig,
    label_regions: RegionLabeller,
) -> MaskFacts:
    """Read a mask; `size` is that of its image, None where the image cannot be read."""
    try:
        mask_size = upright_size(path)  # first, as a run does: it stops at the header, in other words
        if size is not None and mask_size != size:
            return MaskFacts(path, size_mismatch(path, mask_size, image, size))
        values, lossy = read_mask_values(path)
    except DataError as error:
        return MaskFacts(path, str(error))
    mask = binary_mask(values, lossy)
    brightest = values.max(axis=2) if values.ndim == 3 else values  # [H, W]
    labels, num_regions = label_regions(mask)
    areas = np.bincount(labels.ravel(), minlength=1)[1:]  # [R]
    defect_px = int(mask.sum())
    return MaskFacts(
        path,
        num_values=int(np.count_nonzero(np.unique(brightest))),
        defect_px=defect_px,
        defect_fraction=defect_px / mask.size,
        region_areas=Counter(areas.tolist()),
        crops=dict(_crop_losses(path, mask, labels, num_regions, preprocessing)),
    )


def _crop_losses(
    path: Path, mask: np.ndarray, labels: np.ndarray, num_regions: int, preprocessing: PreprocessingConfig
) -> Iterator[tuple[str, CropLoss]]:
    """Yield for each resize mode what it would lose of a mask [H, W] and its numbered regions [H, W]."""
    height, width = mask.shape
    for mode in RESIZE_MODES:
        config = PreprocessingConfig(preprocessing.resize_px, preprocessing.imagesize_px, mode)
        try:
            placement = place_of_file(path, height, width, config)
        except DataError:  # a run refuses this image in this mode
            continue
        top, left, bottom, right = crop_window(height, width, placement)
        lost_px = int(mask.sum()) - int(mask[top:bottom, left:right].sum())
        left_over = np.unique(crop_labels(labels, placement, padding=0)) if num_regions else np.zeros(0)
        num_left = int(np.count_nonzero(left_over))
        yield mode, CropLoss(lost_px, num_regions - num_left, num_regions > 0 and num_left == 0)


def _marked(folder: Path) -> list[Path]:
    """Return the masks in a folder that mark a pixel; a run reads none of this folder."""
    marked = []
    for path in survey_images(folder)[0]:
        try:
            values, _ = read_mask_values(path)
        except DataError:  # nobody reads it, nobody stops at it
            continue
        if values.any():
            marked.append(path)
    return marked


def _passed_over(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield what lies in the folders of a class and is never read, with the reason; hidden files are meant to be."""
    for sub in subfolders(folder):
        if sub.name not in (TRAIN, TEST, "ground_truth"):
            yield sub, "a run reads train, test and ground_truth alone"
    for sub in subfolders(folder / TRAIN):
        if sub.name != GOOD:
            yield sub, f"a run trains on train/{GOOD} alone"
    readable = [folder / TRAIN / GOOD, *subfolders(folder / TEST), *subfolders(folder / "ground_truth")]
    loose = [folder / part for part in (TRAIN, TEST, "ground_truth")]
    for holder in [*loose, *readable]:
        if not holder.is_dir():
            continue
        for path in sorted(holder.iterdir()):
            if path.name.startswith("."):
                continue
            if holder in readable and path.is_dir():
                yield path, "a run reads the files of a folder, not the folders in it"
            elif path.is_file() and (holder in loose or not is_image_file(path)):
                reason = (
                    "it lies in no folder of a defect type" if holder in loose else "its suffix is none of an image"
                )
                yield path, reason

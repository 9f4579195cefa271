"""The pictures of the page: test images, heat maps and outlines, small enough that hundreds fit into one file."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from skimage.measure import approximate_polygon, find_contours

from patchcore.configs import PreprocessingConfig
from patchcore.datasets.images import crop_image, place_of_file, read_image
from patchcore.errors import DataError
from patchcore.evaluation.plots.pictures import HeatScale, resized

LOGGER = logging.getLogger(__name__)

PICTURE_PX = 256  # longer side
PICTURE_QUALITY = 80
MAP_QUALITY = 75  # maps are smooth: no ringing is to be seen at this quality
ENCODER_EFFORT = 3  # of 6: beyond, files shrink by a percent and take twice as long
TOLERANCE_PX = 0.4  # an outline may lie beside the exact one, in px of a picture
MAX_OUTLINE_CHARS = 3000  # a ragged outline, of a map that is noise, is drawn coarser
COARSEST_PX = 24


@dataclass(frozen=True)
class ImageFolder:
    """Where the test images of a run were read, and how.

    Attributes:
        root: Folder of the data set.
        preprocessing: Resize and crop.
    """

    root: Path
    preprocessing: PreprocessingConfig

    def crop(self, path: str) -> np.ndarray | None:
        """Return what was scored of an image, uint8 [H, W, 3]; None where the file is not to be had."""
        relative = PurePosixPath(path)
        if relative.is_absolute() or ".." in relative.parts:  # a damaged or foreign csv names no file of the data set
            return None
        try:
            image = read_image(self.root / relative)
            return crop_image(image, place_of_file(self.root / relative, image.height, image.width, self.preprocessing))
        except DataError as error:
            LOGGER.debug("no picture: %s", error)
            return None


def image_bytes(crop: np.ndarray) -> bytes:
    """Return an image uint8 [H, W, 3] as a small WebP file."""
    return _webp(resized(crop, Image.Resampling.BOX, _side(crop)), PICTURE_QUALITY)


def heat_bytes(anomaly_map: np.ndarray, scale: HeatScale) -> bytes:
    """Return a map float [H, W] as a small gray WebP file, black where cold; the page gives it colour."""
    small = np.asarray(resized(anomaly_map.astype(np.float32), Image.Resampling.BOX, _side(anomaly_map)))
    levels = np.rint(scale.levels(small) * 255).astype(np.uint8)
    return _webp(Image.fromarray(levels), MAP_QUALITY)


def outline_path(values: np.ndarray, level: float) -> str:
    """Return the line around what lies above a level as the data of an SVG path, in px of `values`.

    Args:
        values: float [H, W].
        level: The line runs where the interpolated values have this one; along the border it is closed.

    Returns:
        Closed polygons; empty where nothing lies above.
    """
    height, width = values.shape
    path, step = _path(values, level, 1), 1
    while len(path) > MAX_OUTLINE_CHARS and min(height, width) // (2 * step) >= COARSEST_PX:
        step *= 2
        path = _path(_block_maxima(values, step), level, step)
    return path


def display_scale(maps: list[np.ndarray], good: np.ndarray, quantile: float) -> HeatScale:
    """Return a colour scale for a method without pixel threshold, from the good test images.

    Args:
        maps: Map [h, w] of each image, without padding.
        good: bool [N], which of them are of good images.
        quantile: Share of the good images of which no pixel lies above the level that stands for the threshold.

    Returns:
        The median pixel of the good images is cold; without good images the scale spans all maps and has no threshold.
    """
    normal = [anomaly_map for anomaly_map, is_good in zip(maps, good, strict=True) if is_good]
    if not normal:
        return HeatScale(float(min(m.min() for m in maps)), float(max(m.max() for m in maps)), None)
    low = float(np.median(np.concatenate([m[::4, ::4].ravel() for m in normal])))  # every 16th pixel says as much
    return HeatScale.up_to_threshold(low, float(np.quantile([m.max() for m in normal], quantile)))


def _side(values: np.ndarray) -> int:
    return min(PICTURE_PX, max(values.shape[:2]))


def _webp(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=quality, method=ENCODER_EFFORT)
    return buffer.getvalue()


def _path(values: np.ndarray, level: float, step: int) -> str:
    """Return the outline of values that stand for `step` px each."""
    padded = np.pad(values.astype(np.float64), 1, mode="edge")
    margin = np.ones(padded.shape, bool)
    margin[1:-1, 1:-1] = False
    # Reflected at the level: the line then runs along the border where the image goes on above it.
    padded[margin] = np.minimum(padded, 2 * level - padded)[margin]
    tolerance = TOLERANCE_PX * max(values.shape) / min(PICTURE_PX, max(values.shape))
    pieces = []
    for contour in find_contours(padded, level):
        corners = (approximate_polygon(contour, tolerance) - 0.5) * step  # -1 for the margin, +0.5 to a pixel's centre
        points = [f"{x:.1f} {y:.1f}" for y, x in corners[:-1]]
        pieces.append(f"M{'L'.join(points)}Z")
    return "".join(pieces)


def _block_maxima(values: np.ndarray, step: int) -> np.ndarray:
    """Return the largest value of each block of `step` x `step`: small regions must not vanish."""
    height, width = (-(-side // step) * step for side in values.shape)
    padded = np.pad(values, ((0, height - values.shape[0]), (0, width - values.shape[1])), mode="edge")
    return padded.reshape(height // step, step, width // step, step).max(axis=(1, 3))

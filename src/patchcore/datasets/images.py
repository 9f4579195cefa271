"""Image files: reading any of them as 8-bit RGB, masks, resize and crop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from patchcore.configs import PreprocessingConfig
from patchcore.errors import DataError

IGNORED = 255  # mask value of padding: neither normal nor defect
PADDING_RGB = (124, 116, 104)  # ImageNet's mean colour: close to 0 once the backbone has normalised it
TIFF_BITS_PER_SAMPLE = 258
EXIF_ORIENTATION = 0x0112
# What Pillow raises for damaged files of the formats we read.
UNREADABLE = (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Placement:
    """Where resize and crop put an image.

    Attributes:
        height, width: Size after the resize, px.
        top, left: Corner of the crop in the resized image, px; negative where the crop reaches into padding.
        side: Side of the crop, px.
    """

    height: int
    width: int
    top: int
    left: int
    side: int

    @property
    def lost_fraction(self) -> float:
        """Share of the image's area that the crop leaves out."""
        kept_height = min(self.height, self.top + self.side) - max(0, self.top)
        kept_width = min(self.width, self.left + self.side) - max(0, self.left)
        return 1 - kept_height * kept_width / (self.height * self.width)


def place(height: int, width: int, config: PreprocessingConfig) -> Placement:
    """Work out resize and centre crop for an image of `height` x `width` px.

    "shorter" agrees with torchvision's Resize (truncating the longer side) and CenterCrop, as in the original.
    """
    resize, side = config.resize_px, config.imagesize_px
    if config.resize_mode == "square":
        new_height = new_width = resize
    else:
        reference = min(height, width) if config.resize_mode == "shorter" else max(height, width)
        new_height = max(1, int(resize * height / reference))
        new_width = max(1, int(resize * width / reference))
    return Placement(new_height, new_width, round((new_height - side) / 2), round((new_width - side) / 2), side)


def read_image(path: Path) -> Image.Image:
    """Read a file as an upright 8-bit RGB image.

    16-bit and 32-bit integer images are scaled by their depth, float images must lie in [0, 1]; transparency is
    dropped, the first frame of an animation is used, the EXIF orientation is applied.

    Raises:
        DataError: The file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), _integer_bits(image), path)
    except UNREADABLE as error:
        raise DataError(f"{path}: not a readable image ({_one_line(error)}): replace or remove the file") from error


def _integer_bits(image: Image.Image) -> int:
    """Return the depth of a gray integer image: 32-bit integers are what Pillow also makes of 16-bit PNG."""
    if image.mode == "I" and image.format == "TIFF":
        return int(image.getexif().get(TIFF_BITS_PER_SAMPLE, 32))
    return 16


def _to_rgb(image: Image.Image, bits: int, path: Path) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _gray(np.asarray(image).astype(np.float64) / (2.0**bits - 1))
    if image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise DataError(f"{path}: float image with values outside [0, 1]: rescale it or store 16-bit integers")
        return _gray(values)
    return image.convert("RGB")


def _gray(values: np.ndarray) -> Image.Image:
    """Return gray values in [0, 1] as an RGB image."""
    levels = np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)
    return Image.fromarray(levels).convert("RGB")


def read_mask(path: Path) -> np.ndarray:
    """Read a ground-truth mask at full size.

    Args:
        path: An image whose non-zero pixels, in any colour channel, are defect.

    Returns:
        uint8 [H, W] in {0, 1}.

    Raises:
        DataError: The file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("P", "PA", "RGBA", "LA"):
                upright = upright.convert("RGB")
            values = np.asarray(upright)
    except UNREADABLE as error:
        raise DataError(f"{path}: not a readable mask ({_one_line(error)}): replace the file") from error
    defect = values != 0
    return (defect.any(axis=-1) if defect.ndim == 3 else defect).astype(np.uint8)


def upright_size(path: Path) -> tuple[int, int]:
    """Return (height, width) of an image file after its EXIF rotation, from the header alone.

    Raises:
        DataError: The file has no readable image header.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5  # orientations 5 to 8 exchange the sides
    except UNREADABLE as error:
        raise DataError(f"{path}: not a readable image ({_one_line(error)}): replace or remove the file") from error
    return (width, height) if turned else (height, width)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def crop_image(image: Image.Image, placement: Placement) -> np.ndarray:
    """Resize bilinearly and crop, padding where the crop leaves the image.

    Returns:
        uint8 [side, side, 3].
    """
    resized = image.resize((placement.width, placement.height), Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (placement.side, placement.side), PADDING_RGB)
    canvas.paste(resized, (-placement.left, -placement.top))
    return np.asarray(canvas)


def crop_labels(labels: np.ndarray, placement: Placement, padding: int = IGNORED) -> np.ndarray:
    """Resize a label image by nearest neighbour and crop it like its image.

    Args:
        labels: Integers [H, W], for example a mask in {0, 1} or numbered regions.
        placement: Resize and crop of the image it belongs to.
        padding: Value where the crop leaves the image.

    Returns:
        int32 [side, side].
    """
    image = Image.fromarray(labels.astype(np.int32))
    resized = image.resize((placement.width, placement.height), Image.Resampling.NEAREST)
    canvas = Image.new("I", (placement.side, placement.side), padding)
    canvas.paste(resized, (-placement.left, -placement.top))
    return np.asarray(canvas)

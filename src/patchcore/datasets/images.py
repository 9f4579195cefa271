"""Image files: reading any of them as 8-bit RGB, masks, resize and crop."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from patchcore.configs import PreprocessingConfig
from patchcore.errors import DataError

IGNORED = 255  # mask value of padding: neither normal nor defect
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # whatever the suffix says: EPS would start a program
PADDING_RGB = (124, 116, 104)  # ImageNet's mean colour: close to 0 once the backbone has normalised it
TIFF_WIDTH, TIFF_HEIGHT, TIFF_BITS_PER_SAMPLE, TIFF_SAMPLE_FORMAT = 256, 257, 258, 339
TIFF_SIGNED = 2
LOSSY_FORMATS = ("JPEG", "MPO", "WEBP")
PNG_METADATA = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}
EXIF_ORIENTATION = 0x0112
TRANSPOSITIONS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_RESIZED_PIXELS = 200_000_000  # a line of pixels resized by its shorter side would fill the memory
SIDES_EXCHANGED = (5, 6, 7, 8)
# What Pillow raises for damaged files of the formats we read.
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Placement:
    """Where resize and crop put an image.

    Attributes:
        height, width: Size after the resize, px.
        top, left: Corner of the crop in the resized image, px; negative where the crop reaches into padding.
        crop_height, crop_width: Size of the crop, px.
    """

    height: int
    width: int
    top: int
    left: int
    crop_height: int
    crop_width: int

    @property
    def lost_fraction(self) -> float:
        """Share of the image's area that the crop leaves out."""
        kept_height = min(self.height, self.top + self.crop_height) - max(0, self.top)
        kept_width = min(self.width, self.left + self.crop_width) - max(0, self.left)
        return 1 - kept_height * kept_width / (self.height * self.width)


def place(height: int, width: int, config: PreprocessingConfig) -> Placement:
    """Work out resize and centre crop for an image of `height` x `width` px.

    "shorter" agrees with torchvision's Resize (truncating the longer side) and CenterCrop, as in the original.
    With `max_side_px`, the crop is the whole image, which is scaled down at most.
    """
    if config.max_side_px is not None:
        scale = min(1.0, config.max_side_px / max(height, width))
        whole = max(1, round(scale * height)), max(1, round(scale * width))
        return Placement(*whole, 0, 0, *whole)
    resize, side = config.resize_px, config.imagesize_px
    if config.resize_mode == "square":
        new_height = new_width = resize
    else:
        reference = min(height, width) if config.resize_mode == "shorter" else max(height, width)
        new_height = max(1, int(resize * height / reference))
        new_width = max(1, int(resize * width / reference))
    return Placement(new_height, new_width, round((new_height - side) / 2), round((new_width - side) / 2), side, side)


@dataclass(frozen=True)
class StoredForm:
    """How a file stores its image, which reading it as upright 8-bit RGB hides.

    Attributes:
        mode: Pillow's name, for example "RGB", "L", "I;16", "P" (palette) or "CMYK".
        is_turned: Whether its EXIF orientation turns or flips it.
        is_transparent: Whether a pixel is not opaque.
    """

    mode: str
    is_turned: bool
    is_transparent: bool


def place_of_file(path: Path, height: int, width: int, config: PreprocessingConfig) -> Placement:
    """Work out resize and crop as `place` does.

    Raises:
        DataError: The resized image would not fit into memory.
    """
    placement = place(height, width, config)
    if placement.height * placement.width > MAX_RESIZED_PIXELS:
        raise DataError(
            f"{path}: {width} x {height} px is too long to be resized by its shorter side: "
            "use --resize_mode letterbox or square"
        )
    return placement


def size_mismatch(mask: Path, mask_size: tuple[int, ...], image: Path, size: tuple[int, int]) -> str:
    """Say that a mask and its image, sizes as (height, width), do not fit."""
    return (
        f"{mask}: mask of {mask_size[1]} x {mask_size[0]} px for an image of {size[1]} x {size[0]} px "
        f"({image.name}): both must have the same size"
    )


def read_image(path: Path) -> Image.Image:
    """Read a file as an upright 8-bit RGB image.

    16-bit and 32-bit integer images are scaled by their depth, float images must lie in [0, 1]; transparency is
    dropped, the first frame of an animation is used, the EXIF orientation is applied.

    Raises:
        DataError: The file cannot be read as an image.
    """
    with _opened(path, "image") as image:
        return _to_rgb(_upright(image), _largest_integer(image), path)


def to_rgb(image: Image.Image, where: str) -> Image.Image:
    """Return a PIL image as an upright 8-bit RGB image, as `read_image` returns the file that holds it.

    Args:
        image: Of any mode that a file may have; integers of more than 8 bits count as 16-bit ones, unless the image is
            an opened TIFF file, which tells its depth.
        where: What the image is called in messages.

    Raises:
        DataError: Its values or its mode have no meaning as RGB, or the file behind it cannot be read.
    """
    try:
        return _to_rgb(_upright(image), _largest_integer(image), where)
    except UNREADABLE as error:
        raise DataError(
            f"{where}: PIL image of mode {image.mode!r} that cannot be read as RGB ({' '.join(str(error).split())}): "
            "convert it to RGB"
        ) from error


def read_image_and_form(path: Path) -> tuple[Image.Image, StoredForm]:
    """Read a file as `read_image` does, and tell how it is stored.

    Raises:
        DataError: The file cannot be read as an image.
    """
    with _opened(path, "image") as image:
        mode, is_turned = image.mode, _orientation(image) in TRANSPOSITIONS
        upright = _upright(image)
        form = StoredForm(mode, is_turned, _is_transparent(upright))
        return _to_rgb(upright, _largest_integer(image), path), form


def read_mask(path: Path) -> np.ndarray:
    """Read a ground-truth mask at full size.

    Args:
        path: An image whose non-zero pixels, in any colour channel, are defect; transparent ones are not. In a
            format that may compress with loss, pixels above half of the brightest are: the rest is ringing.

    Returns:
        uint8 [H, W] in {0, 1}.

    Raises:
        DataError: The file cannot be read as an image.
    """
    return binary_mask(*read_mask_values(path))


def read_mask_values(path: Path) -> tuple[np.ndarray, bool]:
    """Read what a mask file holds before it is made binary.

    Returns:
        Gray values [H, W] or colours [H, W, 3], black where transparent; and whether the format may lose.

    Raises:
        DataError: The file cannot be read as an image.
    """
    with _opened(path, "mask") as image:
        return _opaque_values(_upright(image)), image.format in LOSSY_FORMATS


def binary_mask(values: np.ndarray, lossy: bool) -> np.ndarray:
    """Return the mask, uint8 [H, W] in {0, 1}, of what `read_mask_values` returns."""
    defect = values > values.max() / 2 if lossy else values != 0
    return (defect.any(axis=-1) if defect.ndim == 3 else defect).astype(np.uint8)


def upright_size(path: Path) -> tuple[int, int]:
    """Return (height, width) of an image file after its EXIF rotation, from the header alone.

    Raises:
        DataError: The file has no readable image header.
    """
    with _opened(path, "image") as image:
        width, height = image.size
        if isinstance(image, TiffImageFile):  # whether `size` is that of the turned image depends on Pillow's version
            width, height = image.tag_v2[TIFF_WIDTH], image.tag_v2[TIFF_HEIGHT]
        turned = _orientation(image) in SIDES_EXCHANGED
    return (width, height) if turned else (height, width)


@contextmanager
def _opened(path: Path, what: str) -> Iterator[Image.Image]:
    """Open an image file; what Pillow raises meanwhile becomes a DataError that names the file."""
    try:
        if path.is_fifo() or path.is_char_device():
            raise OSError("a pipe or a device, which may keep a reader waiting for ever")
        # Not by name: from version 11 on, Pillow maps a named uncompressed TIFF wrongly if EXIF turns it on its side.
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            yield image
    except UNREADABLE as error:
        raise DataError(
            f"{path}: not a readable {what} ({_reason(path, error)}): replace or remove the file"
        ) from error


def _reason(path: Path, error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "unknown format" if path.stat().st_size else "the file is empty"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _orientation(image: Image.Image) -> object:
    """Return the EXIF orientation; of a PNG where it precedes the pixels, since Pillow decodes them to look behind."""
    if image.format == "PNG" and not PNG_METADATA & image.info.keys():
        return 1
    return image.getexif().get(EXIF_ORIENTATION, 1)


def _upright(image: Image.Image) -> Image.Image:
    """Load an image and turn it by its EXIF orientation."""
    transposition = TRANSPOSITIONS.get(_orientation(image))
    image.load()
    if transposition is None or isinstance(image, TiffImageFile):  # Pillow turns a TIFF while it loads it
        return image
    return image.transpose(transposition)


def _largest_integer(image: Image.Image) -> int:
    """Return the largest value that a gray integer image of this depth can hold."""
    if not isinstance(image, TiffImageFile):
        return 2**16 - 1
    bits, sample_format = (image.tag_v2.get(tag, (1,))[0] for tag in (TIFF_BITS_PER_SAMPLE, TIFF_SAMPLE_FORMAT))
    return 2 ** (bits - 1) - 1 if sample_format == TIFF_SIGNED else 2**bits - 1


def _to_rgb(image: Image.Image, largest_integer: int, where: str | Path) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if largest_integer == 2**32 - 1:
            values = values.view(np.uint32)  # Pillow holds unsigned 32-bit values in signed ones
        if values.max() > largest_integer:  # of an image in memory alone: nothing tells its depth
            raise DataError(
                f"{where}: integer image with values up to {values.max()}, expected at most {largest_integer}: "
                "rescale it to 16 bits"
            )
        return _gray(values / largest_integer)
    if image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise DataError(
                f"{where}: float image with values from {values.min():.4g} to {values.max():.4g}, expected [0, 1]: "
                "rescale it or store 16-bit integers"
            )
        return _gray(values)
    if "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of a palette with transparency that is converted in one step
    return image.convert("RGB")


def _is_transparent(image: Image.Image) -> bool:
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return False
    return bool((np.asarray(image.convert("RGBA"))[..., 3] < 255).any())


def _gray(values: np.ndarray) -> Image.Image:
    """Return gray values in [0, 1] as an RGB image."""
    levels = np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)
    return Image.fromarray(levels).convert("RGB")


def _opaque_values(image: Image.Image) -> np.ndarray:
    """Return gray values [H, W] or RGB values [H, W, 3], black where the image is transparent."""
    if image.mode in ("1", "L", "I", "F", "RGB") or image.mode.startswith("I;16"):
        return np.asarray(image)
    colours = image.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", colours.size, "black"), colours).convert("RGB"))


def crop_image(image: Image.Image, placement: Placement) -> np.ndarray:
    """Resize bilinearly and crop, padding where the crop leaves the image.

    Returns:
        uint8 [crop_height, crop_width, 3].
    """
    resized = image.resize((placement.width, placement.height), Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (placement.crop_width, placement.crop_height), PADDING_RGB)
    canvas.paste(resized, (-placement.left, -placement.top))
    return np.asarray(canvas)


def crop_labels(labels: np.ndarray, placement: Placement, padding: int = IGNORED) -> np.ndarray:
    """Resize a label image by nearest neighbour and crop it like its image.

    Args:
        labels: Integers [H, W], for example a mask in {0, 1} or numbered regions.
        placement: Resize and crop of the image it belongs to.
        padding: Value where the crop leaves the image.

    Returns:
        int32 [crop_height, crop_width].
    """
    image = Image.fromarray(labels.astype(np.int32))
    resized = image.resize((placement.width, placement.height), Image.Resampling.NEAREST)
    canvas = Image.new("I", (placement.crop_width, placement.crop_height), padding)
    canvas.paste(resized, (-placement.left, -placement.top))
    return np.asarray(canvas)


def map_on_image(anomaly_map: np.ndarray, placement: Placement, height: int, width: int) -> np.ndarray:
    """Undo crop and resize: lay an anomaly map over the image that it was computed from.

    Args:
        anomaly_map: float [crop_height, crop_width].
        placement: Resize and crop of the image.
        height, width: Size of the result, px: that of the image, or of a scaled copy of it.

    Returns:
        float32 [height, width], bilinear; NaN where the crop left the image out.
    """
    top, bottom = max(0, placement.top), min(placement.height, placement.top + placement.crop_height)
    left, right = max(0, placement.left), min(placement.width, placement.left + placement.crop_width)
    padded = anomaly_map.astype(np.float32)
    kept = padded[top - placement.top : bottom - placement.top, left - placement.left : right - placement.left]
    rows, from_row, to_row = _span(top, bottom, height / placement.height)
    columns, from_column, to_column = _span(left, right, width / placement.width)
    values = np.full((height, width), np.nan, dtype=np.float32)
    size = (columns.stop - columns.start, rows.stop - rows.start)
    if min(size) > 0:  # else what was inspected is thinner than a pixel of the result
        box = (from_column, from_row, to_column, to_row)
        values[rows, columns] = np.asarray(Image.fromarray(kept).resize(size, Image.Resampling.BILINEAR, box))
    return values


def _span(start: int, stop: int, scale: float) -> tuple[slice, float, float]:
    """Return the pixels of a scaled axis that show [start, stop), and where they begin and end in it."""
    pixels = slice(round(start * scale), round(stop * scale))
    return pixels, max(0.0, pixels.start / scale - start), min(float(stop - start), pixels.stop / scale - start)

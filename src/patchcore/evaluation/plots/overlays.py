"""An image at its own size with what was found drawn into it."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from patchcore.evaluation.plots.pictures import ALARM, CONTOUR
from patchcore.evaluation.plots.style import font

LINE_PER_SIDE = 256  # a line of one pixel in so many of the longer side is seen when the image fills a screen
TEXT_PER_SIDE = 32
SHADE = (20, 22, 25)  # around the line, so that it is seen on bright parts, too
NORMAL = (27, 127, 59)
UNDECIDED = (95, 102, 110)
DIMMED = 0.45  # brightness of what was not inspected


RING_PER_SIDE = 24  # radius of the ring around a place


def contour_overlay(
    image: Image.Image,
    defect: np.ndarray | None,
    inspected: np.ndarray,
    text: str,
    is_anomalous: bool | None,
    place: tuple[int, int] | None = None,
) -> Image.Image:
    """Draw a line around defects, darken what was not inspected, and write the verdict into a free corner.

    The line runs outside of the defect, so that a small one stays visible.

    Args:
        image: RGB, of any size.
        defect: bool [H, W]; None where there is no threshold.
        inspected: bool [H, W].
        text: The verdict.
        is_anomalous: Gives the colour of the verdict; None where there is no decision.
        place: Row and column of a place to draw a ring around; None for none.

    Returns:
        RGB, of the same size.
    """
    pixels = np.array(image)
    if not inspected.all():
        pixels[~inspected] = (pixels[~inspected] * DIMMED).astype(np.uint8)
    if defect is not None and defect.any():
        _draw_line(pixels, defect)
    drawn = Image.fromarray(pixels)
    if place is not None:
        _draw_ring(drawn, *place)
    _write(drawn, text, _colour(is_anomalous), defect)
    return drawn


def _draw_ring(image: Image.Image, row: int, column: int) -> None:
    radius, width = max(image.size) / RING_PER_SIDE, max(1, round(max(image.size) / LINE_PER_SIDE))
    draw = ImageDraw.Draw(image)
    for colour, by in ((SHADE, width), (CONTOUR, 0)):
        box = (column - radius - by, row - radius - by, column + radius + by, row + radius + by)
        draw.ellipse(box, outline=colour, width=width + 2 * by)


def _draw_line(pixels: np.ndarray, defect: np.ndarray) -> None:
    """Draw the outline of flags [H, W] into an image [H, W, 3]."""
    width = max(1, round(max(defect.shape) / LINE_PER_SIDE))
    rows, columns = np.flatnonzero(defect.any(axis=1)), np.flatnonzero(defect.any(axis=0))
    margin = 2 * width + 1  # only around the defects: the filter visits every pixel that it gets
    top, left = max(0, rows[0] - margin), max(0, columns[0] - margin)
    box = slice(top, rows[-1] + 1 + margin), slice(left, columns[-1] + 1 + margin)
    flags = defect[box]
    line = _grown(flags, width)
    part = pixels[box]  # a view
    part[_grown(flags, width + max(1, width // 2)) & ~line] = SHADE
    part[line & ~flags] = CONTOUR


def _grown(flags: np.ndarray, by: int) -> np.ndarray:
    """Return flags [H, W] with a margin of `by` px around them."""
    grown = Image.fromarray(flags.astype(np.uint8) * 255)
    for _ in range(by):  # small steps: the time of one grows with the square of its width
        grown = grown.filter(ImageFilter.MaxFilter(3))
    return np.asarray(grown) > 0


def _colour(is_anomalous: bool | None) -> tuple[int, int, int]:
    if is_anomalous is None:
        return UNDECIDED
    return ALARM if is_anomalous else NORMAL


def _write(image: Image.Image, text: str, colour: tuple[int, int, int], defect: np.ndarray | None) -> None:
    """Write a text on a plate into the first corner without defects; not at all where it would cover the image."""
    letters = font(max(12, min(96, round(max(image.size) / TEXT_PER_SIDE))))
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=letters)
    pad = round((bottom - top) / 2)
    width, height = round(right - left) + 2 * pad, round(bottom - top) + 2 * pad
    if width > image.width or 4 * height > image.height:
        return
    corners = [
        (x, y) for y in (0, image.height - height) for x in (0, image.width - width)
    ]  # upper left, upper right, lower left, lower right
    free = (c for c in corners if defect is None or not defect[c[1] : c[1] + height, c[0] : c[0] + width].any())
    x, y = next(free, corners[0])
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    draw.text((x + pad - left, y + pad - top), text, fill=(255, 255, 255), font=letters)

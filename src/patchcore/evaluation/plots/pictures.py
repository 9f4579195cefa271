"""Pictures of results for a person at an inspection line."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from patchcore.evaluation.plots.style import fitted, font

PANEL_PX = 288  # side of the square that holds a panel: text of 15 px stays readable beside it
GAP_PX = 12
HEADER_PX = 58
FOOTER_PX = 30
SCALE_PX = 185  # width of the colour scale and its labels
BACKGROUND = (255, 255, 255)
INK = (33, 37, 41)
MUTED = (95, 102, 110)
ALARM = (176, 0, 32)
CONTOUR = (0, 229, 255)  # cyan: apart from every colour of the heat map, for colour-blind eyes too
DEFECT_OVERLAY = (0, 229, 255)
SCALE_HEADROOM = 1.5  # the threshold lies at two thirds of the colour scale: defects beyond it still differ
FAST_COMPRESSION = 1  # a third of the time of the default, files a quarter larger
MAX_NAME_BYTES = 200  # of a picture without suffix; file systems end at 255


@dataclass(frozen=True)
class HeatScale:
    """One colour scale for a whole class, so that pictures can be compared.

    Attributes:
        low: Map value at the cold end: that of an ordinary normal pixel.
        high: Map value at the hot end.
        threshold: Pixel threshold; None where the model has no calibration.
    """

    low: float
    high: float
    threshold: float | None

    @classmethod
    def up_to_threshold(cls, low: float, threshold: float) -> HeatScale:
        """Return the scale on which an ordinary normal pixel is cold and the pixel threshold warm."""
        return cls(low, low + SCALE_HEADROOM * (threshold - low), threshold)

    def levels(self, anomaly_map: np.ndarray) -> np.ndarray:
        """Return map values as shares of the scale, clipped to [0, 1]."""
        width = max(self.high - self.low, 1e-12)
        return np.clip((anomaly_map - self.low) / width, 0, 1)


@dataclass(frozen=True)
class Caption:
    """What stands above a picture.

    Attributes:
        name: Which image.
        truth: Defect type, or "good".
        score: Raw image score.
        threshold: Image threshold; None where the model has no calibration.
    """

    name: str
    truth: str
    score: float
    threshold: float | None


def segmentation_picture(
    image: np.ndarray, mask: np.ndarray | None, anomaly_map: np.ndarray, scale: HeatScale, caption: Caption
) -> Image.Image:
    """Draw image, ground truth and heat map side by side, with the score above.

    Args:
        image: uint8 [H, W, 3], what was scored.
        mask: uint8 [H, W], 1 where defect; None without ground truth.
        anomaly_map: float [H, W], raw.
        scale: Colour scale of the class.
        caption: Text above the picture.

    Returns:
        An RGB image; in the heat map the line encloses what lies above the pixel threshold.
    """
    shown = resized(image)
    panels = [("image", shown)]
    if mask is not None:
        panels.append(("ground truth", _truth_panel(shown, mask)))
    panels.append(("heat map", _heated(shown, anomaly_map, scale, PANEL_PX)))
    width = GAP_PX + len(panels) * (PANEL_PX + GAP_PX) + SCALE_PX
    canvas = Image.new("RGB", (width, HEADER_PX + PANEL_PX + FOOTER_PX), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    _draw_caption(draw, caption, width)
    for number, (title, panel) in enumerate(panels):
        left = GAP_PX + number * (PANEL_PX + GAP_PX)
        canvas.paste(panel, (left + (PANEL_PX - panel.width) // 2, HEADER_PX + (PANEL_PX - panel.height) // 2))
        draw.text((left, HEADER_PX + PANEL_PX + 6), title, fill=MUTED, font=font(15))
    canvas.paste(_scale_strip(scale), (GAP_PX + len(panels) * (PANEL_PX + GAP_PX), 0))
    return canvas


def picture_names(images: Sequence[tuple[str, str]]) -> list[str]:
    """Name the pictures of a class: `<defect type>_<image>.png`, shortened and numbered where that is needed.

    Args:
        images: Defect type and file name without suffix of each image.

    Returns:
        File names, no two alike (`a_b` / `c` and `a` / `b_c` would be), also where upper and lower case are one.
    """
    names: list[str] = []
    taken: set[str] = set()
    for defect_type, stem in images:
        base = f"{defect_type}_{stem}"
        while len(os.fsencode(base)) > MAX_NAME_BYTES:
            base = base[:-1]
        name, number = base, 0
        while name.casefold() in taken:
            name, number = f"{base}_{number}", number + 1
        taken.add(name.casefold())
        names.append(f"{name}.png")
    return names


def png_bytes(picture: Image.Image, compress_level: int = 6) -> bytes:
    """Return a picture as the content of a PNG file.

    Args:
        picture: What to store.
        compress_level: 0 to 9; FAST_COMPRESSION where there are many pictures.
    """
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=compress_level)
    return buffer.getvalue()


def _draw_caption(draw: ImageDraw.ImageDraw, caption: Caption, width: int) -> None:
    truth = f"   truth: {fitted(caption.truth, width // 3)}"
    name = fitted(caption.name, width - 2 * GAP_PX - int(font(15).getlength(truth)))
    draw.text((GAP_PX, 8), name + truth, fill=MUTED, font=font(15))
    text, colour = f"score {caption.score:.3g}", INK
    if caption.threshold is not None:
        anomalous = caption.score > caption.threshold
        verdict = "ANOMALOUS" if anomalous else "normal"
        text += f"   image threshold {caption.threshold:.3g}   {verdict}"
        colour = ALARM if anomalous else INK
    draw.text((GAP_PX, 29), text, fill=colour, font=font(19))


def _truth_panel(shown: Image.Image, mask: np.ndarray) -> Image.Image:
    """Tint the defect and draw its outline in a panel that shows the image."""
    defect = resized_flags(mask == 1)
    pixels = np.array(shown)
    pixels[defect] = (0.55 * pixels[defect] + 0.45 * np.array(DEFECT_OVERLAY)).astype(np.uint8)
    pixels[outline(defect)] = DEFECT_OVERLAY
    return Image.fromarray(pixels)


def heat_panel(image: np.ndarray, anomaly_map: np.ndarray, scale: HeatScale, side_px: int = PANEL_PX) -> Image.Image:
    """Lay the heat map over a faded gray image, opaque where it is hot.

    Args:
        image: uint8 [H, W, 3].
        anomaly_map: float [H, W], raw; NaN where nothing was inspected, which stays gray.
        scale: Colour scale.
        side_px: Longer side of the result, P.

    Returns:
        An RGB image; the line encloses what lies above the pixel threshold.
    """
    return _heated(resized(image, side_px=side_px), anomaly_map, scale, side_px)


def _heated(shown: Image.Image, anomaly_map: np.ndarray, scale: HeatScale, side_px: int) -> Image.Image:
    """Do what `heat_panel` does to an image that has the size of the panel."""
    values = np.asarray(resized(anomaly_map.astype(np.float32), side_px=side_px))  # [P, P]; fewer along a shorter side
    inspected = ~np.isnan(values)
    levels = (scale.levels(np.where(inspected, values, scale.low)) * 255).astype(np.uint8)
    levels = np.where(inspected, levels, np.uint16(256))
    share_of_gray, tint = _blending_table()
    gray = np.asarray(shown.convert("L"))
    blended = (gray * share_of_gray[levels])[..., None] + tint[levels]  # [P, P, 3]
    pixels = blended.astype(np.uint8)
    if scale.threshold is not None:
        pixels[outline(values > scale.threshold)] = CONTOUR
    return Image.fromarray(pixels)


@functools.lru_cache(maxsize=1)
def _blending_table() -> tuple[np.ndarray, np.ndarray]:
    """Return what of the gray is left [257] and what colour is added to it [257, 3] at each level; the last: nothing.

    A table, because blending every pixel by itself took most of the time of a picture.
    """
    opacity = np.append(0.25 + 0.55 * np.arange(256) / 255, 0.0)
    tint = opacity[:, None] * np.vstack([colour_table(), np.zeros((1, 3))])
    return (1 - opacity).astype(np.float32), tint.astype(np.float32)


@functools.lru_cache(maxsize=4)  # all pictures of a class have the same one
def _scale_strip(scale: HeatScale) -> Image.Image:
    """Draw the colour scale with the threshold marked, as high as a picture."""
    strip = Image.new("RGB", (SCALE_PX, HEADER_PX + PANEL_PX + FOOTER_PX), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    bar = np.linspace(255, 0, PANEL_PX).astype(np.uint8)
    strip.paste(Image.fromarray(np.repeat(colour_table()[bar].astype(np.uint8)[:, None], 18, axis=1)), (0, HEADER_PX))
    low = scale.low if abs(scale.low) > 1e-3 * (scale.high - scale.low) else 0.0  # 0 but for rounding reads as 0
    marks = [(scale.high, f"{scale.high:.3g}"), (scale.low, f"{low:.3g}")]
    if scale.threshold is not None:
        marks.append((scale.threshold, f"pixel threshold {scale.threshold:.3g}"))
    for value, label in marks:
        level = float(scale.levels(np.array(value)))
        y = HEADER_PX + round((1 - level) * (PANEL_PX - 1))
        draw.line([(0, y), (24, y)], fill=INK, width=2)
        draw.text((28, min(max(y - 9, HEADER_PX - 4), HEADER_PX + PANEL_PX - 18)), label, fill=INK, font=font(14))
    return strip


def resized(
    image: np.ndarray, resampling: Image.Resampling = Image.Resampling.BILINEAR, side_px: int = PANEL_PX
) -> Image.Image:
    """Scale an image or a map so that its longer side fills a panel."""
    height, width = image.shape[:2]
    scale = side_px / max(height, width)
    return Image.fromarray(image).resize((max(1, round(scale * width)), max(1, round(scale * height))), resampling)


def resized_flags(flags: np.ndarray, side_px: int = PANEL_PX) -> np.ndarray:
    """Scale flags; a pixel of the panel is set if any of those that it stands for is: small defects must be seen."""
    return np.asarray(resized(flags.astype(np.float32), Image.Resampling.BOX, side_px)) > 0


def outline(flags: np.ndarray) -> np.ndarray:
    """Return a two pixels wide line along the inner edge of the flagged area."""
    inner = flags.copy()
    for _ in range(2):
        padded = np.pad(inner, 1, constant_values=True)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return flags & ~inner


@functools.lru_cache(maxsize=1)
def colour_table() -> np.ndarray:
    """Return 256 colours float64 [256, 3] in [0, 255]: perceptually uniform, readable in print."""
    return matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255

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
    panels = [("image", resized(image))]
    if mask is not None:
        panels.append(("ground truth", _truth_panel(image, mask)))
    panels.append(("heat map", heat_panel(image, anomaly_map, scale)))
    width = GAP_PX + len(panels) * (PANEL_PX + GAP_PX) + SCALE_PX
    canvas = Image.new("RGB", (width, HEADER_PX + PANEL_PX + FOOTER_PX), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    _draw_caption(draw, caption, width)
    for number, (title, panel) in enumerate(panels):
        left = GAP_PX + number * (PANEL_PX + GAP_PX)
        canvas.paste(panel, (left + (PANEL_PX - panel.width) // 2, HEADER_PX + (PANEL_PX - panel.height) // 2))
        draw.text((left, HEADER_PX + PANEL_PX + 6), title, fill=MUTED, font=font(15))
    _draw_scale(canvas, draw, GAP_PX + len(panels) * (PANEL_PX + GAP_PX), scale)
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


def png_bytes(picture: Image.Image) -> bytes:
    """Return a picture as the content of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
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


def _truth_panel(image: np.ndarray, mask: np.ndarray) -> Image.Image:
    """Tint the defect and draw its outline."""
    defect = resized_flags(mask == 1)
    base = np.asarray(resized(image)).astype(np.float64)
    base[defect] = 0.55 * base[defect] + 0.45 * np.array(DEFECT_OVERLAY)
    base[outline(defect)] = DEFECT_OVERLAY
    return Image.fromarray(base.astype(np.uint8))


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
    gray = np.asarray(resized(image, side_px=side_px).convert("L")).astype(np.float64)[..., None]
    values = np.asarray(resized(anomaly_map.astype(np.float32), side_px=side_px))  # [P, P]; fewer along a shorter side
    inspected = ~np.isnan(values)
    levels = scale.levels(np.where(inspected, values, scale.low))
    colours = colour_table()[(levels * 255).astype(np.uint8)]  # [P, P, 3]
    opacity = np.where(inspected, 0.25 + 0.55 * levels, 0)[..., None]
    blended = (1 - opacity) * gray + opacity * colours
    if scale.threshold is not None:
        blended[outline(values > scale.threshold)] = CONTOUR
    return Image.fromarray(blended.astype(np.uint8))


def _draw_scale(canvas: Image.Image, draw: ImageDraw.ImageDraw, left: int, scale: HeatScale) -> None:
    """Draw the colour scale with the threshold marked."""
    bar = np.linspace(255, 0, PANEL_PX).astype(np.uint8)
    canvas.paste(
        Image.fromarray(np.repeat(colour_table()[bar].astype(np.uint8)[:, None], 18, axis=1)), (left, HEADER_PX)
    )
    low = scale.low if abs(scale.low) > 1e-3 * (scale.high - scale.low) else 0.0  # 0 but for rounding reads as 0
    marks = [(scale.high, f"{scale.high:.3g}"), (scale.low, f"{low:.3g}")]
    if scale.threshold is not None:
        marks.append((scale.threshold, f"pixel threshold {scale.threshold:.3g}"))
    for value, label in marks:
        level = float(scale.levels(np.array(value)))
        y = HEADER_PX + round((1 - level) * (PANEL_PX - 1))
        draw.line([(left, y), (left + 24, y)], fill=INK, width=2)
        draw.text(
            (left + 28, min(max(y - 9, HEADER_PX - 4), HEADER_PX + PANEL_PX - 18)), label, fill=INK, font=font(14)
        )


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

"""What a data set looks like: contact sheets of its classes, and distributions over all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from patchcore.evaluation.plots.pictures import BACKGROUND, CONTOUR, GAP_PX, INK, MUTED, outline, resized, resized_flags
from patchcore.evaluation.plots.style import LINE_COLOURS, drawn, fitted, font, new_figure, plain

TILE_PX = 216
TITLE_PX, NAME_PX, HEAD_PX = 30, 24, 64
CROP_LINE = (255, 140, 0)  # apart from the cyan of the mask by hue and by lightness
MAX_ROWS = 30  # defect types on one sheet: more would be no picture any more
MAX_CLASSES = 40  # on one page of distributions
GROUPS = ("train good", "test good", "test anomalous")
GROUP_COLOURS = ("#0072B2", "#56B4E9", "#D55E00")
GROUP_HATCHES = ("", "//", "xx")


@dataclass(frozen=True)
class Tile:
    """One image on a contact sheet.

    Attributes:
        name: What stands below it.
        image: uint8 [H, W, 3].
        mask: uint8 [H, W], 1 where defect; None without.
        window: Top, left, bottom, right of what resize and crop keep, px.
    """

    name: str
    image: np.ndarray
    mask: np.ndarray | None
    window: tuple[int, int, int, int]


@dataclass(frozen=True)
class ClassDistribution:
    """What the distributions show of one class.

    Attributes:
        category: Its name.
        counts: Number of images for each of GROUPS.
        sizes: Number of images for each (width, height), px.
        defect_fractions: Share of defect pixels of each mask, in [0, 1].
        brightness: Mean of each image over pixels and channels, in [0, 255], for each of GROUPS.
        warmth: Mean red minus mean blue of each image, in [-255, 255], for each of GROUPS.
        crop_losses: Share of the defect pixels that each resize mode cuts off; None without any.
    """

    category: str
    counts: Mapping[str, int]
    sizes: Mapping[tuple[int, int], int]
    defect_fractions: Sequence[float]
    brightness: Mapping[str, Sequence[float]]
    warmth: Mapping[str, Sequence[float]]
    crop_losses: Mapping[str, float | None]


def contact_sheet(category: str, rows: Sequence[tuple[str, Sequence[Tile]]]) -> Image.Image:
    """Draw a few images of each kind, one row per kind.

    Args:
        category: Class, for the title.
        rows: Title and images of each row; rows beyond MAX_ROWS are counted, not drawn.

    Returns:
        An RGB image: the outline of each mask, and what resize and crop keep of images that they cut.
    """
    shown = rows[:MAX_ROWS]
    columns = max([4, *(len(tiles) for _, tiles in shown)])
    row_px = TITLE_PX + TILE_PX + NAME_PX
    width = GAP_PX + columns * (TILE_PX + GAP_PX)
    canvas = Image.new("RGB", (width, HEAD_PX + row_px * len(shown) + GAP_PX), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    hidden = f"   {len(rows) - len(shown)} more kinds are not shown" if len(rows) > len(shown) else ""
    draw.text((GAP_PX, 10), fitted(category, width // 2) + hidden, fill=INK, font=font(20))
    _draw_key(draw, [("outline of the mask", CONTOUR), ("what resize and crop keep", CROP_LINE)])
    for number, (title, tiles) in enumerate(shown):
        top = HEAD_PX + number * row_px
        draw.text((GAP_PX, top + 8), fitted(title, width - 2 * GAP_PX), fill=INK, font=font(15))
        for column, tile in enumerate(tiles):
            left = GAP_PX + column * (TILE_PX + GAP_PX)
            picture = _tile_picture(tile)
            place = left + (TILE_PX - picture.width) // 2, top + TITLE_PX + (TILE_PX - picture.height) // 2
            canvas.paste(picture, place)
            draw.text((left, top + TITLE_PX + TILE_PX + 2), fitted(tile.name, TILE_PX), fill=MUTED, font=font(13))
    return canvas


def _draw_key(draw: ImageDraw.ImageDraw, entries: Sequence[tuple[str, tuple[int, int, int]]]) -> None:
    """Explain the lines below the title of a sheet."""
    left = GAP_PX
    for text, colour in entries:
        draw.rectangle([left, 44, left + 16, 52], fill=colour, outline=MUTED)
        draw.text((left + 24, 38), text, fill=MUTED, font=font(15))
        left += 24 + int(font(15).getlength(text)) + 24


def _tile_picture(tile: Tile) -> Image.Image:
    """Scale an image to its tile, and draw the lines."""
    height, width = tile.image.shape[:2]
    values = np.asarray(resized(tile.image, side_px=TILE_PX)).copy()  # [P, P, 3]; fewer along a shorter side
    if tile.mask is not None and tile.mask.any():
        values[outline(resized_flags(tile.mask == 1, TILE_PX))] = CONTOUR
    picture = Image.fromarray(values)
    if tile.window != (0, 0, height, width):
        scale = TILE_PX / max(height, width)
        top, left, bottom, right = (round(scale * edge) for edge in tile.window)
        ImageDraw.Draw(picture).rectangle([left, top, right - 1, bottom - 1], outline=CROP_LINE, width=2)
    return picture


def distributions_picture(classes: Sequence[ClassDistribution]) -> Image.Image:
    """Draw counts, sizes, defect areas, brightness, colour and crop losses, one line of each panel per class.

    Args:
        classes: At least one; those beyond MAX_CLASSES are left out, and counted in the title.

    Returns:
        An RGB image with six panels.
    """
    shown = classes[:MAX_CLASSES]
    figure, canvas = new_figure(13.5, 4.2 + 0.62 * len(shown))
    panels = figure.subplots(2, 3)
    draw_panels: list[tuple[str, Callable[[Any, Sequence[ClassDistribution]], None]]] = [
        ("images", _draw_counts),
        ("image sides, px (○ shorter, □ longer)", _draw_sizes),
        ("defect pixels of an image, %", _draw_defects),
        ("mean brightness of an image, 0 to 255", lambda panel, c: _draw_groups(panel, [x.brightness for x in c])),
        ("mean red minus blue of an image", lambda panel, c: _draw_groups(panel, [x.warmth for x in c])),
        ("defect pixels that resize and crop cut off, %", _draw_crops),
    ]
    for panel, (title, draw) in zip(panels.ravel(), draw_panels, strict=True):
        draw(panel, shown)
        panel.set_xlabel(title)
        panel.set_yticks(range(len(shown)), [plain(c.category, 150) for c in shown])
        panel.set_ylim(len(shown) - 0.5, -0.5)
        panel.grid(axis="x", color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    if len(classes) > len(shown):
        figure.suptitle(f"the first {len(shown)} of {len(classes)} classes")
    return drawn(canvas)


def _legend(panel: Any) -> None:
    """Explain a panel above it, where no bar or box can lie beneath."""
    if panel.get_legend_handles_labels()[0]:
        panel.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8, handlelength=1.6)


def _draw_counts(panel: Any, classes: Sequence[ClassDistribution]) -> None:
    ends = np.zeros(len(classes))
    for number, group in enumerate(GROUPS):
        counts = np.array([c.counts[group] for c in classes], dtype=np.float64)
        style = {"color": GROUP_COLOURS[number], "hatch": GROUP_HATCHES[number], "edgecolor": "white"}
        panel.barh(range(len(classes)), counts, left=ends, height=0.6, label=group, linewidth=0.4, **style)
        ends += counts
    _legend(panel)


def _draw_sizes(panel: Any, classes: Sequence[ClassDistribution]) -> None:
    for side, marker, size, colour in ((min, "o", 40, LINE_COLOURS[0]), (max, "s", 130, LINE_COLOURS[1])):
        points = [(side(wh), row, count) for row, c in enumerate(classes) for wh, count in c.sizes.items()]
        if points:
            sides, rows, counts = np.array(points, dtype=np.float64).T
            area = size * (0.35 + 0.65 * counts / counts.max())  # rare sizes smaller, but never invisible
            panel.scatter(sides, rows, s=area, marker=marker, facecolors="none", edgecolors=colour, linewidths=1.4)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    low, high = panel.get_xlim()
    panel.set_xlim(min(low, high / 4), max(high, low * 4))


def _draw_defects(panel: Any, classes: Sequence[ClassDistribution]) -> None:
    positions = [row for row, c in enumerate(classes) if any(c.defect_fractions)]
    values = [[100 * f for f in classes[row].defect_fractions if f > 0] for row in positions]
    _draw_boxes(panel, values, positions, 0.5, GROUPS.index("test anomalous"))
    if positions:
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _draw_groups(panel: Any, classes: Sequence[Mapping[str, Sequence[float]]]) -> None:
    """Draw a box for each group of each class, one above the other."""
    for number, group in enumerate(GROUPS):
        rows = [row for row, values in enumerate(classes) if values[group]]
        positions = [row + 0.27 * (number - 1) for row in rows]
        _draw_boxes(panel, [classes[row][group] for row in rows], positions, 0.2, number, group)
    _legend(panel)


def _draw_boxes(
    panel: Any,
    values: Sequence[Sequence[float]],
    positions: Sequence[float],
    height: float,
    number: int,
    label: str | None = None,
) -> None:
    """Draw horizontal boxes in the colour and hatch of a group: quartiles, median, and a line to the extremes."""
    if not values:
        return
    low, first, median, third, high = np.array([np.quantile(v, (0, 0.25, 0.5, 0.75, 1)) for v in values]).T
    style = {"color": GROUP_COLOURS[number], "hatch": GROUP_HATCHES[number], "edgecolor": "black", "linewidth": 0.6}
    panel.hlines(positions, low, high, colors="black", linewidths=0.8, zorder=1.5)
    panel.barh(positions, third - first, left=first, height=height, label=label, **style)
    half = height / 2
    panel.vlines(median, np.array(positions) - half, np.array(positions) + half, colors="black", linewidths=1.8)


def _draw_crops(panel: Any, classes: Sequence[ClassDistribution]) -> None:
    """Draw one bar for each resize mode, with its figure: most are short or 0."""
    for number, mode in enumerate(classes[0].crop_losses):
        rows = [row for row, c in enumerate(classes) if c.crop_losses[mode] is not None]
        losses = [100 * (classes[row].crop_losses[mode] or 0.0) for row in rows]
        places = [row + 0.27 * (number - 1) for row in rows]
        style = {"color": LINE_COLOURS[number + 2], "hatch": GROUP_HATCHES[number], "edgecolor": "white"}
        panel.barh(places, losses, height=0.24, label=mode, linewidth=0.4, **style)
        for place, loss in zip(places, losses, strict=True):
            panel.text(loss, place, f" {loss:.2g}", va="center", fontsize=7)
    panel.set_xlim(0, max(1.0, panel.get_xlim()[1]))
    _legend(panel)

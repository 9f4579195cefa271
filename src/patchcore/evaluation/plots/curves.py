"""Curves: the metrics over the number of training images, the losses over the epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from patchcore.evaluation.fewshot import CURVE_METRICS, FEWSHOT_METRICS, FewShotPoint, images_text, seeds_text
from patchcore.evaluation.plots.style import LINE_COLOURS, LINE_MARKERS, LINE_STYLES, drawn, new_figure, plain

TICK_GAP, TICK_DIGIT = 0.025, 0.013  # shares of the axis: free space between two labels, width of a digit


def fewshot_picture(points: Sequence[FewShotPoint], mean_row: str) -> Image.Image:
    """Draw image AUROC and PRO against the number of training images, one line per class and one for the mean.

    Args:
        points: As `fewshot_points` returns them.
        mean_row: Row name of the mean over classes.

    Returns:
        An RGB image; bars span one standard deviation over seeds to either side, cut at 1. A metric that is blank
        everywhere gets no panel.
    """
    metrics = [m for m in CURVE_METRICS if any(p.means[m] is not None for p in points)] or [CURVE_METRICS[0]]
    names = list(dict.fromkeys(p.row_name for p in points))
    num_rows = -(-len(names) // 4)
    figure, canvas = new_figure(0.8 + 4.6 * len(metrics), 4.1 + 0.22 * num_rows)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    ticks = _ticks([p.num_images for p in points if p.row_name != mean_row])
    lines = {}
    for panel, metric in zip(panels, metrics, strict=True):
        for number, name in enumerate(names):
            curve = [p for p in points if p.row_name == name and p.means[metric] is not None]
            lines[name] = _draw_curve(panel, curve, metric, None if name == mean_row else number)
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [images_text(tick) for tick in ticks])
        panel.minorticks_off()
        panel.set_xlabel("training images per class")
        panel.set_ylabel(FEWSHOT_METRICS[metric])
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    labels = [plain(name, 260) for name in names]
    figure.legend(
        lines.values(),
        labels,
        title=_bars_text(points),
        loc="outside lower center",
        ncols=min(len(names), 4),
        frameon=False,
    )
    return drawn(canvas)


def training_picture(history: Sequence[Mapping[str, float | None]], category: str, loss_unit: str = "") -> Image.Image:
    """Draw the losses of a training against its epochs.

    Args:
        history: One row per epoch, with `epoch` and the losses in columns that end in `loss`.
        category: Class, for the title.
        loss_unit: Unit of the losses, for the axis.

    Returns:
        An RGB image with one line for each loss that has values.
    """
    figure, canvas = new_figure(6.4, 4.0)
    panel = figure.subplots()
    names = [name for name in history[0] if name.endswith("loss") and any(row[name] is not None for row in history)]
    for number, name in enumerate(names):
        points = [(row["epoch"], row[name]) for row in history if row[name] is not None]
        style = LINE_STYLES[number % len(LINE_STYLES)]
        panel.plot(*zip(*points, strict=True), style, color=LINE_COLOURS[number % len(LINE_COLOURS)], label=name)
    panel.set_xlabel("epoch")
    panel.set_ylabel(f"loss, {loss_unit}" if loss_unit else "loss")
    panel.set_title(plain(category, 400))
    panel.grid(color="0.9")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    return drawn(canvas)


def _bars_text(points: Sequence[FewShotPoint]) -> str:
    """Say what the bars of the few-shot curve are, or why there are none."""
    if all(p.num_seeds == 1 for p in points):
        return "one seed: no bars"
    return f"bars: standard deviation over {seeds_text(points)}"


def _draw_curve(panel: Any, curve: Sequence[FewShotPoint], metric: str, number: int | None) -> Any:
    """Draw one class, or the mean over classes where it has no number; returns its line."""
    images = [p.num_images for p in curve]
    means = np.array([p.means[metric] for p in curve], dtype=np.float64)
    stds = np.array([p.stds[metric] or 0.0 for p in curve])
    style: dict[str, Any] = {"color": "black", "linewidth": 2.4, "marker": "o", "markersize": 6.5, "zorder": 4}
    if number is not None:
        style = {
            "color": LINE_COLOURS[number % len(LINE_COLOURS)],
            "linestyle": LINE_STYLES[number // len(LINE_COLOURS) % len(LINE_STYLES)],
            "linewidth": 1.3,
            "marker": LINE_MARKERS[number % len(LINE_MARKERS)],
            "markersize": 5,
            "zorder": 3,
        }
    (line,) = panel.plot(images, means, **style)
    bars = [stds, np.clip(1 - means, 0, stds)]
    panel.errorbar(images, means, bars, fmt="none", ecolor=style["color"], elinewidth=0.9, capsize=2.5, zorder=2)
    return line


def _ticks(values: Sequence[float]) -> list[float]:
    """Choose ticks on a logarithmic axis: the values that most points have, as far as their labels do not overlap."""
    candidates = sorted(set(values), key=lambda value: (-values.count(value), value))
    width = max(np.log(max(values) / min(values)), 1e-12)
    chosen: list[float] = []
    for value in candidates:
        digits = len(images_text(value))
        gaps = [
            abs(np.log(value / other)) / width - TICK_DIGIT * (digits + len(images_text(other))) / 2 for other in chosen
        ]
        if all(gap >= TICK_GAP for gap in gaps):
            chosen.append(value)
    return sorted(chosen)

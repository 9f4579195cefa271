"""Bars of the metrics of several methods, with published numbers beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from patchcore.evaluation.plots.style import HATCHES, LINE_MARKERS, drawn, new_figure, plain, series_colour

Row = Mapping[str, Any]

GROUP_SHARE = 0.84  # of the distance between two classes, the rest is a gap
WIDEST_SLOT = 0.15
MARK_SLOTS = 0.6  # room of a published number, in bars
MAX_LABELLED = 40  # bars in a panel, beyond which their values would overlap
HEADROOM = 0.27  # above 1, for the values over the bars
LOWEST = 0.5  # where the axis begins unless a value lies below


def performance_picture(summary: Mapping[str, Any]) -> Image.Image | None:
    """Draw a panel per metric with a group of bars per class; published numbers are hollow marks.

    Args:
        summary: The comparison; its rows of `results`, and of `published` that are of one of its metrics.

    Returns:
        An RGB image; error bars span one standard deviation over seeds to either side. None without any value.
    """
    rows = [row for row in summary["results"] if row["mean"] is not None]
    if not rows:
        return None
    metrics = [metric for metric in summary["metrics"] if any(row["metric"] == metric for row in rows)]
    names = list(dict.fromkeys(row["class"] for row in rows))
    labels = [method["label"] for method in summary["methods"]]
    published = [row for row in summary["published"] if row["metric"] in metrics and row["row_name"] in names]
    sources = list(dict.fromkeys(row["method"] for row in published))
    width = float(np.clip(1.6 + 0.17 * len(names) * (len(labels) + MARK_SLOTS * len(sources)), 7.0, 17.0))
    num_columns = max(1, int(width / (5.5 if sources else 2.8)))
    legend_rows = -(-(len(labels) + len(sources)) // num_columns)
    figure, canvas = new_figure(width, 2.1 * len(metrics) + 0.75 + 0.23 * legend_rows)
    panels = figure.subplots(len(metrics), 1, squeeze=False, sharex=True)[:, 0]
    handles: dict[str, Any] = {}
    for panel, metric in zip(panels, metrics, strict=True):
        own = [row for row in rows if row["metric"] == metric]
        others = [row for row in published if row["metric"] == metric]
        _draw_bars(panel, own, names, labels, len(sources), handles)
        _draw_published(panel, others, names, sources, len(labels), handles)
        _finish(panel, summary["metrics"][metric], [row["mean"] for row in own] + [row["value"] for row in others])
    for panel in panels:
        for place in range(1, len(names)):
            panel.axvline(place - 0.5, color="0.85", linewidth=0.8)
    panels[-1].set_xlim(-0.5, len(names) - 0.5)
    panels[-1].set_xticks(range(len(names)), [plain(name, 150) for name in names], **_tilt(len(names), width))
    order = [name for name in [*labels, *(_published_name(s) for s in sources)] if name in handles]
    figure.legend(
        [handles[name] for name in order],
        [plain(name, 620) for name in order],
        title=_bars_text(rows),
        loc="outside lower center",
        ncols=num_columns,
        frameon=False,
        handleheight=1.3,
        handlelength=2.4,
    )
    return drawn(canvas)


def _draw_bars(
    panel: Any,
    rows: Sequence[Row],
    names: Sequence[str],
    labels: Sequence[str],
    num_sources: int,
    handles: dict[str, Any],
) -> None:
    slot, left = _slots(len(labels), num_sources)
    for number, label in enumerate(labels):
        own = [row for row in rows if row["method"] == label]
        if not own:
            continue
        places = [names.index(row["class"]) + left + (number + 0.5) * slot for row in own]
        means = np.array([row["mean"] for row in own])
        stds = np.array([row["std"] or 0.0 for row in own])
        handles[label] = panel.bar(
            places,
            means,
            width=0.92 * slot,
            color=series_colour(number),
            hatch=HATCHES[number % len(HATCHES)],
            edgecolor="white",
            linewidth=0.4,
            zorder=2,
        )
        bars = [stds, np.clip(1 - means, 0, stds)]
        shown = stds > 0
        panel.errorbar(
            np.array(places)[shown], means[shown], [b[shown] for b in bars], fmt="none", ecolor="black", elinewidth=0.9,
            capsize=2, zorder=3,
        )  # fmt: skip
        if len(names) * len(labels) <= MAX_LABELLED:
            for place, row in zip(places, own, strict=True):
                top = min(1.0, row["mean"] + (row["std"] or 0.0))
                panel.annotate(
                    f"{row['mean']:.3f}",
                    (place, top),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                    rotation=90,
                )


def _draw_published(
    panel: Any,
    rows: Sequence[Row],
    names: Sequence[str],
    sources: Sequence[str],
    num_methods: int,
    handles: dict[str, Any],
) -> None:
    slot, left = _slots(num_methods, len(sources))
    for number, source in enumerate(sources):
        own = [row for row in rows if row["method"] == source]
        if not own:
            continue
        places = [
            names.index(row["row_name"]) + left + (num_methods + MARK_SLOTS * (number + 0.5)) * slot for row in own
        ]
        (handles[_published_name(source)],) = panel.plot(
            places,
            [row["value"] for row in own],
            LINE_MARKERS[number % len(LINE_MARKERS)],
            color="black",
            markerfacecolor="white",
            markersize=5,
            zorder=4,
        )


def _slots(num_methods: int, num_sources: int) -> tuple[float, float]:
    """Return the width of a bar's place, and where the first one begins left of the centre of a class."""
    num_slots = num_methods + MARK_SLOTS * num_sources
    slot = min(GROUP_SHARE / num_slots, WIDEST_SLOT)
    return slot, -slot * num_slots / 2


def _published_name(source: str) -> str:
    return f"published: {source}"


def _finish(panel: Any, title: str, values: Sequence[float]) -> None:
    low = LOWEST if min(values) > LOWEST else np.floor(5 * min(values)) / 5
    panel.set_ylim(low, 1.0 + HEADROOM * (1.0 - low))
    panel.set_yticks(np.arange(1.0, low - 0.01, -0.1 if low > 0.3 else -0.2))
    panel.yaxis.set_major_formatter("{x:.2f}")
    panel.set_ylabel(title)
    panel.tick_params(axis="x", length=0)
    panel.grid(axis="y", color="0.9")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _tilt(num_names: int, width: float) -> dict[str, Any]:
    """Return how the names of classes are set: level where they fit side by side."""
    return {} if num_names * 1.35 <= width else {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}


def _bars_text(rows: Sequence[Row]) -> str:
    axis = "axes begin at 0.5, or lower where a value does"
    if all(row["std"] is None for row in rows):
        return f"one seed each; {axis}"
    return f"error bars: standard deviation over seeds; {axis}"

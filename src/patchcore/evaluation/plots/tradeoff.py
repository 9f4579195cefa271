"""Quality against latency."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from patchcore.evaluation.plots.style import LINE_MARKERS, drawn, new_figure, plain, series_colour


def pareto_picture(summary: Mapping[str, Any]) -> Image.Image | None:
    """Draw image AUROC and PRO against the latency of one image; filled: no method is both faster and better.

    Args:
        summary: The comparison, of which `pareto` is drawn.

    Returns:
        An RGB image; None where no method has a latency.
    """
    from matplotlib.ticker import LogLocator

    rows = summary["pareto"]
    if not rows:
        return None
    labels = [method["label"] for method in summary["methods"]]
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    num_columns = min(len(labels), 3)
    figure, canvas = new_figure(1.0 + 4.4 * len(metrics), 3.9 + 0.24 * -(-len(labels) // num_columns))
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for panel, metric in zip(panels, metrics, strict=True):
        own = [row for row in rows if row["metric"] == metric]
        front = sorted((row["latency_p50_ms"], row["value"]) for row in own if row["optimal"])
        panel.plot(
            *zip(*front, strict=True), color="0.6", linestyle="--", linewidth=1, drawstyle="steps-post", zorder=1
        )
        for row in own:
            number = labels.index(row["method"])
            colour = series_colour(number)
            (point,) = panel.plot(
                row["latency_p50_ms"],
                row["value"],
                LINE_MARKERS[number % len(LINE_MARKERS)],
                color=colour,
                markerfacecolor=colour if row["optimal"] else "white",
                markeredgewidth=1.6,
                markersize=9,
                linestyle="none",
                zorder=3,
            )
            handles.setdefault(row["method"], point)
        panel.margins(0.12)
        panel.set_xscale("log")
        panel.set_xlabel("latency of one image, median, ms (log scale)")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        panel.set_ylabel(summary["metrics"][metric])
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    shown = [label for label in labels if label in handles]
    figure.legend(
        [handles[label] for label in shown],
        [plain(label, 300) for label in shown],
        title="filled: no other method is both as fast and as good",
        loc="outside lower center",
        ncols=num_columns,
        frameon=False,
    )
    return drawn(canvas)

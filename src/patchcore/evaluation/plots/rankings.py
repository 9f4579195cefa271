"""ROC and precision-recall curves, and the distribution of scores, of several methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from patchcore.evaluation.plots.style import DASHES, LINE_MARKERS, drawn, new_figure, plain, series_colour

NUM_COLUMNS = 4
THRESHOLD = 0.5  # of normalised scores
MAX_DOTS = 400  # per method and kind of image
NUDGE = 1e-9  # far less than one good image's share
LEGEND = ("good images", "defective images", "median", "threshold")
STRIP = 0.16  # distance of the strips of good and defective images from a method's line


@dataclass(frozen=True)
class ScoredMethod:
    """Image scores of one method on one class.

    Attributes:
        number: Which of all methods it is, for its colour.
        label: Its name.
        scores: Per seed the raw scores float [N].
        normalized: Per seed the normalised scores float [N], the threshold at 0.5; None without calibration.
    """

    number: int
    label: str
    scores: Sequence[np.ndarray]
    normalized: Sequence[np.ndarray] | None


@dataclass(frozen=True)
class ScoredClass:
    """Image scores of all methods on one class.

    Attributes:
        name: The class.
        labels: bool [N], True for defective.
        methods: The methods that have it.
    """

    name: str
    labels: np.ndarray
    methods: Sequence[ScoredMethod]


def roc_picture(classes: Sequence[ScoredClass]) -> Image.Image:
    """Draw the ROC curve of each method, the mean over seeds at each false-positive rate, in a panel per class."""
    return _curves_picture(classes, _mean_roc, ("false-positive rate", "true-positive rate"), diagonal=True)


def precision_recall_picture(classes: Sequence[ScoredClass]) -> Image.Image:
    """Draw precision against recall of each method, the mean over seeds at each recall, in a panel per class."""
    return _curves_picture(classes, _mean_precision, ("recall", "precision"), diagonal=False)


def distribution_picture(classes: Sequence[ScoredClass]) -> Image.Image:
    """Draw the normalised scores of good and defective images with the threshold, in a panel per class.

    Scores of all seeds are drawn together. A method without a threshold has its raw scores, each seed stretched to
    its own range.
    """
    num_methods = max(len(c.methods) for c in classes)
    num_columns = min(len(classes), 3)
    num_rows = -(-len(classes) // num_columns)
    height = (0.65 + 0.42 * num_methods) * num_rows + 0.6
    figure, canvas = new_figure(max(7.0, 1.4 + 3.9 * num_columns), height)
    panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    handles: dict[str, Any] = {}
    for panel, scored in zip(panels, classes, strict=False):
        handles |= _draw_strips(panel, scored)
    explained = [name for name in LEGEND if name in handles]
    for position, panel in enumerate(panels):
        panel.set_visible(position < len(classes))
        if position + num_columns >= len(classes):
            panel.set_xlabel("image score, threshold at 0.5", fontsize=9)
        if position % num_columns:
            panel.tick_params(labelleft=panel.get_visible() and not _same_methods(classes, position, num_columns))
    figure.legend(
        [handles[name] for name in explained],
        explained,
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    return drawn(canvas)


Curve = Callable[[ScoredMethod, np.ndarray], "tuple[np.ndarray, np.ndarray] | None"]


def _curves_picture(classes: Sequence[ScoredClass], curve: Curve, axes: tuple[str, str], diagonal: bool) -> Image.Image:
    num_columns = min(len(classes), NUM_COLUMNS)
    num_rows = -(-len(classes) // num_columns)
    labels = {m.label: m.number for c in classes for m in c.methods}
    width = max(6.4, 0.8 + 3.1 * num_columns)
    legend_columns = min(len(labels), max(1, int(width / 2.6)))
    figure, canvas = new_figure(width, 3.1 * num_rows + 0.5 + 0.24 * -(-len(labels) // legend_columns))
    panels = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True).ravel()
    handles: dict[str, Any] = {}
    for panel, scored in zip(panels, classes, strict=False):
        if diagonal:
            panel.plot([0, 1], [0, 1], color="0.75", linewidth=0.8, zorder=1)
        for method in scored.methods:
            points = curve(method, scored.labels)
            if points is not None:
                handles[method.label] = _draw_line(panel, points, method.number)
        panel.set_title(plain(scored.name, 260), fontsize=10)
        panel.set_xlim(-0.02, 1.02)
        panel.set_ylim(-0.02, 1.03)
        panel.set_aspect("equal")
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(classes) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(classes) - num_columns) : len(classes)]:
        panel.tick_params(labelbottom=True)
        panel.set_xlabel(axes[0])
    for panel in panels[::num_columns]:
        panel.set_ylabel(axes[1])
    shown = [label for label in labels if label in handles]
    figure.legend(
        [handles[label] for label in shown],
        [plain(label, 300) for label in shown],
        loc="outside lower center",
        ncols=legend_columns,
        frameon=False,
        handlelength=3.6,
    )
    return drawn(canvas)


def _draw_line(panel: Any, points: tuple[np.ndarray, np.ndarray], number: int) -> Any:
    (line,) = panel.plot(
        *points,
        color=series_colour(number),
        linestyle=DASHES[number % len(DASHES)],
        linewidth=1.5,
        marker=LINE_MARKERS[number % len(LINE_MARKERS)],
        markersize=4.5,
        # By length, and elsewhere on each line, so that none hides another; a single point has no length.
        markevery=(0.04 + 0.02 * number, 0.22) if len(points[0]) > 1 else None,
        zorder=3,
    )
    return line


def _mean_roc(method: ScoredMethod, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return false-positive rates and mean true-positive rates before and after each step, [2G + 2] each."""
    if labels.all() or not labels.any():
        return None
    num_good = int(np.count_nonzero(~labels))
    rates = np.arange(num_good + 1) / num_good
    curves = []
    for scores in method.scores:
        flagged, hits = _counts(scores, labels)
        x, y = np.append(0, flagged - hits) / num_good, np.append(0, hits) / hits[-1]
        both_sides = [np.interp(rates + shift, x, y) for shift in (-NUDGE, NUDGE)]  # of the steps, which lie there
        both_sides[0][0] = 0.0
        curves.append(np.stack(both_sides, axis=1).ravel())
    return np.repeat(rates, 2), np.mean(curves, axis=0)


def _mean_precision(method: ScoredMethod, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return recalls [D] and the mean precision at the highest threshold that reaches each."""
    num_defective = int(np.count_nonzero(labels))
    if not num_defective or num_defective == len(labels):
        return None
    wanted = np.arange(1, num_defective + 1)
    curves = []
    for scores in method.scores:
        flagged, hits = _counts(scores, labels)
        reached = np.searchsorted(hits, wanted)
        curves.append(hits[reached] / flagged[reached])
    return wanted / num_defective, np.mean(curves, axis=0)


def _counts(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how many images, and how many defective ones, reach each distinct score, from the highest down."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    ends = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)
    return ends + 1, np.cumsum(labels[order])[ends]


def _draw_strips(panel: Any, scored: ScoredClass) -> dict[str, Any]:
    """Draw two strips of dots per method, good above defective; returns by name what the legend explains."""
    rng = np.random.default_rng(0)  # of the jitter
    handles: dict[str, Any] = {}
    for place, method in enumerate(scored.methods):
        colour = series_colour(method.number)
        values = method.normalized if method.normalized is not None else [_stretched(s) for s in method.scores]
        for kind, offset, marker, face in ((False, -STRIP, "o", "none"), (True, STRIP, "^", colour)):
            dots = np.concatenate([v[scored.labels == kind] for v in values])
            middle = np.median(dots) if len(dots) else np.nan
            dots = rng.permutation(dots)[:MAX_DOTS]
            height = place + offset + rng.uniform(-0.09, 0.09, len(dots))
            (drawn_dots,) = panel.plot(
                dots, height, marker, color=colour, markerfacecolor=face, markersize=3.4, markeredgewidth=0.7, alpha=0.6
            )
            (handles["median"],) = panel.plot(
                [middle] * 2, [place + offset - 0.15, place + offset + 0.15], "k-", linewidth=1.6
            )
            handles.setdefault(LEGEND[int(kind)], drawn_dots)
        if method.normalized is not None:
            (handles["threshold"],) = panel.plot([THRESHOLD] * 2, [place - 0.5, place + 0.5], "k--", linewidth=1)
        else:
            panel.text(1.0, place - 0.5, "no threshold: raw scores, stretched", ha="right", va="top", fontsize=7)
    panel.set_ylim(len(scored.methods) - 0.5, -0.5)
    panel.set_yticks(range(len(scored.methods)), [plain(m.label, 190) for m in scored.methods])
    panel.set_xlim(-0.02, 1.02)
    panel.set_title(plain(scored.name, 260), fontsize=10)
    panel.grid(axis="x", color="0.9")
    panel.spines[["top", "right"]].set_visible(False)
    return handles


def _same_methods(classes: Sequence[ScoredClass], position: int, num_columns: int) -> bool:
    """Return whether the panel at the left of the row names the same methods."""
    first = classes[position - position % num_columns]
    return [m.label for m in first.methods] == [m.label for m in classes[position].methods]


def _stretched(scores: np.ndarray) -> np.ndarray:
    span = float(scores.max() - scores.min())
    return (scores - scores.min()) / (span or 1.0)

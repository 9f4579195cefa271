"""Which differences between methods the test images can carry: a paired bootstrap.

All methods are measured on the same resamples of the test images, so that what makes an image hard for all of them
cancels in the difference.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapters 8 and 13: resampling of several
    samples, percentile intervals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95
BEST, TIED, UNTESTED = "best", "tied", "highest"


@dataclass(frozen=True)
class Standing:
    """How one method stands in one row of a table.

    Attributes:
        status: "best": highest, and every other one is distinguishable from it; "tied": not distinguishable from the
            highest one, or the highest one itself where there is such a one; "highest": highest, but some difference
            could not be tested; None: distinguishably worse, not tested, or without a competitor.
        difference: Highest value minus this one; None for the highest one.
        interval: Bootstrap interval of that difference; None for the highest one and where it cannot be tested.
    """

    status: str | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None


def stratified_weights(labels: np.ndarray, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Draw resamples with replacement, of the good and of the defective images apart.

    Args:
        labels: bool [N], True for defective.
        num_resamples: Number R of resamples.
        rng: Where the draws come from.

    Returns:
        [R, N] float32, how often each image occurs; each resample has as many of either kind as there are.
    """
    weights = np.zeros((num_resamples, len(labels)), np.float32)
    for kind in (False, True):
        chosen = np.flatnonzero(np.asarray(labels, bool) == kind)
        if len(chosen):
            weights[:, chosen] = rng.multinomial(len(chosen), np.full(len(chosen), 1 / len(chosen)), num_resamples)
    return weights


def weighted_image_metrics(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return exact image metrics of samples in which each image occurs a number of times.

    Args:
        scores: float [N], higher is more anomalous.
        labels: bool [N], True for defective.
        weights: [S, N], how often each image occurs.

    Returns:
        `instance_auroc` and `image_f1_max`, [S] each; NaN where a sample lacks one kind of image.
    """
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    scores, labels = scores[order], np.asarray(labels, bool)[order]
    ends = np.append(np.flatnonzero(scores[1:] != scores[:-1]), len(scores) - 1)  # last image of each group of ties
    flagged = np.cumsum(weights[:, order], axis=1, dtype=np.float64)[:, ends]  # [S, K]
    hits = np.cumsum(weights[:, order] * labels, axis=1, dtype=np.float64)[:, ends]
    defective, good = hits[:, -1:], flagged[:, -1:] - hits[:, -1:]
    start = np.zeros_like(defective)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = np.hstack([start, hits / defective])
        false_alarms = np.hstack([start, (flagged - hits) / good])
        auroc = np.sum(np.diff(false_alarms, axis=1) * (recall[:, 1:] + recall[:, :-1]) / 2, axis=1)
        f1 = np.max(2 * hits / (flagged + defective), axis=1)
    undefined = ((defective == 0) | (good == 0))[:, 0]
    return {"instance_auroc": np.where(undefined, np.nan, auroc), "image_f1_max": np.where(undefined, np.nan, f1)}


def percentile_interval(values: np.ndarray) -> tuple[float, float] | None:
    """Return the central interval that holds CONFIDENCE of bootstrap values; None where one is undefined."""
    if not np.isfinite(values).all():
        return None
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def standings(values: Mapping[str, float | None], resampled: Mapping[str, np.ndarray | None]) -> dict[str, Standing]:
    """Compare every method with the one of the highest value.

    Args:
        values: Per method the value in the table; None is a blank cell.
        resampled: Per method its value on each resample [R], the same resamples for all; None where there are none.

    Returns:
        A standing for each method that has a value.
    """
    known = {name: value for name, value in values.items() if value is not None}
    if len(known) < 2:
        return {name: Standing() for name in known}
    highest = max(known, key=lambda name: known[name])
    found = {}
    for name, value in known.items():
        if name != highest:
            interval = _difference_interval(resampled.get(highest), resampled.get(name))
            tied = interval is not None and interval[0] <= 0 <= interval[1]
            found[name] = Standing(TIED if tied else None, known[highest] - value, interval)
    others = list(found.values())
    if any(standing.status == TIED for standing in others):
        status = TIED
    else:
        status = UNTESTED if any(standing.interval is None for standing in others) else BEST
    return {name: Standing(status) if name == highest else found[name] for name in known}


def _difference_interval(highest: np.ndarray | None, other: np.ndarray | None) -> tuple[float, float] | None:
    if highest is None or other is None:
        return None
    return percentile_interval(highest - other)

"""Pixel metrics of many weighted samples of the same images, from one histogram per image.

An exact pixel AUROC or PRO sorts millions of pixels; a bootstrap needs a thousand of them. So the scores are put on a
common grid of levels once, and a sample is then a weighted sum of histograms. Within a level the curves are taken as
straight, which errs in the second order of a level's share of the pixels: by 1e-5 at most on real maps with 97 images,
and by less than 3e-4 in the tests, whose maps are noise and whose regions have down to four pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from patchcore.evaluation.metrics import DEFECT, NORMAL, PRO_FPR_LIMIT, label_regions
from patchcore.runtime import progress

NUM_LEVELS = 1000
QUANTILE_PIXELS = 200_000  # of which the levels are quantiles; the counts are over all
SAMPLES_AT_ONCE = 200  # bounds the memory: three float64 [samples, levels] arrays


@dataclass(frozen=True)
class PixelHistograms:
    """How the pixel scores of each image fall on the levels of one grid, highest level first.

    Attributes:
        normal: float32 [N, L] number of normal pixels.
        defect: float32 [N, L] number of defect pixels.
        coverage: float32 [N, L] sum over the defect regions of the share of a region's pixels.
        num_regions: int64 [N] defect regions.
    """

    normal: np.ndarray
    defect: np.ndarray
    coverage: np.ndarray
    num_regions: np.ndarray


def region_numbers(masks: np.ndarray) -> list[np.ndarray]:
    """Return for each mask uint8 [H, W] in {0, 1, 255} the region 1, 2, ... of each of its defect pixels."""
    return [label_regions(mask)[0][mask == DEFECT] for mask in progress(masks, "labelling defect regions")]


def pixel_histograms(
    anomaly_maps: np.ndarray, masks: np.ndarray, regions: Sequence[np.ndarray], num_levels: int = NUM_LEVELS
) -> PixelHistograms:
    """Count the pixels of every image on common levels.

    The levels are quantiles of the normal and of the defect pixels, half of them each, so that neither the
    false-positive rate nor the coverage makes a large step from one to the next.

    Args:
        anomaly_maps: float [N, H, W], higher is more anomalous; finite wherever the mask is not 255.
        masks: uint8 [N, H, W] in {0, 1, 255}; 255 enters nothing.
        regions: As `region_numbers` returns them; they are the same for all methods.
        num_levels: Largest number of levels; equal scores share one.

    Returns:
        The histograms.
    """
    edges = _level_edges(anomaly_maps, masks, num_levels)
    shape = len(masks), len(edges) + 1
    normal, defect, coverage = (np.zeros(shape, np.float32) for _ in range(3))
    num_regions = np.zeros(len(masks), np.int64)
    for i, mask in enumerate(progress(masks, "histograms of the maps")):
        normals = np.sort(anomaly_maps[i][mask == NORMAL])  # sorting first is the faster way to a histogram
        normal[i] = np.diff(np.searchsorted(normals, edges), prepend=0, append=len(normals))[::-1]
        if not len(regions[i]):
            continue
        levels = shape[1] - 1 - np.searchsorted(edges, anomaly_maps[i][mask == DEFECT], side="right")
        sizes = np.bincount(regions[i])
        num_regions[i] = len(sizes) - 1
        defect[i] = np.bincount(levels, minlength=shape[1])
        coverage[i] = np.bincount(levels, 1.0 / sizes[regions[i]], minlength=shape[1])
    return PixelHistograms(normal, defect, coverage, num_regions)


def weighted_pixel_metrics(histograms: PixelHistograms, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return pixel metrics of samples in which each image occurs a number of times.

    Args:
        histograms: Of the N images.
        weights: [S, N] how often each image occurs, >= 0.

    Returns:
        `full_pixel_auroc`, `anomaly_pixel_auroc` and `full_pro`, [S] each; NaN where a sample has no defect or no
        normal pixel.
    """
    weights = np.asarray(weights, np.float32)
    with_defect = weights * (histograms.num_regions > 0)
    parts: dict[str, list[np.ndarray]] = {"full_pixel_auroc": [], "anomaly_pixel_auroc": [], "full_pro": []}
    for start in range(0, len(weights), SAMPLES_AT_ONCE):
        chosen = slice(start, start + SAMPLES_AT_ONCE)
        rates = _cumulative_share(weights[chosen] @ histograms.normal)
        anomalous_rates = _cumulative_share(with_defect[chosen] @ histograms.normal)
        recall = _cumulative_share(weights[chosen] @ histograms.defect)
        covered = _cumulative_share(weights[chosen] @ histograms.coverage)  # the last is the number of regions
        parts["full_pixel_auroc"].append(_areas(rates, recall, 1.0))
        parts["anomaly_pixel_auroc"].append(_areas(anomalous_rates, recall, 1.0))
        parts["full_pro"].append(_areas(rates, covered, PRO_FPR_LIMIT) / PRO_FPR_LIMIT)
    return {name: np.concatenate(values) for name, values in parts.items()}


def _level_edges(anomaly_maps: np.ndarray, masks: np.ndarray, num_levels: int) -> np.ndarray:
    """Return ascending scores at which a new level begins."""
    edges = []
    for kind in (NORMAL, DEFECT):
        step = max(1, np.count_nonzero(masks == kind) // QUANTILE_PIXELS)
        pixels = np.concatenate([m[mask == kind][::step] for m, mask in zip(anomaly_maps, masks, strict=True)])
        if len(pixels):
            shares = np.linspace(0, 1, num_levels // 2, endpoint=False)
            edges.append(np.quantile(pixels, shares, method="lower"))
    return np.unique(np.concatenate(edges)) if edges else np.zeros(1, anomaly_maps.dtype)


def _cumulative_share(counts: np.ndarray) -> np.ndarray:
    """Return the share [S, L + 1] at or above each level, from 0 to 1; NaN where a sample has none."""
    total = np.cumsum(counts, axis=1, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        share = total / total[:, -1:]
    return np.concatenate([np.zeros((len(share), 1)), share], axis=1)


def _areas(x: np.ndarray, y: np.ndarray, limit: float) -> np.ndarray:
    """Return the areas [S] below the polylines (x, y) [S, L + 1] up to a limit, with x from 0 to 1."""
    before, after = x[:, :-1], np.minimum(x[:, 1:], limit)
    widths = np.maximum(after - before, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        kept = np.where(widths > 0, widths / (x[:, 1:] - before), 0)  # share of the step that lies below the limit
    areas = np.sum(widths * (y[:, :-1] + kept * (y[:, 1:] - y[:, :-1]) / 2), axis=1)
    return np.where(np.isnan(x[:, -1]) | np.isnan(y[:, -1]), np.nan, areas)

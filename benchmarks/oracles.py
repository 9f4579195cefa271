"""What the fast ways must agree with, computed the slow and certain way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from flat_index import flat_index
from reference import smooth_maps

from patchcore.runtime import derive_seed, progress
from patchcore.scoring.calibration import THRESHOLD_STDS, fold_bounds

THRESHOLD_PARTS = ("image", "pixel")


def greedy_in_float64(points: torch.Tensor, starts: torch.Tensor, num_picks: int) -> np.ndarray:
    """Pick the farthest point, step by step, in float64.

    Args:
        points: float32 [N, R].
        starts: Rows of the random points; a point's first distance is its mean distance to them.
        num_picks: Steps.

    Returns:
        int64 [num_picks], in order.
    """
    wide = points.double()
    anchors = torch.stack([torch.linalg.vector_norm(wide - wide[row], dim=1) for row in starts]).mean(dim=0).square()
    norms = wide.square().sum(dim=1)
    picks = torch.empty(num_picks, dtype=torch.int64)
    for step in progress(range(num_picks), "coreset in float64"):
        pick = int(anchors.argmax())
        picks[step] = pick
        squared = torch.addmv(norms, wide, wide[pick], alpha=-2).add_(norms[pick]).clamp_(min=0)
        squared[pick] = 0  # but for rounding
        torch.minimum(anchors, squared, out=anchors)
        anchors[pick] = -1  # a point is picked once
    return picks.numpy()


def overlap(picks: np.ndarray, oracle: np.ndarray) -> float:
    """Return which share of the oracle's picks was picked."""
    return len(np.intersect1d(picks, oracle)) / len(oracle)


def nearest_distances(queries: np.ndarray, bank: np.ndarray, index: object) -> np.ndarray:
    """Return the distance [Q] of each query to its nearest bank row, which a flat index names, by subtraction."""
    _, rows = index.search(queries, 1)  # type: ignore[attr-defined]
    return np.linalg.norm(queries - bank[rows[:, 0]], axis=1)


def out_of_fold_thresholds(
    embeddings: torch.Tensor, banks: Sequence[np.ndarray], folds: Sequence[np.ndarray], imagesize: int
) -> dict[str, float]:
    """Return the thresholds of images and pixels: mean plus three standard deviations of normal images.

    Args:
        embeddings: float32 [N, P, D] of the training images.
        banks: Memory bank of each fold, without patches of its images.
        folds: Image numbers of each fold.
        imagesize: Side of the anomaly maps, px.
    """
    side = int(embeddings.shape[1] ** 0.5)
    scores, maxima = [], []
    for bank, images in zip(banks, progress(folds, "thresholds by flat search"), strict=True):
        index = flat_index(bank, torch.get_num_threads())
        for image in images:
            distances = nearest_distances(embeddings[image].numpy(), bank, index)  # [P]
            scores.append(distances.max())
            maxima.append(smooth_maps(distances.reshape(1, side, side), imagesize)[0].max())
    both = zip(THRESHOLD_PARTS, (scores, maxima), strict=True)
    return {part: float(np.mean(v) + THRESHOLD_STDS * np.std(v, ddof=1)) for part, v in both}


def fold_images(num_images: int, seed: int, category: str) -> list[np.ndarray]:
    """Return the image numbers of each calibration fold, as the toolkit draws them."""
    generator = torch.Generator().manual_seed(derive_seed(seed, category, "folds"))
    order = torch.randperm(num_images, generator=generator).numpy()
    return [order[start:end] for start, end in fold_bounds(num_images)]

"""Score scale and thresholds, learned from normal images alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from patchcore.configs.thresholds import THRESHOLD_STDS, ThresholdRule
from patchcore.errors import ConfigurationError

NUM_FOLDS = 5
NEGLIGIBLE_SPREAD = 1e-6  # of the threshold: a narrower scale would round neighbouring float32 scores to one value
LEAVE_ONE_OUT_BELOW = 20  # images: fewer give folds too small to stand for the whole set


@dataclass(frozen=True)
class ScoreScale:
    """How the scores of normal images are distributed, and where normal ends.

    Attributes:
        mean: Mean over normal images.
        std: Standard deviation over normal images (n - 1 in the denominator).
        threshold: A score above it is called anomalous.
    """

    mean: float
    std: float
    threshold: float

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.mean, self.std, self.threshold))):
            raise ConfigurationError(f"score scale {self} is not finite: train or calibrate the model anew")

    def normalized(self, scores: np.ndarray) -> np.ndarray:
        """Map raw scores strictly monotonically to (0, 1), the threshold to 0.5.

        A rational function instead of a sigmoid: it does not round to 1 for strong defects. Its unit is three
        standard deviations of normal scores, whatever the rule that chose the threshold: so it stays monotone for
        a threshold below their mean. With the rule "mean3std" the mean of the normal images comes to lie at 0.25,
        unless they all score alike.

        Args:
            scores: Any shape, raw.

        Returns:
            float64, same shape.
        """
        z = (np.asarray(scores, dtype=np.float64) - self.threshold) / self.width
        tail = 0.5 / (1 + np.abs(z))  # 0.5 * (1 + z / (1 + |z|)) without its cancellation far below the threshold
        return np.where(z < 0, tail, 1 - tail)

    @property
    def width(self) -> float:
        """Unit of normalised scores: above the threshold by this much is 0.75, below it 0.25."""
        width = THRESHOLD_STDS * self.std
        if width <= NEGLIGIBLE_SPREAD * abs(self.threshold):  # all normal images score alike, but for rounding
            return abs(self.threshold) or 1.0
        return width


@dataclass(frozen=True)
class Calibration:
    """Thresholds and scales of one model.

    Attributes:
        method: "kfold" (scores of training images by models that have not seen them) or "split" (held-out images).
        num_folds: Models that gave the scores; equal to the number of images for leave-one-out.
        image: Scale of image scores.
        pixel: Scale of the maximum of each anomaly map; None for methods without maps. A normal image so
            seldom has a pixel above this threshold as a score above the image threshold.
        pixel_floor: Mean over all pixels of the normal maps; None for methods without maps.
        image_scores: The normal image scores, for other threshold rules.
        map_maxima: The maxima of the normal maps, for other threshold rules.
        rule: How the thresholds were chosen; models stored before there was a choice have the default.
    """

    method: str
    num_folds: int
    image: ScoreScale
    pixel: ScoreScale | None
    pixel_floor: float | None
    image_scores: tuple[float, ...]
    map_maxima: tuple[float, ...] | None
    rule: ThresholdRule = field(default_factory=ThresholdRule)


def calibrate(method: str, num_folds: int, scores: np.ndarray, maps: MapStatistics | None) -> Calibration:
    """Derive scales and thresholds from the scores of normal images that the model has not seen.

    The thresholds are those of the default rule; `scoring.thresholds.with_rule` gives those of another.

    Args:
        method: "kfold" or "split".
        num_folds: Models that gave the scores.
        scores: float [N], image scores.
        maps: Summary of their anomaly maps; None for methods without maps.
    """
    return Calibration(
        method=method,
        num_folds=num_folds,
        image=score_scale(scores),
        pixel=score_scale(maps.maxima) if maps else None,
        pixel_floor=float(np.mean(maps.means)) if maps else None,
        image_scores=tuple(map(float, scores)),
        map_maxima=tuple(map(float, maps.maxima)) if maps else None,
    )


@dataclass(frozen=True)
class MapStatistics:
    """Per image: maximum and mean of its anomaly map, each float [N]."""

    maxima: np.ndarray
    means: np.ndarray

    @classmethod
    def of(cls, chunks: Iterable[np.ndarray]) -> MapStatistics:
        """Summarise anomaly maps that come in chunks [n, S, S], so that never all of them are held."""
        maxima, means = zip(*((maps.max(axis=(1, 2)), maps.mean(axis=(1, 2))) for maps in chunks), strict=True)
        return cls(np.concatenate(maxima), np.concatenate(means))


def score_scale(scores: np.ndarray) -> ScoreScale:
    """Return mean, standard deviation and the threshold mean + 3 std of normal scores [N]."""
    values = np.asarray(scores, dtype=np.float64)
    mean = float(values.mean())
    std = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return ScoreScale(mean, std, mean + THRESHOLD_STDS * std)


def fold_bounds(num_images: int) -> list[tuple[int, int]]:
    """Return start and end of each fold of `num_images` shuffled images.

    Five folds; one image per fold (leave-one-out) below 20 images. Fewer than two images give no fold.
    """
    if num_images < 2:
        return []
    num_folds = num_images if num_images < LEAVE_ONE_OUT_BELOW else NUM_FOLDS
    edges: Sequence[int] = [round(i * num_images / num_folds) for i in range(num_folds + 1)]
    return list(itertools.pairwise(edges))

"""Good test images that a threshold flags, with the interval in which their true share lies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv

from patchcore.evaluation.metrics import IGNORED

CONFIDENCE = 0.95
IMAGE, ANY_PIXEL, PIXEL = "image", "any_pixel", "pixel"


@dataclass(frozen=True)
class FalseAlarms:
    """How many of the good ones a threshold flags.

    Attributes:
        level: "image" (images whose score is above the image threshold), "any_pixel" (images with a pixel above the
            pixel threshold) or "pixel" (pixels above it).
        num_good: Good images, or their pixels.
        num_flagged: Those of them that are flagged.
    """

    level: str
    num_good: int
    num_flagged: int

    @property
    def rate(self) -> float | None:
        """Share that is flagged; None where there is no good image."""
        return self.num_flagged / self.num_good if self.num_good else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Interval of the true share; None for pixels, which depend on their neighbours, and without good images."""
        if self.level == PIXEL or not self.num_good:
            return None
        return clopper_pearson(self.num_flagged, self.num_good)

    def row(self, rule: str, aimed_rate: float | None) -> dict[str, str | int | float | None]:
        """Return the row of a table.

        Args:
            rule: The rule that chose the threshold.
            aimed_rate: Share of good images that it lets raise an alarm; no rule aims at a share of pixels.
        """
        low, high = self.interval or (None, None)
        return {
            "level": self.level,
            "rule": rule,
            "aimed_rate": None if self.level == PIXEL else aimed_rate,
            "num_good": self.num_good,
            "num_flagged": self.num_flagged,
            "rate": self.rate,
            "interval_low": low,
            "interval_high": high,
        }


def clopper_pearson(num_flagged: int, num_good: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the exact interval of a binomial share: it holds the true one with at least this confidence.

    Args:
        num_flagged: Successes, from 0 to `num_good`.
        num_good: Trials, at least 1, independent of one another.
        confidence: In (0, 1); half of the rest lies on each side.

    Returns:
        Lower and upper end, in [0, 1].

    Source: Clopper and Pearson, "The use of confidence or fiducial limits" (Biometrika 26, 1934); the tails of a
        binomial as those of a beta distribution.
    """
    tail = (1 - confidence) / 2
    low = betaincinv(num_flagged, num_good - num_flagged + 1, tail) if num_flagged else 0.0
    high = betaincinv(num_flagged + 1, num_good - num_flagged, 1 - tail) if num_flagged < num_good else 1.0
    return float(low), float(high)


def image_false_alarms(scores: np.ndarray, threshold: float) -> FalseAlarms:
    """Count good images whose score is above the image threshold; scores float [N], of good images."""
    return FalseAlarms(IMAGE, len(scores), int((scores.astype(np.float64) > threshold).sum()))


def pixel_false_alarms(
    maps_and_masks: Iterable[tuple[np.ndarray, np.ndarray | None]], threshold: float
) -> tuple[FalseAlarms, FalseAlarms]:
    """Count good images with a pixel above the pixel threshold, and good pixels above it.

    Args:
        maps_and_masks: Of each good image the map float [H, W], and the mask uint8 [H, W], whose IGNORED pixels are
            no part of the image; None without ground truth.
        threshold: Pixel threshold, which is chosen on the maxima of whole maps: these are what counts for an image.

    Returns:
        Of images ("any_pixel"), and of pixels.
    """
    num_images = images_flagged = num_pixels = pixels_flagged = 0
    for anomaly_map, mask in maps_and_masks:
        flagged = anomaly_map.astype(np.float64) > threshold
        images_flagged += bool(flagged.any())
        num_images += 1
        inside = np.ones_like(flagged) if mask is None else mask != IGNORED
        num_pixels += int(inside.sum())
        pixels_flagged += int((flagged & inside).sum())
    return FalseAlarms(ANY_PIXEL, num_images, images_flagged), FalseAlarms(PIXEL, num_pixels, pixels_flagged)

"""Thresholds by rule: from normal scores alone, or from labelled validation images."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from patchcore.configs.thresholds import F1, MEAN_3_STD, ThresholdRule, exact_share
from patchcore.errors import DataError
from patchcore.scoring.calibration import Calibration


@dataclass(frozen=True)
class LabelledScores:
    """Scores of validation images, or of their pixels.

    Attributes:
        scores: float [N].
        labels: bool [N], True for anomalous ones.
    """

    scores: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class ValidationScores:
    """What a model says of labelled images that it was neither trained nor will be tested on.

    Attributes:
        images: Image scores.
        pixels: Values of the anomaly maps; None for methods without maps.
    """

    images: LabelledScores
    pixels: LabelledScores | None


def with_rule(calibration: Calibration, rule: ThresholdRule, validation: ValidationScores | None = None) -> Calibration:
    """Return a calibration whose thresholds follow a rule; the scale of normal scores stays what it is.

    Methods calibrate by mean plus three standard deviations; what they leave of each normal image is all that the
    other rules need, so that a method knows nothing of them.

    Args:
        calibration: What a method, or `calibrate`, gave.
        rule: How the thresholds are chosen.
        validation: Labelled scores, for the rule "f1".

    Raises:
        DataError: There are too few normal images for the quantile, or validation images of one kind alone.
    """
    if rule.name == MEAN_3_STD:
        return calibration
    if rule.name == F1:
        if validation is None:
            raise ValueError("the rule f1 needs validation scores")
        return _with_f1(calibration, rule, validation)
    assert rule.quantile is not None  # a ThresholdRule is valid once it is constructed
    maxima = calibration.map_maxima
    return _with_thresholds(
        calibration,
        rule,
        conformal_quantile(np.array(calibration.image_scores), rule.quantile),
        None if maxima is None else conformal_quantile(np.array(maxima), rule.quantile),
    )


def _with_f1(calibration: Calibration, rule: ThresholdRule, validation: ValidationScores) -> Calibration:
    pixel = None
    if calibration.pixel is not None:
        if validation.pixels is None:
            raise ValueError("the rule f1 needs validation maps and masks for the pixel threshold")
        pixel = f1_threshold(validation.pixels, "pixels of the validation images after resize and crop")
    return _with_thresholds(calibration, rule, f1_threshold(validation.images, "validation images"), pixel)


def _with_thresholds(calibration: Calibration, rule: ThresholdRule, image: float, pixel: float | None) -> Calibration:
    scale = calibration.pixel
    return replace(
        calibration,
        rule=rule,
        image=replace(calibration.image, threshold=image),
        pixel=None if scale is None or pixel is None else replace(scale, threshold=pixel),
    )


def images_needed(quantile: float) -> int:
    """Return how many normal images a quantile needs: the smallest n with quantile <= n / (n + 1)."""
    share = exact_share(quantile)
    return math.ceil(share / (1 - share))


def highest_quantile(num_images: int) -> float:
    """Return the highest quantile of four digits that so many normal images support; 0.0 where they support none."""
    return math.floor(10_000 * num_images / (num_images + 1)) / 10_000


def conformal_quantile(scores: np.ndarray, quantile: float) -> float:
    """Return the threshold that a new normal score exceeds with a probability of 1 - quantile at most.

    It is the ceil((n + 1) * quantile)-th smallest score. Among n + 1 exchangeable scores each rank is equally likely
    for the new one, whatever their distribution. Scores of held-out images are exchangeable with those of new images;
    out-of-fold scores are nearly so, and lie a little higher, as their models have seen fewer images.

    Args:
        scores: float [N], of normal images.
        quantile: In (0, 1).

    Raises:
        DataError: The rank lies beyond n: so few scores support no such quantile.

    Source: Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World" (2005), split conformal prediction.
    """
    rank = math.ceil((len(scores) + 1) * exact_share(quantile))
    if rank > len(scores):
        raise DataError(
            f"the threshold quantile:{quantile} needs {images_needed(quantile)} normal images, found {len(scores)}: "
            f"use quantile:{highest_quantile(len(scores)):g} or lower, or more images"
        )
    return float(np.sort(scores.astype(np.float64))[rank - 1])


def f1_threshold(labelled: LabelledScores, what: str) -> float:
    """Return the threshold of the highest F1; of several the highest, which raises the fewest false alarms.

    While it falls from one score of a positive to the next it only adds false positives, so that the best cut lies
    just below a positive's score. The threshold is halfway to the next lower score, since new scores fall on both
    sides of the cut; the lowest score of all has none below it, and its cut lies just beneath.

    Args:
        labelled: Scores and labels, at least one of each kind.
        what: What they are of, for the message.

    Raises:
        DataError: There are only positives or only negatives.
    """
    scores, labels = labelled.scores, labelled.labels
    positives, negatives = np.sort(scores[labels]), np.sort(scores[~labels])
    if not len(positives) or not len(negatives):
        raise DataError(
            f"the threshold rule f1 needs good and defective {what}, found {len(negatives)} and {len(positives)}: "
            "add the missing kind to --validation_data, or use another rule"
        )
    cuts = np.unique(positives)  # ascending
    hits = len(positives) - np.searchsorted(positives, cuts)  # positives at or above each cut
    alarms = len(negatives) - np.searchsorted(negatives, cuts)
    f1 = 2 * hits / (len(positives) + hits + alarms)
    cut = cuts[np.flatnonzero(f1 == f1.max())[-1]]
    lower = [float(values[i - 1]) for values in (positives, negatives) if (i := int(np.searchsorted(values, cut))) > 0]
    if not lower:
        return math.nextafter(float(cut), -math.inf)
    halfway = (float(cut) + max(lower)) / 2
    return halfway if halfway < cut else max(lower)  # two neighbouring float64 values have nothing between them

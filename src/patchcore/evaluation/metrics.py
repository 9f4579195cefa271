"""Image and pixel metrics of anomaly scores: AUROC, average precision, F1-max, PRO.

Every metric here is a function of the same few counts. While the threshold falls from one score of a positive
(anomalous image, defect pixel) to the next, only false positives are added: the ROC and PRO curves run
horizontally, precision and F1 fall. So the exact result over every distinct threshold needs no more than the
number of positives and of negatives that reach each distinct score of a positive. Negatives are therefore
sorted by value alone, without carrying an index, which is several times cheaper than an argsort.

A higher score is more anomalous. A metric that the data leave undefined is None, never 0 or 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from skimage.measure import label

from patchcore.runtime import progress

NORMAL, DEFECT, IGNORED = 0, 1, 255  # values of a mask; IGNORED is padding, which is no part of the image
PRO_FPR_LIMIT = 0.3


@dataclass(frozen=True)
class RankingMetrics:
    """Metrics that need no threshold; None where there are only positives or only negatives.

    Attributes:
        auroc: Area under the ROC curve, in [0, 1].
        average_precision: Precision averaged over the steps of recall, in [0, 1].
        f1_max: Highest F1 over all thresholds, in [0, 1].
    """

    auroc: float | None = None
    average_precision: float | None = None
    f1_max: float | None = None


@dataclass(frozen=True)
class ThresholdMetrics:
    """Metrics of the decisions at one threshold; None where the denominator is empty.

    Attributes:
        precision: Share of the flagged images that are anomalous; None if none is flagged or none is anomalous.
        recall: Share of the anomalous images that are flagged; None if none is anomalous.
        f1: Harmonic mean of both, 0 if no anomalous image is flagged; None if none is anomalous.
        false_alarm_rate: Share of the good images that are flagged; None if none is good.
    """

    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    false_alarm_rate: float | None = None


@dataclass(frozen=True)
class PixelMetrics:
    """Localisation metrics over all images, and over the images with a defect pixel alone.

    Attributes:
        auroc: Area under the pixel ROC curve of all images.
        average_precision: Average precision over the pixels of all images.
        f1_max: Highest pixel F1 over all thresholds.
        pro: Area under the PRO curve of all images up to a false-positive rate of 0.3, divided by 0.3.
        anomaly_auroc: `auroc` over the images with at least one defect pixel.
        anomaly_pro: `pro` over the images with at least one defect pixel.
        num_regions: Number of defect regions that entered `pro`.
    """

    auroc: float | None = None
    average_precision: float | None = None
    f1_max: float | None = None
    pro: float | None = None
    anomaly_auroc: float | None = None
    anomaly_pro: float | None = None
    num_regions: int = 0


def image_metrics(scores: np.ndarray, labels: np.ndarray) -> RankingMetrics:
    """Measure how well image scores rank anomalous images above good ones.

    Args:
        scores: [N] image scores, finite, higher is more anomalous.
        labels: [N] bool, True for anomalous.

    Returns:
        The metrics over every distinct threshold, ties counted exactly; None unless both labels occur.

    Raises:
        ValueError: Shapes differ, a label is neither 0 nor 1, or a score is NaN or infinite.
    """
    scores, labels = _checked_scores_and_labels(scores, labels)
    if labels.all() or not labels.any():
        return RankingMetrics()
    positives, negatives = np.sort(scores[labels])[::-1], np.sort(scores[~labels])
    ends = _tie_group_ends(positives)  # [K]
    reaching = _count_reaching(negatives, positives[ends])  # [2, K]
    return _ranking_metrics(_CumulativeCounts(ends + 1, reaching, len(negatives)))


def threshold_metrics(scores: np.ndarray, labels: np.ndarray, threshold: float) -> ThresholdMetrics:
    """Measure the decisions "anomalous if score > threshold" (strictly).

    Args:
        scores: [N] image scores, finite, higher is more anomalous.
        labels: [N] bool, True for anomalous.
        threshold: Largest score that still counts as good; may be infinite.

    Returns:
        Precision, recall, F1 and false-alarm rate.

    Raises:
        ValueError: As in `image_metrics`, or the threshold is NaN.
    """
    scores, labels = _checked_scores_and_labels(scores, labels)
    if np.isnan(threshold):
        raise ValueError("the image threshold is NaN, expected a number: calibrate the model again")
    flagged = scores > threshold
    hits = int(np.count_nonzero(flagged & labels))
    num_flagged, num_anomalous = int(np.count_nonzero(flagged)), int(np.count_nonzero(labels))
    return ThresholdMetrics(
        precision=_ratio(hits, num_flagged) if num_anomalous else None,
        recall=_ratio(hits, num_anomalous),
        f1=2 * hits / (num_flagged + num_anomalous) if num_anomalous else None,
        false_alarm_rate=_ratio(num_flagged - hits, len(labels) - num_anomalous),
    )


def pixel_metrics(anomaly_maps: np.ndarray, masks: np.ndarray) -> PixelMetrics:
    """Measure how well anomaly maps localise the defects of a test set.

    Args:
        anomaly_maps: [N, H, W] float32, higher is more anomalous; finite wherever the mask is not 255.
        masks: [N, H, W] uint8: 0 normal, 1 defect, 255 not part of the image (the padding of a letterboxed
            image), which enters nothing.

    Returns:
        The metrics over every distinct threshold, ties counted exactly. All are None if there is no defect
        pixel or no normal pixel; the anomaly-only ones also if no image with a defect has a normal pixel.

    Raises:
        ValueError: Shapes differ, a mask has another value, or a map is NaN or infinite.

    Source: PRO was introduced by Bergmann et al., "Uninformed Students" (CVPR 2020), integrated up to
        a false-positive rate of 0.3; Bergmann et al., "The MVTec Anomaly Detection Dataset" (IJCV 129, 2021)
        use it so for MVTec AD. The anomaly-only columns follow the original PatchCore code, which selects
        images by their mask, not by their label.
    """
    anomaly_maps, masks = np.asarray(anomaly_maps), np.asarray(masks)
    _check_maps_and_masks(anomaly_maps, masks)
    scores, normals_with_defects, normals_elsewhere = _pixel_scores(anomaly_maps, masks)
    _check_finite("anomaly map values", scores, normals_with_defects, normals_elsewhere)
    if len(scores) == 0:
        return PixelMetrics()
    return _rank_pixels(scores, _region_ids(masks), normals_with_defects, normals_elsewhere)


def label_regions(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Number the 8-connected defect regions of one mask.

    Args:
        mask: [H, W] uint8: 1 is defect; every other value, 255 (ignored) included, is background.

    Returns:
        Labels [H, W], 0 for background and 1, 2, ... in the order of each region's first pixel, row by row;
        and the number of regions.

    Raises:
        ValueError: The mask is not [H, W].
    """
    mask = np.asarray(mask)
    if mask.ndim != 2:  # a stack would be labelled as a volume, its regions joined from image to image
        raise ValueError(f"the mask has shape {mask.shape}, expected [H, W]: label one mask at a time")
    labels, num_regions = label(mask == DEFECT, connectivity=2, return_num=True)
    return labels, int(num_regions)


@dataclass(frozen=True)
class _CumulativeCounts:
    """What is flagged as the threshold falls through the K distinct scores of the positives.

    Attributes:
        true_positives: [K] int64, positives that reach threshold k; the last entry is their total, > 0.
        false_positives: [2, K] int64, negatives strictly above threshold k, and those that reach it.
        num_negatives: Total of the negatives.
    """

    true_positives: np.ndarray
    false_positives: np.ndarray
    num_negatives: int


def _pixel_scores(anomaly_maps: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the scores of defect pixels [D], of normal ones in images with a defect [M], and in others [M'].

    Image by image, since flags and copies of all maps at full resolution would take several times their memory.
    """
    scores, with_defects, elsewhere = ([np.empty(0, anomaly_maps.dtype)] for _ in range(3))
    for anomaly_map, mask in zip(anomaly_maps, progress(masks, "reading the pixels of the maps"), strict=True):
        defects = anomaly_map[mask == DEFECT]
        scores.append(defects)
        (with_defects if len(defects) else elsewhere).append(anomaly_map[mask == NORMAL])
    return np.concatenate(scores), np.concatenate(with_defects), np.concatenate(elsewhere)


def _rank_pixels(
    scores: np.ndarray,
    region_ids: np.ndarray,
    normals_with_defects: np.ndarray,
    normals_elsewhere: np.ndarray,
) -> PixelMetrics:
    """Compute all pixel metrics from one sort of each kind of pixel.

    Args:
        scores: [D] scores of the defect pixels, D > 0.
        region_ids: [D] their regions, 0, 1, ...
        normals_with_defects: [M] scores of normal pixels in images with a defect; sorted in place.
        normals_elsewhere: [M'] scores of normal pixels in the other images; sorted in place.

    Returns:
        The metrics.
    """
    order = np.argsort(scores)[::-1]
    scores, region_ids = scores[order], region_ids[order]
    ends = _tie_group_ends(scores)  # [K]
    coverage = _mean_region_coverage(region_ids, ends)  # [K]
    normals_with_defects.sort()
    normals_elsewhere.sort()

    reaching = _count_reaching(normals_with_defects, scores[ends])  # [2, K]
    anomalous = _CumulativeCounts(ends + 1, reaching, len(normals_with_defects))
    reaching = reaching + _count_reaching(normals_elsewhere, scores[ends])
    everywhere = _CumulativeCounts(ends + 1, reaching, len(normals_with_defects) + len(normals_elsewhere))
    ranking = _ranking_metrics(everywhere)
    return PixelMetrics(
        auroc=ranking.auroc,
        average_precision=ranking.average_precision,
        f1_max=ranking.f1_max,
        pro=_pro(everywhere, coverage),
        anomaly_auroc=_ranking_metrics(anomalous).auroc,
        anomaly_pro=_pro(anomalous, coverage),
        num_regions=int(region_ids.max()) + 1,
    )


def _tie_group_ends(scores: np.ndarray) -> np.ndarray:
    """Return the position of the last of each run of equal values in sorted, non-empty scores [P] -> [K]."""
    return np.append(np.flatnonzero(scores[1:] != scores[:-1]), len(scores) - 1)


def _count_reaching(negatives: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Count the negatives strictly above each threshold, and those at or above it.

    Args:
        negatives: [M] scores, ascending.
        thresholds: [K] scores.

    Returns:
        [2, K] int64 counts: row 0 strictly above, row 1 at or above.
    """
    not_reaching = [np.searchsorted(negatives, thresholds, side) for side in ("right", "left")]
    return len(negatives) - np.stack(not_reaching)


def _ranking_metrics(counts: _CumulativeCounts) -> RankingMetrics:
    """Return the threshold-free metrics, None without negatives."""
    if counts.num_negatives == 0:
        return RankingMetrics()
    return RankingMetrics(_auroc(counts), _average_precision(counts), _f1_max(counts))


def _auroc(counts: _CumulativeCounts) -> float:
    """Return the area under the ROC curve; ties count one half."""
    recall = counts.true_positives / counts.true_positives[-1]
    return _area_under_curve(*_curve(counts, recall), limit=1.0)


def _average_precision(counts: _CumulativeCounts) -> float:
    """Return the sum over thresholds of (step in recall) x precision, without interpolation."""
    steps = np.diff(counts.true_positives, prepend=0)
    precision = counts.true_positives / (counts.true_positives + counts.false_positives[1])
    return float(steps @ precision / counts.true_positives[-1])


def _f1_max(counts: _CumulativeCounts) -> float:
    """Return the highest F1; it lies at a positive's score, as going on to a negative's only adds errors."""
    flagged = counts.true_positives + counts.false_positives[1]
    return float(np.max(2 * counts.true_positives / (flagged + counts.true_positives[-1])))


def _pro(counts: _CumulativeCounts, coverage: np.ndarray) -> float | None:
    """Return the area under the PRO curve up to the limit, scaled to [0, 1]; None without negatives."""
    if counts.num_negatives == 0:
        return None
    return _area_under_curve(*_curve(counts, coverage), limit=PRO_FPR_LIMIT) / PRO_FPR_LIMIT


def _mean_region_coverage(region_ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the mean over regions of the share of a region that is flagged, at each threshold.

    Args:
        region_ids: [D] region 0, 1, ... of each defect pixel, by descending score.
        ends: [K] position of the last pixel that reaches each threshold.

    Returns:
        [K] float64, rising to exactly 1.
    """
    sizes = np.bincount(region_ids)  # [R]
    covered = np.cumsum(1.0 / sizes[region_ids])[ends]  # [K]
    return covered / covered[-1]  # the last is R up to rounding: so a perfect map scores 1, not 1 - 1e-13


def _curve(counts: _CumulativeCounts, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the vertices of the curve of heights over false-positive rate, from (0, 0) to (1, last height).

    Args:
        counts: The counts at the K thresholds.
        heights: [K] value of the curve when the pixels at threshold k are flagged.

    Returns:
        False-positive rates and heights, [2K + 2] each: before and after each threshold, and both ends.
    """
    rates = counts.false_positives.T.ravel() / counts.num_negatives  # [2K], above 1, at 1, above 2, ...
    rates = np.concatenate(([0.0], rates, [1.0]))  # [2K + 2]
    return rates, np.repeat(np.append(0.0, heights), 2)


def _area_under_curve(x: np.ndarray, y: np.ndarray, limit: float) -> float:
    """Return the trapezoid area below the polyline (x, y) up to limit, with x ascending from 0 to 1."""
    num_kept = int(np.searchsorted(x, limit, side="right"))
    y = np.append(y[:num_kept], np.interp(limit, x, y))
    x = np.append(x[:num_kept], limit)
    return float(np.diff(x) @ (y[1:] + y[:-1]) / 2)


def _region_ids(masks: np.ndarray) -> np.ndarray:
    """Number the regions of all images consecutively.

    Args:
        masks: [N, H, W] as in `pixel_metrics`, with D > 0 defect pixels.

    Returns:
        [D] int64 region 0, 1, ... of each defect pixel, in array order; no number is left out.
    """
    ids: list[np.ndarray] = []
    num_regions = 0
    for mask in progress(masks, "labelling defect regions"):
        labels, num_labels = label_regions(mask)
        ids.append(labels[mask == DEFECT] - 1 + num_regions)
        num_regions += num_labels
    return np.concatenate(ids)


def _ratio(numerator: int, denominator: int) -> float | None:
    """Return the quotient, None where the denominator is 0."""
    return numerator / denominator if denominator else None


def _checked_scores_and_labels(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scores as float64 [N] and labels as bool [N].

    A float32 score would be compared with a threshold rounded to float32, so that its decision could differ
    from that of the same score in float64; float64 holds every float32 exactly.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            f"scores have shape {scores.shape}, labels {labels.shape}, expected one of each per image: [N]"
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels are {np.unique(labels)[:5].tolist()}, expected True (anomalous) or False (good)")
    _check_finite("image scores", scores)
    return scores, labels.astype(bool)


def _check_finite(what: str, *arrays: np.ndarray) -> None:
    """Raise ValueError if a value is NaN or infinite: it has no place in a ranking."""
    num_bad = sum(array.size - int(np.count_nonzero(np.isfinite(array))) for array in arrays)
    if num_bad:
        total = sum(array.size for array in arrays)
        raise ValueError(
            f"{num_bad} of {total} {what} are NaN or infinite, expected finite numbers: "
            "check the model's weights and the precision it runs in"
        )


def _check_maps_and_masks(anomaly_maps: np.ndarray, masks: np.ndarray) -> None:
    """Raise ValueError unless both are [N, H, W] and the masks hold 0, 1 and 255 only."""
    if anomaly_maps.ndim != 3 or anomaly_maps.shape != masks.shape:
        raise ValueError(
            f"anomaly maps have shape {anomaly_maps.shape}, masks {masks.shape}, expected one [N, H, W]: "
            "resize the masks to the maps"
        )
    known = (masks == NORMAL) | (masks == DEFECT) | (masks == IGNORED)
    if not known.all():
        raise ValueError(
            f"masks hold the values {np.unique(masks[~known])[:5].tolist()}, expected 0 (normal), 1 (defect) "
            "and 255 (ignored): binarise them first"
        )

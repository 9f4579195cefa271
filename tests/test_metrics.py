"""Metrics against cases worked by hand, scikit-learn, and a PRO written as one plain loop over thresholds."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from scipy import ndimage
from sklearn import metrics as sklearn_metrics

from patchcore.evaluation.metrics import (
    PixelMetrics,
    RankingMetrics,
    ThresholdMetrics,
    image_metrics,
    label_regions,
    pixel_metrics,
    threshold_metrics,
)

EXACT = {"rel": 0, "abs": 1e-9}

# Two regions, A with one pixel and B with two, ten normal pixels, two ignored ones ("_").
#   A  .  .  .  B        9  8  7  7  7
#   .  .  .  .  B        7  1  1  1  3
#   .  .  .  _  _        1  1  1  99 99
HAND_MASK = np.array([[1, 0, 0, 0, 1], [0, 0, 0, 0, 1], [0, 0, 0, 255, 255]], dtype=np.uint8)
HAND_MAP = np.array([[9, 8, 7, 7, 7], [7, 1, 1, 1, 3], [1, 1, 1, 99, 99]], dtype=np.float32)


def sklearn_ranking(scores: np.ndarray, labels: np.ndarray) -> list[float]:
    """Return AUROC, average precision and F1-max from scikit-learn."""
    precision, recall, _ = sklearn_metrics.precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return [
        sklearn_metrics.roc_auc_score(labels, scores),
        sklearn_metrics.average_precision_score(labels, scores),
        f1.max(),
    ]


def brute_force_pro(anomaly_maps: np.ndarray, regions: list[np.ndarray], normal: np.ndarray) -> float:
    """Compute PRO by applying every distinct threshold to every map.

    Args:
        anomaly_maps: [N, H, W] scores.
        regions: One bool array [N, H, W] per region.
        normal: [N, H, W] bool, the normal pixels.
    """
    considered = normal | np.any(regions, axis=0)
    curve = [(0.0, 0.0)]
    for threshold in sorted(set(anomaly_maps[considered].tolist()), reverse=True):
        flagged = anomaly_maps >= threshold
        coverage = [(flagged & region).sum() / region.sum() for region in regions]
        curve.append(((flagged & normal).sum() / normal.sum(), float(np.mean(coverage))))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 < 0.3 < x1:
            x1, y1 = 0.3, y0 + (y1 - y0) * (0.3 - x0) / (x1 - x0)
        if x1 <= 0.3:
            area += (x1 - x0) * (y0 + y1) / 2
    return area / 0.3


def separate_regions(masks: np.ndarray) -> list[np.ndarray]:
    """Return one bool array [N, H, W] per 8-connected region, found by scipy instead of scikit-image."""
    regions = []
    for i, mask in enumerate(masks):
        labels, num_regions = ndimage.label(mask == 1, structure=np.ones((3, 3)))
        for k in range(1, num_regions + 1):
            region = np.zeros(masks.shape, dtype=bool)
            region[i] = labels == k
            regions.append(region)
    return regions


def oracle_pixel_metrics(anomaly_maps: np.ndarray, masks: np.ndarray) -> PixelMetrics:
    """Compute every pixel metric from scikit-learn and the brute-force PRO."""
    considered, with_defect = masks != 255, (masks == 1).any(axis=(1, 2))
    alone_maps, alone_masks = anomaly_maps[with_defect], masks[with_defect]
    alone = alone_masks != 255
    regions = separate_regions(masks)
    return PixelMetrics(
        *sklearn_ranking(anomaly_maps[considered], masks[considered] == 1),
        pro=brute_force_pro(anomaly_maps, regions, masks == 0),
        anomaly_auroc=sklearn_metrics.roc_auc_score(alone_masks[alone], alone_maps[alone]),
        anomaly_pro=brute_force_pro(alone_maps, separate_regions(alone_masks), alone_masks == 0),
        num_regions=len(regions),
    )


def assert_same(found: PixelMetrics, expected: PixelMetrics, tolerance: float = 1e-9) -> None:
    """Compare all columns."""
    for field in dataclasses.fields(PixelMetrics):
        value, wanted = getattr(found, field.name), getattr(expected, field.name)
        assert value == pytest.approx(wanted, rel=0, abs=tolerance), field.name


def random_maps_and_masks(
    seed: int, num_levels: int | None = None, num_images: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """Draw maps [N, 14, 11] that see defects faintly, and masks with several regions and ignored pixels.

    Args:
        seed: Of the draw.
        num_levels: How many distinct scores there are; None for no ties.
        num_images: N; the first two have no defect.
    """
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.standard_normal((num_images, 14, 11)), (0, 1, 1))
    masks = (smooth > np.quantile(smooth, 0.85)).astype(np.uint8)
    masks[:2] = 0
    anomaly_maps = rng.standard_normal(masks.shape) + 1.2 * masks
    if num_levels is not None:
        edges = np.quantile(anomaly_maps, np.linspace(0, 1, num_levels + 1)[1:-1])
        anomaly_maps = np.digitize(anomaly_maps, edges) / 8 - 1
    masks[rng.random(masks.shape) < 0.1] = 255
    return anomaly_maps.astype(np.float32), masks


# --- image level ----------------------------------------------------------------------------------


def test_image_metrics_by_hand() -> None:
    # Descending: 0.9 +, 0.8 -, 0.7 + and - tied, 0.1 -, 0.05 -.  2 positives, 4 negatives, 8 pairs.
    # AUROC: 0.9 beats 4; 0.7 beats 2 and ties 1 -> (4 + 2.5) / 8.
    # AP: recall 0 -> 1/2 at precision 1/1, 1/2 -> 1 at precision 2/4 -> 1/2 + 1/4.
    # F1: at 0.9 2*1 / (1+2), at 0.8 2*1 / (2+2), at 0.7 2*2 / (4+2), lower is worse -> 2/3.
    found = image_metrics(np.array([0.1, 0.9, 0.7, 0.8, 0.7, 0.05]), np.array([False, True, True, False, False, False]))
    assert found.auroc == pytest.approx(6.5 / 8, **EXACT)
    assert found.average_precision == pytest.approx(3 / 4, **EXACT)
    assert found.f1_max == pytest.approx(2 / 3, **EXACT)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("num_levels", [2, 5, 1000])
def test_image_metrics_agree_with_sklearn(seed: int, num_levels: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.random(60) < rng.uniform(0.05, 0.95)
    labels[:2] = [True, False]
    scores = rng.integers(num_levels, size=60) / 7 + rng.integers(2) * labels - 3
    found = dataclasses.astuple(image_metrics(scores, labels))
    assert found == pytest.approx(sklearn_ranking(scores, labels), **EXACT)


def test_perfect_reversed_and_constant_scores() -> None:
    labels = np.array([True, True, False, False, False, False])
    scores = np.array([6.0, 5, 4, 3, 2, 1])
    assert image_metrics(scores, labels) == RankingMetrics(1.0, 1.0, 1.0)
    assert image_metrics(-scores, labels).auroc == 0.0
    # All tied: half the pairs; precision 2/6 at recall 1; F1 = 2*2 / (6+2).
    assert image_metrics(np.zeros(6), labels) == RankingMetrics(0.5, pytest.approx(1 / 3), 0.5)


@pytest.mark.parametrize("labels", [[], [True], [False], [True] * 3, [False] * 3])
def test_image_metrics_are_undefined_without_both_labels(labels: list[bool]) -> None:
    assert image_metrics(np.arange(len(labels)), np.array(labels)) == RankingMetrics(None, None, None)


def test_labels_may_be_integers_and_scores_keep_double_precision() -> None:
    scores = np.array([1.0, 1.0 + 1e-12])  # equal in float32
    assert image_metrics(scores, np.array([0, 1])).auroc == 1.0


def test_bad_image_scores_are_refused() -> None:
    labels = np.array([True, False, False])
    with pytest.raises(ValueError, match="2 of 3 image scores are NaN or infinite"):
        image_metrics(np.array([np.nan, np.inf, 0]), labels)
    with pytest.raises(ValueError, match=r"shape \(2,\), labels \(3,\)"):
        image_metrics(np.zeros(2), labels)
    with pytest.raises(ValueError, match=r"labels are \[0, 2\]"):
        image_metrics(np.zeros(3), np.array([0, 2, 0]))


# --- threshold ------------------------------------------------------------------------------------


def test_threshold_metrics_by_hand() -> None:
    # Flagged above 0.5: 0.9 +, 0.8 -, 0.7 +; not flagged: 0.5 + (not strictly above), 0.4 -, 0.3 -, 0.2 -.
    found = threshold_metrics(
        np.array([0.9, 0.8, 0.7, 0.5, 0.4, 0.3, 0.2]), np.array([1, 0, 1, 1, 0, 0, 0]) == 1, threshold=0.5
    )
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == pytest.approx(2 / 3)
    assert found.f1 == pytest.approx(2 * 2 / (3 + 3))
    assert found.false_alarm_rate == pytest.approx(1 / 4)


@pytest.mark.parametrize("threshold", [-0.5, 1.0, 3.0])
def test_threshold_metrics_agree_with_sklearn(threshold: float) -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(200) < 0.4
    scores = rng.integers(-3, 4, size=200) + labels
    found, flagged = threshold_metrics(scores, labels, threshold), scores > threshold
    assert found.precision == pytest.approx(sklearn_metrics.precision_score(labels, flagged), **EXACT)
    assert found.recall == pytest.approx(sklearn_metrics.recall_score(labels, flagged), **EXACT)
    assert found.f1 == pytest.approx(sklearn_metrics.f1_score(labels, flagged), **EXACT)
    specificity = sklearn_metrics.recall_score(~labels, ~flagged)
    assert found.false_alarm_rate == pytest.approx(1 - specificity, **EXACT)


@pytest.mark.parametrize(
    ("scores", "labels", "threshold", "expected"),
    [
        ([], [], 0.5, ThresholdMetrics(None, None, None, None)),
        ([0.1, 0.2], [True, False], 0.5, ThresholdMetrics(None, 0.0, 0.0, 0.0)),  # nothing flagged
        ([0.1, 0.9], [True, False], 0.5, ThresholdMetrics(0.0, 0.0, 0.0, 1.0)),  # only a false alarm
        ([0.1, 0.9], [False, False], 0.5, ThresholdMetrics(None, None, None, 0.5)),  # none anomalous
        ([0.1, 0.2], [False, False], 0.5, ThresholdMetrics(None, None, None, 0.0)),
        ([0.1, 0.9], [True, True], 0.5, ThresholdMetrics(1.0, 0.5, pytest.approx(2 / 3), None)),  # none good
        ([0.1, 0.9], [False, True], np.inf, ThresholdMetrics(None, 0.0, 0.0, 0.0)),
        ([0.1, 0.9], [False, True], -np.inf, ThresholdMetrics(0.5, 1.0, pytest.approx(2 / 3), 1.0)),
    ],
)
def test_threshold_metrics_where_a_denominator_is_empty(
    scores: list[float], labels: list[bool], threshold: float, expected: ThresholdMetrics
) -> None:
    assert threshold_metrics(np.array(scores), np.array(labels), threshold) == expected


def test_a_float32_score_is_compared_in_double_precision() -> None:
    scores = np.array([0.1], dtype=np.float32)  # 0.100000001490...
    assert threshold_metrics(scores, np.array([True]), 0.1).recall == 1.0
    assert threshold_metrics(scores, np.array([True]), float(scores[0])).recall == 0.0


def test_a_nan_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="threshold is NaN"):
        threshold_metrics(np.zeros(2), np.array([True, False]), float("nan"))


# --- regions --------------------------------------------------------------------------------------


def test_label_regions_is_8_connected_and_in_row_order() -> None:
    mask = np.array(
        [
            [0, 0, 0, 1, 0, 1],
            [1, 0, 0, 0, 1, 0],
            [0, 1, 0, 0, 0, 0],
            [255, 0, 0, 0, 0, 0],
            [1, 255, 1, 0, 0, 1],
        ],
        dtype=np.uint8,
    )
    expected = [
        [0, 0, 0, 1, 0, 1],
        [2, 0, 0, 0, 1, 0],
        [0, 2, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [3, 0, 4, 0, 0, 5],  # ignored pixels join nothing
    ]
    labels, num_regions = label_regions(mask)
    assert num_regions == 5
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize(("value", "count"), [(0, 0), (1, 1), (255, 0)])
def test_label_regions_of_a_uniform_mask(value: int, count: int) -> None:
    labels, num_regions = label_regions(np.full((4, 6), value, dtype=np.uint8))
    assert num_regions == count
    np.testing.assert_array_equal(labels, np.full((4, 6), count))


def test_label_regions_refuses_a_stack_of_masks() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 4, 4\), expected \[H, W\]"):
        label_regions(np.ones((2, 4, 4), dtype=np.uint8))


@pytest.mark.parametrize("seed", range(5))
def test_label_regions_agrees_with_scipy(seed: int) -> None:
    mask = (np.random.default_rng(seed).random((30, 40)) < 0.25).astype(np.uint8)
    labels, num_regions = label_regions(mask)
    expected, expected_count = ndimage.label(mask, structure=np.ones((3, 3)))
    assert num_regions == expected_count
    assert len(set(zip(labels.ravel(), expected.ravel(), strict=True))) == num_regions + 1  # same partition


# --- pixel level ----------------------------------------------------------------------------------


def test_pixel_metrics_by_hand() -> None:
    # Threshold  normal flagged  FPR  coverage of A, B  mean
    #     9            0         0.0      1     0        1/2
    #     8            1         0.1      1     0        1/2
    #     7            4         0.4      1    1/2       3/4
    #     3            4         0.4      1     1         1
    #     1           10         1.0      1     1         1
    # PRO at FPR 0.3: 1/2 + 2/3 * 1/4 = 2/3.  Area: 0.1 * 1/2 + 0.2 * (1/2 + 2/3) / 2 = 1/6; / 0.3 = 5/9.
    # AUROC: 9 beats 10 normal pixels, 7 beats 6 and ties 3, 3 beats 6 -> 23.5 of 30 pairs.
    # AP: recall steps of 1/3 at precisions 1/1, 2/6, 3/7.
    # F1: 2*1 / (1+3), 2*2 / (6+3), 2*3 / (7+3) -> 0.6.
    found = pixel_metrics(HAND_MAP[None], HAND_MASK[None])
    expected = PixelMetrics(
        auroc=23.5 / 30,
        average_precision=(1 + 1 / 3 + 3 / 7) / 3,
        f1_max=0.6,
        pro=5 / 9,
        anomaly_auroc=23.5 / 30,
        anomaly_pro=5 / 9,
        num_regions=2,
    )
    assert_same(found, expected)


def test_a_normal_image_below_everything_by_hand() -> None:
    # Ten more normal pixels, all below 1, halve every FPR of the table above down to threshold 3:
    # (0, 1/2) (0.05, 1/2) (0.2, 3/4) (0.2, 1) (0.5, 1).
    # Area: 0.05 * 1/2 + 0.15 * 5/8 + 0.1 * 1 = 0.21875.  AUROC: 3 * 10 more pairs, all won.
    mask = np.zeros_like(HAND_MASK)
    mask[2] = 255
    found = pixel_metrics(np.stack([np.full_like(HAND_MAP, -5), HAND_MAP]), np.stack([mask, HAND_MASK]))
    assert found.auroc == pytest.approx(53.5 / 60, **EXACT)
    assert found.pro == pytest.approx(0.21875 / 0.3, **EXACT)
    alone = pixel_metrics(HAND_MAP[None], HAND_MASK[None])
    assert (found.average_precision, found.f1_max) == (alone.average_precision, alone.f1_max)
    assert (found.anomaly_auroc, found.anomaly_pro) == (alone.auroc, alone.pro)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_levels", [2, 4, 30, None])
def test_pixel_metrics_agree_with_the_oracles(seed: int, num_levels: int | None) -> None:
    anomaly_maps, masks = random_maps_and_masks(seed, num_levels)
    assert_same(pixel_metrics(anomaly_maps, masks), oracle_pixel_metrics(anomaly_maps, masks))


def test_the_integration_limit_on_a_vertex_and_inside_the_last_tie() -> None:
    mask = np.array([[1, 1] + [0] * 10], dtype=np.uint8)
    # Three of ten normal pixels reach the second defect score: the curve has a vertex at FPR 0.3.
    vertex = np.array([[9, 5, 8, 8, 8] + [0] * 7], dtype=np.float32)
    # Everything ties: one straight line from (0, 0) to (1, 1), half of 0.3 high on average up to 0.3.
    constant = np.ones((1, 12), dtype=np.float32)
    for anomaly_map, pro in ((vertex, 0.5), (constant, 0.15)):
        assert pixel_metrics(anomaly_map[None], mask[None]).pro == pytest.approx(pro, **EXACT)


def test_every_region_weighs_the_same() -> None:
    mask = np.zeros((20, 20), dtype=np.uint8)
    mask[:, :9], mask[10, 15] = 1, 1  # 180 pixels, touching three edges, and 1 pixel
    found_large, found_small = np.zeros((2, 20, 20), dtype=np.float32)
    found_large[:, :9], found_small[10, 15] = 1, 1
    # The found region raises the curve to 1/2 at FPR 0; the other ties with all normal pixels, so that the
    # curve rises from 1/2 at 0 straight to 1 at 1: mean height up to 0.3 is 1/2 + 1/2 * 0.15.
    for anomaly_map in (found_large, found_small):
        found = pixel_metrics(anomaly_map[None], mask[None])
        assert found.pro == pytest.approx(0.575, **EXACT)
        assert found.num_regions == 2


def test_perfect_and_reversed_maps() -> None:
    _, masks = random_maps_and_masks(0)
    perfect = (masks == 1).astype(np.float32)
    noise = np.random.default_rng(0).random(masks.shape, dtype=np.float32)
    for anomaly_maps in (perfect, perfect + noise * np.float32(0.5)):
        assert dataclasses.astuple(pixel_metrics(anomaly_maps, masks))[:-1] == (1.0,) * 6
    reverse = pixel_metrics(-perfect, masks)
    assert (reverse.auroc, reverse.pro, reverse.anomaly_auroc, reverse.anomaly_pro) == (0.0,) * 4


@pytest.mark.parametrize("num_levels", [6, None])
def test_a_strictly_monotone_transform_changes_nothing(num_levels: int | None) -> None:
    anomaly_maps, masks = random_maps_and_masks(1, num_levels)
    expected = pixel_metrics(anomaly_maps, masks)
    wide = anomaly_maps.astype(np.float64)
    for transformed in (anomaly_maps * 2**40, np.exp(wide), np.arctan(wide) - 100, wide**3 + wide):
        assert_same(pixel_metrics(transformed, masks), expected, tolerance=1e-14)


def test_the_order_of_images_changes_nothing() -> None:
    anomaly_maps, masks = random_maps_and_masks(2, num_levels=20)
    expected = pixel_metrics(anomaly_maps, masks)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(masks))
        assert_same(pixel_metrics(anomaly_maps[order], masks[order]), expected, tolerance=1e-14)


def test_ignored_pixels_change_nothing() -> None:
    anomaly_maps, masks = random_maps_and_masks(3, num_levels=20)
    expected = pixel_metrics(anomaly_maps, masks)
    for value in (np.nan, np.inf, -1e30, 0.0):
        changed = np.where(masks == 255, np.float32(value), anomaly_maps)
        assert_same(pixel_metrics(changed, masks), expected, tolerance=1e-14)
    border = ((0, 0), (5, 0), (3, 9))
    padded_maps = np.pad(anomaly_maps, border, constant_values=7)
    padded_masks = np.pad(masks, border, constant_values=255)
    assert_same(pixel_metrics(padded_maps, padded_masks), expected, tolerance=1e-14)


def test_negative_zero_ties_with_zero() -> None:
    mask = np.array([[[1, 1, 0, 0]]], dtype=np.uint8)
    zeros = np.array([[[0.0, -0.0, 0.0, -0.0]]], dtype=np.float32)
    assert pixel_metrics(zeros, mask) == pixel_metrics(np.zeros_like(zeros), mask)
    assert pixel_metrics(zeros, mask).auroc == 0.5


def test_neighbouring_floats_do_not_tie() -> None:
    values = np.float32(1) + np.arange(3, dtype=np.float32) * np.finfo(np.float32).eps
    found = pixel_metrics(values.reshape(1, 1, 3), np.array([[[1, 0, 1]]], dtype=np.uint8))
    # Descending +, -, +: one pair of two won; precision 1/1 and 2/3 at recall 1/2 and 1.
    assert found.auroc == 0.5
    assert found.average_precision == pytest.approx(5 / 6, **EXACT)


def test_arguments_are_left_as_they_were() -> None:
    anomaly_maps, masks = random_maps_and_masks(4)
    masks[2:, 0, 0] = 1  # every kind of pixel occurs in every group of images
    copies = anomaly_maps.copy(), masks.copy()
    pixel_metrics(anomaly_maps, masks)
    np.testing.assert_array_equal(anomaly_maps, copies[0])
    np.testing.assert_array_equal(masks, copies[1])


def test_undefined_pixel_metrics_are_none() -> None:
    maps = np.random.default_rng(0).random((2, 3, 4), dtype=np.float32)
    normal, defect = np.zeros((2, 3, 4), dtype=np.uint8), np.ones((2, 3, 4), dtype=np.uint8)
    assert pixel_metrics(maps, normal) == PixelMetrics()
    assert pixel_metrics(maps, np.full_like(normal, 255)) == PixelMetrics()
    assert pixel_metrics(maps[:0], normal[:0]) == PixelMetrics()
    assert pixel_metrics(maps, defect) == PixelMetrics(num_regions=2)
    # All normal pixels lie in the other image: only the anomaly-only columns are undefined.
    found = pixel_metrics(maps, np.stack([normal[0], defect[1]]))
    assert found.auroc is not None and found.pro is not None and found.num_regions == 1
    assert found.anomaly_auroc is None and found.anomaly_pro is None


def test_bad_maps_and_masks_are_refused() -> None:
    maps, masks = random_maps_and_masks(0)
    with pytest.raises(ValueError, match=r"\(4, 14, 11\), masks \(5, 14, 11\)"):
        pixel_metrics(maps[1:], masks)
    with pytest.raises(ValueError, match=r"expected one \[N, H, W\]"):
        pixel_metrics(maps[0], masks[0])
    broken = maps.copy()
    broken[0, masks[0] == 0] = np.inf
    broken[2, masks[2] == 1] = np.nan
    num_bad, num_considered = (masks[0] == 0).sum() + (masks[2] == 1).sum(), (masks != 255).sum()
    with pytest.raises(ValueError, match=f"{num_bad} of {num_considered} anomaly map values are NaN"):
        pixel_metrics(broken, masks)
    masks[1, 0, :2] = 2, 254
    with pytest.raises(ValueError, match=r"values \[2, 254\], expected 0 \(normal\), 1 \(defect\)"):
        pixel_metrics(maps, masks)

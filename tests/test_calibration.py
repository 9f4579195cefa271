"""Tests of score scales, thresholds and folds: cases worked by hand, and monotony down to the last bit."""

from __future__ import annotations

import math

import numpy as np
import pytest

from patchcore.scoring.calibration import MapStatistics, ScoreScale, calibrate, fold_bounds, score_scale


def test_threshold_by_hand() -> None:
    scale = score_scale(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert scale.mean == 3.0
    assert scale.std == pytest.approx(math.sqrt(2.5))  # squares 4 1 0 1 4 over n - 1
    assert scale.threshold == pytest.approx(3 + 3 * math.sqrt(2.5))


def test_scale_of_one_image_is_its_score() -> None:
    assert score_scale(np.array([7.0])) == ScoreScale(7.0, 0.0, 7.0)


def test_scale_is_computed_in_double_precision() -> None:
    scores = (1e4 + np.arange(50) * 1e-2).astype(np.float32)
    scale = score_scale(scores)
    assert scale.std == pytest.approx(float(scores.astype(np.float64).std(ddof=1)), rel=1e-12)


def test_normalized_by_hand() -> None:
    scale = ScoreScale(mean=2.0, std=1.0, threshold=5.0)
    # In widths of 3 from the threshold: -1, 0, 1, 3; then (1 + z / (1 + |z|)) / 2.
    np.testing.assert_allclose(scale.normalized(np.array([2.0, 5.0, 8.0, 14.0])), [0.25, 0.5, 0.75, 0.875])


SCALES = [
    ScoreScale(2.0, 1.0, 5.0),
    ScoreScale(30.0, 1e-3, 30.003),
    ScoreScale(30.0, 1e-4, 30.0003),
    ScoreScale(30.0, 1e-7, 30.0 + 3e-7),  # narrower than float32 tells scores apart
    ScoreScale(0.1, 1e-17, math.nextafter(0.1, 1)),  # only rounding
    ScoreScale(4.0, 0.0, 4.0),
    ScoreScale(0.0, 0.0, 0.0),
    ScoreScale(-7.0, 2.0, -1.0),  # a log-likelihood
    ScoreScale(-7.0, 0.0, -7.0),
    ScoreScale(5.0, 1.0, 2.0),  # a threshold chosen by another rule may lie below the mean of normal scores,
    ScoreScale(30.0, 2.0, 30.0),  # on it,
    ScoreScale(30.0, 2.0, math.nextafter(30.0, 31.0)),  # just above it,
    ScoreScale(2.0, 1e-3, 200.0),  # or far beyond
]


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_normalized_is_strictly_monotone_for_all_float32_scores(scale: ScoreScale) -> None:
    centre = np.float32(scale.threshold)
    neighbours = [centre]
    for _ in range(
        200 if centre else 0
    ):  # every float32 around it; those around zero are finer than any float64 at 0.5
        neighbours = [np.nextafter(neighbours[0], np.float32(-np.inf)), *neighbours]
        neighbours.append(np.nextafter(neighbours[-1], np.float32(np.inf)))
    far = np.float32(np.abs(centre) + 1) * np.float32(100)
    tail = [far]
    for _ in range(50):  # and around scores a hundred times as high
        tail.append(np.nextafter(tail[-1], np.float32(np.inf)))
    scores = np.unique(np.concatenate([np.array(tail), -np.array(tail), np.linspace(-far, far, 2001), neighbours]))
    normalized = scale.normalized(scores.astype(np.float32))
    assert normalized.dtype == np.float64
    distinct = np.diff(scores.astype(np.float32)) > 0
    assert (np.diff(normalized)[distinct] > 0).all()
    assert normalized.min() > 0
    assert normalized.max() < 1


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_a_normalized_score_does_not_depend_on_the_other_images(scale: ScoreScale) -> None:
    scores = np.random.default_rng(1).normal(scale.threshold, 1, 40).astype(np.float32)
    together = scale.normalized(scores)
    np.testing.assert_array_equal([scale.normalized(scores[i : i + 1])[0] for i in range(40)], together)
    np.testing.assert_array_equal(scale.normalized(np.append(scores, np.float32(1e9)))[:40], together)


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_threshold_becomes_one_half(scale: ScoreScale) -> None:
    assert float(scale.normalized(np.array(scale.threshold))) == 0.5


def test_decision_is_the_same_on_raw_and_normalized_scores() -> None:
    scores = np.random.default_rng(0).normal(30, 2, 500)
    scale = score_scale(scores[:50])
    np.testing.assert_array_equal(scale.normalized(scores) > 0.5, scores > scale.threshold)


def test_normalized_far_tails_keep_their_order_where_a_sigmoid_would_not() -> None:
    scale = ScoreScale(mean=1.0, std=0.01, threshold=1.03)
    scores = 1.03 + np.array([-1e9, -1e6, -1e3, 1e3, 1e4, 1e5, 1e6])
    normalized = scale.normalized(scores)
    assert (np.diff(normalized) > 0).all()
    assert 0 < normalized[0] < normalized[-1] < 1


def test_normalized_keeps_the_shape_and_propagates_nothing_odd() -> None:
    scale = ScoreScale(2.0, 1.0, 5.0)
    assert scale.normalized(np.zeros((2, 3, 4), dtype=np.float32)).shape == (2, 3, 4)
    assert scale.normalized(np.zeros(0)).shape == (0,)
    np.testing.assert_array_equal(scale.normalized(np.array([-np.inf, np.inf])), [0.0, 1.0])
    assert np.isnan(scale.normalized(np.array([np.nan]))).all()


@pytest.mark.parametrize("value", [0.1, 37.25, 1e-3])
def test_normal_images_that_score_alike(value: float) -> None:
    scale = score_scale(np.full(7, value))
    low, middle, high = scale.normalized(np.array([0.5 * value, scale.threshold, 2 * value]))
    assert low < middle == 0.5 < high
    assert low == pytest.approx(1 / 3, rel=1e-6)  # half a threshold below
    assert high == pytest.approx(3 / 4, rel=1e-6)  # a whole one above


@pytest.mark.parametrize("num_images", range(301))
def test_folds_cover_each_image_once_in_equal_parts(num_images: int) -> None:
    folds = fold_bounds(num_images)
    assert [i for start, end in folds for i in range(start, end)] == (list(range(num_images)) if folds else [])
    sizes = [end - start for start, end in folds]
    if num_images < 2:
        assert folds == []
    elif num_images < 20:
        assert sizes == [1] * num_images
    else:
        assert len(sizes) == 5
        assert max(sizes) - min(sizes) <= 1


def test_calibrate_by_hand() -> None:
    scores = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    maps = MapStatistics(maxima=np.array([2.0, 4.0, 6.0]), means=np.array([0.5, 1.0, 1.5]))
    calibration = calibrate("kfold", 3, scores, maps)
    assert calibration.image == ScoreScale(2.0, 1.0, 5.0)
    assert calibration.pixel == ScoreScale(4.0, 2.0, 10.0)
    assert calibration.pixel_floor == 1.0
    assert (calibration.method, calibration.num_folds) == ("kfold", 3)
    assert calibration.image_scores == (1.0, 2.0, 3.0)
    assert calibration.map_maxima == (2.0, 4.0, 6.0)
    assert all(type(score) is float for score in calibration.image_scores)  # as JSON needs them


def test_calibrate_without_maps_has_no_pixel_scale() -> None:
    calibration = calibrate("split", 1, np.array([1.0, 2.0]), None)
    assert calibration.pixel is None
    assert calibration.pixel_floor is None
    assert calibration.map_maxima is None


def test_the_rule_moves_one_half_and_keeps_the_unit() -> None:
    low, high = ScoreScale(2.0, 1.0, 3.0), ScoreScale(2.0, 1.0, 9.0)
    scores = np.array([-4.0, 0.0, 1.0, 6.0])
    np.testing.assert_allclose(low.normalized(scores + 3), high.normalized(scores + 9), rtol=1e-15)

"""The mathematics of a comparison: paired bootstrap, pixel histograms, size quartiles, Pareto front; its plots."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from patchcore.evaluation.defect_sizes import size_quartiles
from patchcore.evaluation.metrics import image_metrics, pixel_metrics
from patchcore.evaluation.paired import (
    Standing,
    percentile_interval,
    standings,
    stratified_weights,
    weighted_image_metrics,
)
from patchcore.evaluation.pareto import non_dominated
from patchcore.evaluation.pixel_histograms import pixel_histograms, region_numbers, weighted_pixel_metrics
from patchcore.evaluation.plots import rankings, style
from patchcore.evaluation.plots.rankings import (
    ScoredClass,
    ScoredMethod,
    distribution_picture,
    precision_recall_picture,
)


def test_resamples_hold_as_many_images_of_either_kind_as_there_are() -> None:
    labels = np.array([True] * 5 + [False] * 3)
    weights = stratified_weights(labels, 200, np.random.default_rng(0))
    assert weights.shape == (200, 8) and (weights == weights.round()).all() and weights.min() == 0
    assert (weights[:, labels].sum(axis=1) == 5).all() and (weights[:, ~labels].sum(axis=1) == 3).all()
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.2)
    assert np.array_equal(weights, stratified_weights(labels, 200, np.random.default_rng(0)))


@pytest.mark.parametrize("ties", [False, True])
def test_image_metrics_of_a_resample_are_those_of_its_images(ties: bool) -> None:
    rng = np.random.default_rng(1)
    labels = np.array([True] * 12 + [False] * 9)
    scores = rng.normal(0, 1, 21) + labels
    scores = scores.round(0) if ties else scores
    weights = stratified_weights(labels, 20, rng)
    found = weighted_image_metrics(scores, labels, weights)
    for i, row in enumerate(weights.astype(int)):
        chosen = np.repeat(np.arange(21), row)
        assert found["instance_auroc"][i] == pytest.approx(roc_auc_score(labels[chosen], scores[chosen]), abs=1e-12)
        assert found["image_f1_max"][i] == pytest.approx(image_metrics(scores[chosen], labels[chosen]).f1_max)


def test_image_metrics_are_undefined_without_one_kind_of_image() -> None:
    found = weighted_image_metrics(np.arange(3.0), np.array([True, True, False]), np.array([[1, 1, 0], [0, 0, 1]]))
    assert np.isnan(found["instance_auroc"]).all() and np.isnan(found["image_f1_max"]).all()


def maps_and_masks(num_images: int, side: int, quality: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return smooth-ish maps with defects in two thirds of the images, several regions and an ignored margin."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((num_images, side, side), np.uint8)
    for i in range(0, num_images, 3):
        masks[i, 3 : 5 + i % 7, 4 : 6 + i % 11] = 1
        masks[i + 1, side // 2 :, 2:5] = 1
        masks[i + 1, 2:4, side // 2 :] = 1
    masks[:, :, -2:] = 255
    maps = rng.gamma(2.0, 1.0, masks.shape) * rng.uniform(0.8, 1.4, (num_images, 1, 1)) + quality * (masks == 1)
    return maps.astype(np.float32), masks


@pytest.mark.parametrize("quality", [0.3, 2.0, 6.0])
def test_pixel_metrics_of_a_resample_are_those_of_its_images_closely(quality: float) -> None:
    maps, masks = maps_and_masks(30, 128, quality)
    histograms = pixel_histograms(maps, masks, region_numbers(masks))
    weights = np.vstack([np.ones(30), stratified_weights(np.arange(30) % 3 < 2, 4, np.random.default_rng(2))])
    found = weighted_pixel_metrics(histograms, weights)
    for i, row in enumerate(weights.astype(int)):
        chosen = np.repeat(np.arange(30), row)
        exact = pixel_metrics(maps[chosen], masks[chosen])
        assert found["full_pixel_auroc"][i] == pytest.approx(exact.auroc, abs=1e-4)
        assert found["anomaly_pixel_auroc"][i] == pytest.approx(exact.anomaly_auroc, abs=1e-4)
        assert found["full_pro"][i] == pytest.approx(exact.pro, abs=3e-4)  # regions of four pixels


def test_pixel_histograms_are_exact_where_scores_have_few_values() -> None:
    maps, masks = maps_and_masks(6, 32, 1.0)
    maps = maps.round(0)
    histograms = pixel_histograms(maps, masks, region_numbers(masks))
    exact = pixel_metrics(maps, masks)
    found = weighted_pixel_metrics(histograms, np.ones((1, 6)))
    assert found["full_pixel_auroc"][0] == pytest.approx(exact.auroc, abs=1e-6)
    assert found["anomaly_pixel_auroc"][0] == pytest.approx(exact.anomaly_auroc, abs=1e-6)
    assert histograms.normal.sum() == (masks == 0).sum() and histograms.defect.sum() == (masks == 1).sum()
    assert histograms.coverage.sum() == pytest.approx(histograms.num_regions.sum(), abs=1e-4)


def test_pixel_metrics_of_a_sample_without_defects_are_undefined() -> None:
    maps, masks = maps_and_masks(6, 32, 1.0)
    histograms = pixel_histograms(maps, masks, region_numbers(masks))
    good = (histograms.num_regions == 0).astype(float)
    found = weighted_pixel_metrics(histograms, good[None])
    assert all(np.isnan(values).all() for values in found.values())
    empty = np.zeros_like(masks)
    assert not np.isfinite(
        weighted_pixel_metrics(pixel_histograms(maps, empty, region_numbers(empty)), np.ones((1, 6)))["full_pro"]
    ).any()


def test_the_interval_holds_the_central_share() -> None:
    assert percentile_interval(np.arange(1001.0)) == pytest.approx((25.0, 975.0))
    assert percentile_interval(np.array([0.1, np.nan])) is None


def test_standings_by_hand() -> None:
    steady = np.full(100, 0.9)
    wide = np.linspace(0.7, 1.0, 100)
    assert standings({"a": 0.9, "b": 0.8}, {"a": steady, "b": steady - 0.1}) == {
        "a": Standing("best"),
        "b": Standing(None, pytest.approx(0.1), (pytest.approx(0.1), pytest.approx(0.1))),
    }
    tied = standings({"a": 0.9, "b": 0.85, "c": 0.5}, {"a": steady, "b": wide, "c": steady - 0.4})
    assert [tied[name].status for name in "abc"] == ["tied", "tied", None]
    untested = standings({"a": 0.9, "b": 0.85, "c": None}, {"a": steady, "b": None, "c": None})
    assert untested == {"a": Standing("highest"), "b": Standing(None, pytest.approx(0.05), None)}
    assert standings({"a": 0.9, "b": None}, {}) == {"a": Standing()}
    assert standings({"a": 1.0, "b": 1.0}, {"a": steady, "b": steady})["b"].status == "tied"


def test_pairing_finds_a_difference_that_separate_intervals_hide() -> None:
    # Both methods find the same images hard; one is a little better on each defective image.
    rng = np.random.default_rng(3)
    labels = np.arange(80) < 40
    scores = rng.normal(0, 1, 80) + 1.5 * labels
    weights = stratified_weights(labels, 1000, rng)
    worse = weighted_image_metrics(scores, labels, weights)["instance_auroc"]
    better = weighted_image_metrics(scores + 0.4 * labels, labels, weights)["instance_auroc"]
    low, _ = percentile_interval(better - worse) or (0, 0)
    assert low > 0
    assert percentile_interval(worse)[1] > percentile_interval(better)[0]  # type: ignore[index]


def test_quartiles_never_divide_images_of_equal_size() -> None:
    labels = np.array([False, *[True] * 9])
    sizes = np.array([0, 8, 1, 2, 3, 4, 5, 6, 7, 0])  # the last mask is empty after the crop
    found = size_quartiles(sizes, labels)
    assert [(q.number, q.min_px, q.max_px, q.images.tolist()) for q in found] == [
        (1, 1, 2, [2, 3]),
        (2, 3, 4, [4, 5]),
        (3, 5, 6, [6, 7]),
        (4, 7, 8, [1, 8]),
    ]
    same = size_quartiles(np.array([5, 5, 5, 9]), np.ones(4, bool))
    assert [(q.number, q.min_px, q.max_px, len(q.images)) for q in same] == [(1, 5, 5, 3), (4, 9, 9, 1)]
    assert size_quartiles(np.zeros(3, int), np.ones(3, bool)) == []


def test_the_pareto_front_by_hand() -> None:
    # Slow and worse than the first; as good as the first, but slower; best and slowest; equal to the first.
    assert non_dominated([10, 20, 15, 30, 10], [0.9, 0.8, 0.9, 0.95, 0.9]) == [True, False, False, True, True]
    assert non_dominated([], []) == []


def capture_figure(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Keep the figures that the plots of scores draw."""
    figures: list[Any] = []

    def drawn(canvas: Any) -> Image.Image:
        figures.append(canvas.figure)
        return style.drawn(canvas)

    monkeypatch.setattr(rankings, "drawn", drawn)
    return figures


def test_the_legend_explains_the_threshold_whichever_class_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = capture_figure(monkeypatch)
    labels = np.array([False, False, True])
    scores = [np.array([0.1, 0.2, 0.7])]
    with_threshold, without = ScoredMethod(0, "a", scores, scores), ScoredMethod(0, "a", scores, None)
    classes = [ScoredClass("first", labels, [with_threshold]), ScoredClass("last", labels, [without])]
    for order in (classes, classes[::-1], classes[1:]):
        distribution_picture(order)
    legends = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in figures]
    everything = ["good images", "defective images", "median", "threshold"]
    assert legends == [everything, everything, everything[:3]]


@pytest.mark.parametrize("num_defective", [1, 3])
def test_the_precision_of_few_defective_images_is_seen(num_defective: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of one point has no length: without a marker nothing of it would be drawn."""
    figures = capture_figure(monkeypatch)
    labels = np.array([False, False, *[True] * num_defective])
    scores = [np.array([0.1, 0.9, *[0.5] * num_defective])]
    picture = np.asarray(precision_recall_picture([ScoredClass("one", labels, [ScoredMethod(0, "a", scores, None)])]))
    (line,) = figures[0].axes[0].lines
    assert len(line.get_xdata()) == num_defective and line.get_marker() == style.LINE_MARKERS[0]
    box = figures[0].axes[0].get_window_extent()
    top, bottom = (round(picture.shape[0] - y) for y in (box.y1, box.y0))
    inside = picture[top + 3 : bottom - 3, round(box.x0) + 3 : round(box.x1) - 3].astype(int)
    assert (inside.max(axis=-1) - inside.min(axis=-1) > 60).sum() > 20, "something coloured stands in the panel"

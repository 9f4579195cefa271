"""Threshold rules: what is typed, order statistics, the best F1, and what a calibration becomes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from patchcore.config_json import config_from_dict, config_to_dict
from patchcore.configs import RunConfig, ThresholdRule
from patchcore.errors import ConfigurationError, DataError
from patchcore.scoring.calibration import Calibration, MapStatistics, calibrate
from patchcore.scoring.thresholds import (
    LabelledScores,
    ValidationScores,
    conformal_quantile,
    f1_threshold,
    highest_quantile,
    images_needed,
    with_rule,
)

# ---------------------------------------------------------------- what is typed


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("mean3std", ThresholdRule()),
        ("f1", ThresholdRule("f1")),
        ("quantile:0.95", ThresholdRule("quantile", 0.95)),
        ("quantile:1e-05", ThresholdRule("quantile", 1e-5)),
        ("quantile:0.9999999", ThresholdRule("quantile", 0.9999999)),
    ],
)
def test_a_rule_reads_back_as_it_is_shown(text: str, rule: ThresholdRule) -> None:
    assert ThresholdRule.parse(text) == rule
    assert str(rule) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected mean3std, quantile:Q or f1"),
        ("mean2std", "'mean2std' is unknown"),
        ("quantile", "found no number"),
        ("quantile:", "is no number"),
        ("quantile:high", "'high' is no number"),
        ("quantile:95", "between 0 and 1, found 95"),
        ("quantile:1", "found 1"),
        ("quantile:0", "found 0"),
        ("quantile:nan", "found nan"),
        ("f1:0.5", "takes no number"),
    ],
)
def test_a_mistyped_rule_says_what_is_expected(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        ThresholdRule.parse(text)
    assert words in str(error.value) and "--threshold_rule" in str(error.value) and "\n" not in str(error.value)


def test_what_the_rules_aim_at() -> None:
    assert ThresholdRule().aimed_rate == pytest.approx(0.0013498980316, rel=1e-9)  # 1 - Phi(3), from a table
    assert ThresholdRule("quantile", 0.95).aimed_rate == 0.05  # not 0.050000000000000044
    assert ThresholdRule("f1").aimed_rate is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"calibration": "none", "threshold_rule": ThresholdRule("quantile", 0.5)}, "--calibration none"),
        ({"threshold_rule": ThresholdRule("f1")}, "give --validation_data PATH"),
        ({"validation_path": "data"}, "found mean3std"),
        ({"threshold_rule": ThresholdRule("f1"), "validation_path": ""}, "--validation_data is empty"),
    ],
)
def test_a_rule_and_its_data_belong_together(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        RunConfig("out", **settings)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the conformal quantile


def test_conformal_quantile_by_hand() -> None:
    scores = np.array([5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 7.0, 8.0, 6.0])  # n + 1 = 10
    assert [conformal_quantile(scores, q) for q in (0.1, 0.5, 0.55, 0.7, 0.9)] == [1, 5, 6, 7, 9]


@pytest.mark.parametrize("quantile", [0.05, 0.29, 0.5, 0.57, 0.9, 0.95])
def test_a_new_score_lies_above_as_seldom_as_promised_and_no_seldomer(quantile: float) -> None:
    """Exchangeable: each of n + 1 different scores is the new one equally often."""
    for num_images in (images_needed(quantile), images_needed(quantile) + 1, 39):
        values = np.arange(num_images + 1.0)
        above = sum(new > conformal_quantile(np.delete(values, i), quantile) for i, new in enumerate(values))
        allowed = (1 - quantile) * (num_images + 1)
        assert allowed - 1 < above <= allowed + 1e-9


def test_typed_decimals_are_exact() -> None:
    """In binary, 100 * 0.07 is a little above 7, and 0.28 / 0.72 not what 28 / 72 is."""
    scores = np.arange(1.0, 100.0)  # n + 1 = 100
    assert [conformal_quantile(scores, k / 100) for k in range(1, 100)] == list(range(1, 100))


def test_images_needed_is_the_smallest_number_that_supports_a_quantile() -> None:
    for quantile, needed in {0.5: 1, 0.9: 9, 0.95: 19, 0.99: 99, 0.999: 999, 0.01: 1}.items():
        assert images_needed(quantile) == needed
        conformal_quantile(np.zeros(needed), quantile)
    with pytest.raises(DataError, match=r"needs 99 normal images, found 54: use quantile:0\.9818 or lower"):
        conformal_quantile(np.zeros(54), 0.99)
    for num_images in range(1, 300):
        assert images_needed(highest_quantile(num_images)) <= num_images


# ---------------------------------------------------------------- the highest F1


def test_f1_threshold_by_hand() -> None:
    labelled = LabelledScores(np.array([1.0, 2.0, 5.0, 4.0, 8.0, 9.0]), np.array([0, 0, 0, 1, 1, 1], bool))
    # Above 2: 3 hits, 1 alarm, F1 6/7; above 5: 2 hits, no alarm, F1 4/5. Halfway from 2 to 4.
    assert f1_threshold(labelled, "images") == 3.0


def test_of_equal_f1_the_highest_threshold_counts() -> None:
    labels = np.array([1, 1, 0, 0], bool)
    # Everything flagged: 2 hits, 2 alarms, F1 4/6; 9 alone: 1 hit, no alarm, F1 2/3. Halfway from 3 to 9.
    assert f1_threshold(LabelledScores(np.array([1.0, 9.0, 2.0, 3.0]), labels), "images") == 6.0


def test_where_everything_is_best_flagged_the_lowest_score_is_too() -> None:
    labelled = LabelledScores(np.array([1.0, 5.0, 5.0, 3.0]), np.array([1, 1, 1, 0], bool))
    threshold = f1_threshold(labelled, "images")
    assert threshold < 1 and (labelled.scores > threshold).all()


def best_f1(labelled: LabelledScores) -> tuple[float, float]:
    """Return the highest F1 over all cuts, tried one by one, and the lowest false-alarm count at which it occurs."""
    cuts = [-math.inf, *labelled.scores.tolist()]
    outcomes = []
    for cut in cuts:
        flagged = labelled.scores > cut
        hits, alarms = (flagged & labelled.labels).sum(), (flagged & ~labelled.labels).sum()
        outcomes.append((2 * hits / (flagged.sum() + labelled.labels.sum()), -alarms))
    f1, alarms = max(outcomes)
    return float(f1), -float(alarms)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_f1_threshold_against_every_cut(seed: int, dtype: type) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.random(30) < rng.uniform(0.1, 0.9)
    labels[:2] = (True, False)
    scores = np.round(rng.normal(0, 1, 30) + labels, rng.integers(0, 4)).astype(dtype)  # with ties
    labelled = LabelledScores(scores, labels)
    threshold = f1_threshold(labelled, "images")
    flagged = scores.astype(np.float64) > threshold
    f1 = 2 * (flagged & labels).sum() / (flagged.sum() + labels.sum())
    assert (f1, (flagged & ~labels).sum()) == best_f1(labelled)


def test_neighbouring_scores_are_still_told_apart() -> None:
    for low in (np.float32(3.1), np.float64(3.1)):
        high = np.nextafter(low, type(low)(4))
        threshold = f1_threshold(LabelledScores(np.array([low, high]), np.array([False, True])), "images")
        assert float(low) <= threshold < float(high)


@pytest.mark.parametrize("label", [True, False])
def test_one_kind_alone_has_no_f1(label: bool) -> None:
    found = "0 and 3" if label else "3 and 0"
    with pytest.raises(DataError, match=f"good and defective images, found {found}"):
        f1_threshold(LabelledScores(np.arange(3.0), np.full(3, label)), "images")


# ---------------------------------------------------------------- what a calibration becomes


@pytest.fixture
def normal() -> Calibration:
    maps = MapStatistics(maxima=np.arange(20.0, 29.0), means=np.full(9, 1.5))
    return calibrate("kfold", 9, np.arange(1.0, 10.0), maps)


def test_the_default_rule_is_what_methods_give(normal: Calibration) -> None:
    assert normal.rule == ThresholdRule("mean3std")
    assert with_rule(normal, ThresholdRule()) is normal


def test_a_quantile_moves_both_thresholds_and_nothing_else(normal: Calibration) -> None:
    rule = ThresholdRule("quantile", 0.8)
    moved = with_rule(normal, rule)
    assert moved.pixel is not None and normal.pixel is not None
    assert (moved.image.threshold, moved.pixel.threshold, moved.rule) == (8.0, 27.0, rule)
    image = replace(moved.image, threshold=normal.image.threshold)
    pixel = replace(moved.pixel, threshold=normal.pixel.threshold)
    assert replace(moved, image=image, pixel=pixel, rule=normal.rule) == normal


def test_the_share_of_normal_images_above_is_the_rule_s(normal: Calibration) -> None:
    scores = np.random.default_rng(0).gamma(2.0, 1.0, 399)  # a long tail, on which mean3std flags more than it aims at
    of_gamma = calibrate("kfold", 399, scores, None)
    for quantile in (0.5, 0.9, 0.99):
        threshold = with_rule(of_gamma, ThresholdRule("quantile", quantile)).image.threshold
        assert (scores > threshold).sum() == pytest.approx((1 - quantile) * 400 - 1)


def test_f1_reads_validation_images_and_their_pixels(normal: Calibration) -> None:
    images = LabelledScores(np.array([2.0, 6.0]), np.array([False, True]))
    pixels = LabelledScores(np.array([10.0, 30.0, 11.0]), np.array([False, True, False]))
    moved = with_rule(normal, ThresholdRule("f1"), ValidationScores(images, pixels))
    assert moved.pixel is not None
    assert (moved.image.threshold, moved.pixel.threshold) == (4.0, 20.5)
    assert (moved.image.mean, moved.pixel.mean) == (5.0, 24.0)
    for missing in (None, ValidationScores(images, None)):
        with pytest.raises(ValueError, match="validation"):
            with_rule(normal, ThresholdRule("f1"), missing)


def test_methods_without_maps_have_no_pixel_threshold_with_any_rule() -> None:
    normal = calibrate("kfold", 9, np.arange(1.0, 10.0), None)
    images = LabelledScores(np.array([2.0, 6.0]), np.array([False, True]))
    for rule, validation in (
        (ThresholdRule("quantile", 0.8), None),
        (ThresholdRule("f1"), ValidationScores(images, None)),
    ):
        assert with_rule(normal, rule, validation).pixel is None


def test_a_stored_calibration_carries_its_rule_and_an_older_one_the_default(normal: Calibration) -> None:
    for rule in (ThresholdRule(), ThresholdRule("quantile", 0.8)):
        stored = config_to_dict(with_rule(normal, rule))
        assert config_from_dict(Calibration, stored, "model.json") == with_rule(normal, rule)
    del stored["rule"]
    assert config_from_dict(Calibration, stored, "model.json").rule == ThresholdRule()
    stored["rule"] = {"name": "quantile", "quantile": 1.5}
    with pytest.raises(ConfigurationError, match=r"between 0 and 1, found 1\.5"):
        config_from_dict(Calibration, stored, "model.json")


def test_normalised_scores_cross_one_half_at_the_threshold_of_every_rule(normal: Calibration) -> None:
    scores = np.linspace(-20, 60, 4001)
    thresholds = []
    for quantile in (0.1, 0.5, 0.9):
        scale = with_rule(normal, ThresholdRule("quantile", quantile)).image
        np.testing.assert_array_equal(scale.normalized(scores) > 0.5, scores > scale.threshold)
        assert (np.diff(scale.normalized(scores)) > 0).all()
        thresholds.append(scale.threshold)
    assert all(a < b for a, b in itertools.pairwise(thresholds))

"""Counts of false alarms, their exact interval, and how a run reports them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from patchcore.configs import ThresholdRule
from patchcore.evaluation.false_alarms import FalseAlarms, clopper_pearson, image_false_alarms, pixel_false_alarms
from patchcore.evaluation.report import false_alarm_report
from patchcore.storage.run_folder import FALSE_ALARM_COLUMNS


def tail_at_least(count: int, total: int, share: float) -> float:
    """Return the probability of `count` or more successes of `total`, summed term by term."""
    return sum(math.comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(count, total + 1))


@pytest.mark.parametrize(("count", "total"), [(1, 26), (3, 20), (13, 26), (25, 26), (1, 1), (7, 300)])
def test_interval_ends_where_the_tails_hold_a_fortieth(count: int, total: int) -> None:
    low, high = clopper_pearson(count, total)
    assert tail_at_least(count, total, low) == pytest.approx(0.025, rel=1e-9)
    if count < total:
        assert 1 - tail_at_least(count + 1, total, high) == pytest.approx(0.025, rel=1e-9)


def test_interval_of_none_and_of_all_by_hand() -> None:
    low, high = clopper_pearson(0, 26)
    assert low == 0 and high == pytest.approx(1 - 0.025 ** (1 / 26), rel=1e-12)  # 13.2 %
    assert clopper_pearson(26, 26) == (pytest.approx(0.025 ** (1 / 26), rel=1e-12), 1)


@pytest.mark.parametrize("share", [0.0013, 0.05, 0.5])
def test_interval_holds_the_true_share_often_enough(share: float) -> None:
    covered = 0.0
    for count in range(31):
        low, high = clopper_pearson(count, 30)
        if low <= share <= high:
            covered += math.comb(30, count) * share**count * (1 - share) ** (30 - count)
    assert covered >= 0.95


def test_counts_by_hand() -> None:
    assert image_false_alarms(np.array([1.0, 2.0, 3.0], np.float32), 2.0) == FalseAlarms("image", 3, 1)  # strictly
    quiet, loud = np.zeros((2, 2), np.float32), np.array([[0, 3], [3, 0]], np.float32)
    mask = np.array([[0, 255], [0, 0]], np.uint8)  # a padded corner is no good pixel, but maxima are over whole maps
    any_pixel, pixels = pixel_false_alarms([(quiet, None), (loud, mask)], 2.0)
    assert any_pixel == FalseAlarms("any_pixel", 2, 1)
    assert pixels == FalseAlarms("pixel", 7, 1)


def test_thresholds_between_float32_neighbours_are_not_rounded() -> None:
    low = np.float32(3.1)
    high = np.nextafter(low, np.float32(4))
    between = (float(low) + float(high)) / 2
    assert image_false_alarms(np.array([low, high]), between).num_flagged == 1
    assert pixel_false_alarms([(np.array([[low, high]]), None)], between)[1].num_flagged == 1


def test_rows_have_the_columns_of_the_table_and_pixels_no_interval() -> None:
    image = FalseAlarms("image", 26, 0).row("mean3std", 0.00135)
    assert tuple(image) == FALSE_ALARM_COLUMNS and image["aimed_rate"] == 0.00135
    pixel = FalseAlarms("pixel", 1000, 1).row("mean3std", 0.00135)
    assert pixel["rate"] == 0.001
    assert pixel["aimed_rate"] is pixel["interval_low"] is pixel["interval_high"] is None
    nothing = FalseAlarms("image", 0, 0).row("f1", None)
    assert nothing["rate"] is nothing["interval_low"] is None


def test_report() -> None:
    levels = [FalseAlarms("image", 26, 1), FalseAlarms("any_pixel", 26, 0), FalseAlarms("pixel", 10**6, 3)]
    alarms = {
        "mpdd_plate": [level.row("mean3std", ThresholdRule().aimed_rate) for level in levels],
        "mpdd_rod": [FalseAlarms("image", 0, 0).row("quantile:0.9", 0.1)],
        "mpdd_tube": [FalseAlarms("image", 4, 4).row("f1", None)],
    }
    text = false_alarm_report("Row Names", alarms)
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert "95 % Clopper-Pearson" in text
    assert "0.13 %" in lines["mpdd_plate"] and "1/26 = 3.8 % [0.1, 19.6] %" in lines["mpdd_plate"]
    assert "0/26 = 0 % [0.0, 13.2] %" in lines["mpdd_plate"] and lines["mpdd_plate"].endswith("0.0003 %")
    assert "no good image" in lines["mpdd_rod"] and "10 %" in lines["mpdd_rod"]
    assert "4/4 = 100 % [39.8, 100.0] %" in lines["mpdd_tube"]
    assert lines["mean3std"].endswith("aims at 0.13 % if scores of good images are Gaussian")
    del alarms["mpdd_plate"]
    assert "Gaussian" not in false_alarm_report("Row Names", alarms)

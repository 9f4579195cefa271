"""Steps between a map and its score, against other implementations and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, uniform_filter

from patchcore.configs import PostProcessingConfig
from patchcore.errors import ConfigurationError
from patchcore.scoring.post_processing import gray, guided_filter, post_processed, robust_z_scores

GENERATOR = torch.Generator().manual_seed(0)
MAPS = torch.rand(2, 40, 56, generator=GENERATOR)
IMAGES = torch.randint(0, 256, (2, 3, 40, 56), dtype=torch.uint8, generator=GENERATOR)


def test_nothing_happens_by_default() -> None:
    assert post_processed(MAPS, IMAGES, PostProcessingConfig()) is MAPS


def test_gaussian_against_scipy() -> None:
    found = post_processed(MAPS, IMAGES, PostProcessingConfig("gaussian", 3.0))
    expected = np.stack([gaussian_filter(one.astype(np.float64), 3.0) for one in MAPS.numpy()])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def plain_guided_filter(values: np.ndarray, guide: np.ndarray, radius: int, epsilon: float) -> np.ndarray:
    """The filter window by window, in float64: a straight line through each, and the mean of all that hold a pixel."""
    height, width = values.shape
    total, count = np.zeros_like(values), np.zeros_like(values)
    for y in range(height):
        for x in range(width):
            window = np.s_[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
            i, p = guide[window].ravel(), values[window].ravel()
            slope = np.mean((i - i.mean()) * (p - p.mean())) / (i.var() + epsilon)
            total[window] += slope * guide[window] + p.mean() - slope * i.mean()
            count[window] += 1
    return total / count


@pytest.mark.parametrize("level", [0.0, 1000.0])
def test_guided_filter_against_a_plain_formulation(level: float) -> None:
    """Up to the border, where windows are cut off; `level` shows rounding where maps lie far from zero."""
    guide = gray(IMAGES)
    found = guided_filter(MAPS + level, guide, 3)
    for one, values, of_image in zip(found, MAPS.numpy(), guide.numpy(), strict=True):
        expected = plain_guided_filter(values.astype(np.float64), of_image.astype(np.float64), 3, 0.01)
        np.testing.assert_allclose(one.numpy() - level, expected, rtol=0, atol=2e-4 if level else 1e-5)


def test_guided_filter_with_a_flat_guide_is_two_box_filters() -> None:
    def box(values: np.ndarray) -> np.ndarray:
        """Mean over the part of each window that lies in the image."""
        return uniform_filter(values, 5, mode="constant") / uniform_filter(np.ones_like(values), 5, mode="constant")

    found = guided_filter(MAPS, torch.full_like(MAPS, 0.3), 2)
    np.testing.assert_allclose(found[0].numpy(), box(box(MAPS[0].double().numpy())), rtol=0, atol=1e-6)


def test_guided_filter_of_a_window_larger_than_the_image_is_a_line_through_all_of_it() -> None:
    guide = gray(IMAGES)
    found = guided_filter(MAPS, guide, 60)
    for one, values, of_image in zip(found, MAPS.double().numpy(), guide.double().numpy(), strict=True):
        slope = np.cov(of_image.ravel(), values.ravel(), bias=True)[0, 1] / (of_image.var() + 0.01)
        np.testing.assert_allclose(one.numpy(), values.mean() + slope * (of_image - of_image.mean()), rtol=0, atol=1e-5)


def test_guided_filter_keeps_a_step_that_the_image_has_and_blurs_one_that_it_has_not() -> None:
    step = torch.zeros(1, 32, 32)
    step[..., 16:] = 1
    kept = guided_filter(step, step, 4)[0, 16]
    blurred = guided_filter(step, torch.zeros_like(step), 4)[0, 16]
    assert float(kept[16] - kept[15]) > 0.9
    assert float(blurred[16] - blurred[15]) < 0.2


def test_constant_maps_stay_constant() -> None:
    flat = torch.full((1, 24, 24), 3.5)
    for config in (PostProcessingConfig("gaussian", 2.0), PostProcessingConfig("guided", 2.0)):
        torch.testing.assert_close(post_processed(flat, IMAGES[:1, :, :24, :24], config), flat)
    zero = post_processed(flat, IMAGES[:1, :, :24, :24], PostProcessingConfig(adaptive_normalization=True))
    assert torch.equal(zero, torch.zeros_like(flat))


def test_gray_by_hand() -> None:
    pixel = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    assert float(gray(pixel)) == pytest.approx(0.299 + 0.114 * 0.2, abs=1e-6)


def test_robust_z_scores_by_hand() -> None:
    """Median 3, absolute deviations 2 1 0 1 97 with median 1."""
    found = robust_z_scores(torch.tensor([[[1.0, 2.0, 3.0, 4.0, 100.0]]]))
    expected = np.array([-2, -1, 0, 1, 97]) / 1.4826
    np.testing.assert_allclose(found[0, 0].numpy(), expected, rtol=1e-6)


def test_robust_z_scores_of_an_image_do_not_depend_on_level_and_scale_or_on_other_images() -> None:
    one = robust_z_scores(MAPS[:1])
    torch.testing.assert_close(robust_z_scores(7 * MAPS[:1] + 2), one, rtol=1e-4, atol=1e-4)
    assert torch.equal(robust_z_scores(MAPS)[:1], one)


def test_normal_noise_has_about_unit_spread() -> None:
    noise = torch.randn(1, 200, 200, generator=torch.Generator().manual_seed(1))
    assert float(robust_z_scores(5 * noise + 3).std()) == pytest.approx(1, abs=0.02)


def test_smoothing_comes_before_normalisation() -> None:
    both = post_processed(MAPS, IMAGES, PostProcessingConfig("gaussian", 2.0, True))
    smooth = post_processed(MAPS, IMAGES, PostProcessingConfig("gaussian", 2.0))
    torch.testing.assert_close(both, robust_z_scores(smooth))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"smoothing": "gausian"}, "did you mean gaussian"),
        ({"smoothing_px": 0.0}, "--smoothing_px is 0.0, expected a number above 0"),
        ({"scales": (1.0, 1.0)}, "name each scale once"),
        ({"scales": (5.0,)}, "--multi_scale is 5.0, expected a factor from 0.25 to 4"),
    ],
)
def test_impossible_settings(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PostProcessingConfig(**values)  # type: ignore[arg-type]

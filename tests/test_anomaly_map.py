"""Tests of upsampling, smoothing and image scores against torch's resize and scipy's Gaussian."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F

from patchcore.scoring.anomaly_map import anomaly_maps, image_scores


def random_scores(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def plain_maps(patch_scores: torch.Tensor, imagesize: int, sigma_px: float = 4.0) -> np.ndarray:
    """Resize, then smooth image by image, in float64."""
    size = (imagesize, imagesize)
    resized = F.interpolate(patch_scores.double()[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    return np.stack([scipy.ndimage.gaussian_filter(image, sigma=sigma_px) for image in resized.numpy()])


@pytest.mark.parametrize(
    ("grid", "imagesize"),
    [
        ((28, 28), 224),
        ((40, 40), 320),
        ((5, 5), 32),
        ((3, 3), 12),  # the kernel reaches 16 px: further than the map
        ((1, 1), 9),
        ((4, 4), 5),  # reaches around the mirrored map more than once
        ((7, 12), 50),
        ((33, 33), 33),
        ((40, 40), 32),  # fewer pixels than patches
    ],
)
def test_equals_resize_and_gaussian_filter(grid: tuple[int, int], imagesize: int) -> None:
    patch_scores = random_scores(3, *grid)
    maps = anomaly_maps(patch_scores, imagesize)
    assert maps.shape == (3, imagesize, imagesize)
    assert maps.dtype == torch.float32
    np.testing.assert_allclose(maps.numpy(), plain_maps(patch_scores, imagesize), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sigma_px", [0.5, 1.0, 2.6, 7.0])
def test_other_sigma(sigma_px: float) -> None:
    patch_scores = random_scores(2, 6, 6)
    expected = plain_maps(patch_scores, 48, sigma_px)
    np.testing.assert_allclose(anomaly_maps(patch_scores, 48, sigma_px).numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("grid", "imagesize"), [(28, 224), (5, 32), (2, 7)])
def test_constant_scores_give_a_constant_map(grid: int, imagesize: int) -> None:
    maps = anomaly_maps(torch.full((2, grid, grid), 37.5), imagesize)
    torch.testing.assert_close(maps, torch.full((2, imagesize, imagesize), 37.5), rtol=1e-6, atol=0)


def test_maps_are_linear_and_stay_between_the_extremes() -> None:
    first, second = random_scores(2, 14, 14, seed=1), random_scores(2, 14, 14, seed=2)
    combined = anomaly_maps(3 * first - second, 112)
    torch.testing.assert_close(combined, 3 * anomaly_maps(first, 112) - anomaly_maps(second, 112), rtol=0, atol=1e-5)
    maps = anomaly_maps(first, 112)
    assert float(first.min()) < float(maps.min()) < float(maps.max()) < float(first.max())


def test_flipped_scores_give_flipped_maps() -> None:
    patch_scores = random_scores(1, 5, 9)
    flipped = anomaly_maps(patch_scores.flip(1, 2), 40)
    torch.testing.assert_close(flipped, anomaly_maps(patch_scores, 40).flip(1, 2), rtol=0, atol=1e-6)


def test_a_map_does_not_depend_on_the_other_images() -> None:
    patch_scores = random_scores(4, 8, 8)
    together = anomaly_maps(patch_scores, 64)
    alone = torch.cat([anomaly_maps(one[None], 64) for one in patch_scores])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_the_peak_of_the_map_lies_on_the_most_anomalous_patch() -> None:
    patch_scores = torch.zeros(1, 28, 28)
    patch_scores[0, 20, 5] = 1.0
    peak = int(anomaly_maps(patch_scores, 224)[0].argmax())
    assert (peak // 224 // 8, peak % 224 // 8) == (20, 5)


def test_double_scores_are_accepted() -> None:
    patch_scores = random_scores(1, 6, 6).double()
    assert torch.equal(anomaly_maps(patch_scores, 48), anomaly_maps(patch_scores.float(), 48))


def test_image_score_by_hand() -> None:
    patch_scores = torch.tensor([[[0.0, 2.0], [1.0, -1.0]], [[-3.0, -2.0], [-5.0, -4.0]]])
    assert image_scores(patch_scores).tolist() == [2.0, -2.0]
    assert image_scores(patch_scores, "mean").tolist() == [0.5, -3.5]
    assert image_scores(patch_scores, "topk").tolist() == [2.0, -2.0]  # a percent of four patches: one


def test_topk_is_the_mean_of_the_highest_percent() -> None:
    patch_scores = torch.arange(400.0).view(1, 20, 20)
    assert image_scores(patch_scores, "topk").tolist() == [(396 + 397 + 398 + 399) / 4]
    for side, count in ((28, 8), (70, 49), (71, 51)):  # rounded up, and a product of floats is not trusted
        ones = torch.zeros(side * side)
        ones[:count] = 1
        assert image_scores(ones.view(1, side, side), "topk").tolist() == [1.0]
        ones[count] = 1
        assert image_scores(ones.view(1, side, side) - 1, "topk").tolist() == [0.0]

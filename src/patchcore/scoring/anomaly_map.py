"""Patch scores to a smooth anomaly map and to an image score."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

SMOOTHING_SIGMA_PX = 4.0  # as published, section 3.3
TOP_PATCHES_PER = 100  # one in so many patches: 8 of 784, about the area of a small defect


def image_scores(
    patch_scores: torch.Tensor, patchscore: str = "max", inside: torch.Tensor | None = None
) -> torch.Tensor:
    """Score images by their patches.

    Args:
        patch_scores: float [B, h, w], higher is more anomalous.
        patchscore: "max" (the most anomalous patch, as published), "mean" (of all patches) or "topk" (mean of the
            highest percent, rounded up).
        inside: bool [B, h, w], the patches that there are, at least one in each image; None stands for all.

    Returns:
        float [B].

    Source: "max" is Roth et al. (CVPR 2022), Eq. 6. The others are ours: a mean over several patches is steadier
        against single noisy ones, and misses small defects sooner.
    """
    if inside is not None:  # image by image, as each has its own number of patches
        parts = zip(patch_scores, inside, strict=True)
        return torch.cat([image_scores(scores[there][None, None], patchscore) for scores, there in parts])
    flat = patch_scores.flatten(1)
    if patchscore == "mean":
        return flat.mean(dim=1)
    if patchscore == "topk":
        return flat.topk(-(-flat.shape[1] // TOP_PATCHES_PER), dim=1).values.mean(dim=1)
    return flat.amax(dim=1)


def patches_inside(inside: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Tell which patches lie in a region of the image.

    Args:
        inside: bool [B, H, W], pixels of the region, at least one in each image.
        grid: Patches along height and width, (h, w).

    Returns:
        bool [B, h, w]: patches of whose area at least half lies inside; where the region is too thin for any, those
        with the largest share.
    """
    shares = F.adaptive_avg_pool2d(inside.float()[:, None], (grid[0], grid[1]))[:, 0]  # [B, h, w]
    return shares >= shares.amax(dim=(1, 2), keepdim=True).clamp(max=0.5)


def anomaly_maps(patch_scores: torch.Tensor, imagesize: int, sigma_px: float = SMOOTHING_SIGMA_PX) -> torch.Tensor:
    """Upsample patch scores bilinearly and smooth them with a Gaussian.

    Both steps are linear and separable, so that together they are one small matrix per image axis.

    Args:
        patch_scores: float [B, h, w].
        imagesize: Side S of the map, px.
        sigma_px: Standard deviation of the Gaussian, px of the map.

    Returns:
        float32 [B, S, S].

    Source: Roth et al. (CVPR 2022), section 3.3.
    """
    _, height, width = patch_scores.shape
    rows = axis_matrix(height, imagesize, sigma_px).to(patch_scores.device)
    columns = axis_matrix(width, imagesize, sigma_px).to(patch_scores.device)
    return rows @ patch_scores.float() @ columns.T  # [B, S, S]


def smoothed(maps: torch.Tensor, sigma_px: float) -> torch.Tensor:
    """Smooth maps float [B, H, W] with a Gaussian of standard deviation `sigma_px`; the border pixels go on outside."""
    _, height, width = maps.shape
    rows, columns = (axis_matrix(length, length, sigma_px).to(maps.device) for length in (height, width))
    return rows @ maps.float() @ columns.T


def upsampling_matrix(length: int, size: int) -> torch.Tensor:
    """Return the float64 [size, length] matrix that resizes bilinearly along one axis."""
    identity = torch.eye(length, dtype=torch.float64)[:, None]  # [n, 1, n]
    return F.interpolate(identity, size=size, mode="linear", align_corners=False)[:, 0].T


@functools.lru_cache(maxsize=64)
def axis_matrix(num_patches: int, imagesize: int, sigma_px: float) -> torch.Tensor:
    """Return the [S, num_patches] matrix that upsamples and smooths along one axis."""
    upsampled = upsampling_matrix(num_patches, imagesize).T[:, None]  # [n, 1, S]
    radius = int(4 * sigma_px + 0.5)  # where scipy's gaussian_filter, used by the original, cuts the kernel
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma_px) ** 2)
    # Mirror at the border with the border pixel repeated, scipy's "reflect"; by index, for any map size.
    positions = torch.arange(-radius, imagesize + radius) % (2 * imagesize)
    mirrored = torch.where(positions < imagesize, positions, 2 * imagesize - 1 - positions)
    smoothed = F.conv1d(upsampled[..., mirrored], (kernel / kernel.sum()).view(1, 1, -1))  # [n, 1, S]
    return smoothed[:, 0].T.float().contiguous()

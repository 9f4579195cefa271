"""What may happen to an anomaly map before its image is scored; every step sees one image at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from patchcore.configs import PostProcessingConfig
from patchcore.scoring.anomaly_map import smoothed

GUIDE_EPSILON = 0.01  # variance of gray values in [0, 1] below which a window counts as flat
NORMAL_MAD = 1.4826  # standard deviation of a normal variable over its median absolute deviation
MIN_SPREAD = 1e-6  # a flat map stays flat, instead of having its rounding errors blown up


def post_processed(maps: torch.Tensor, images: torch.Tensor, config: PostProcessingConfig) -> torch.Tensor:
    """Apply what the configuration asks for: smoothing first, then normalisation.

    Args:
        maps: float32 [B, H, W].
        images: uint8 [B, 3, H, W], the guide of the guided filter.
        config: Which steps.

    Returns:
        float32 [B, H, W].
    """
    if config.smoothing == "gaussian":
        maps = smoothed(maps, config.smoothing_px)
    elif config.smoothing == "guided":
        maps = guided_filter(maps, gray(images.to(maps.device)), guide_radius_px(config))
    return robust_z_scores(maps) if config.adaptive_normalization else maps


def guide_radius_px(config: PostProcessingConfig) -> int:
    """Return the radius of the guided filter's windows."""
    return max(1, round(config.smoothing_px))


def gray(images: torch.Tensor) -> torch.Tensor:
    """Return the luma of uint8 RGB images [B, 3, H, W] as float32 [B, H, W] in [0, 1].

    Source: weights of ITU-R BT.601.
    """
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device) / 255
    return torch.einsum("bchw,c->bhw", images.float(), weights)


def guided_filter(
    maps: torch.Tensor, guides: torch.Tensor, radius_px: int, epsilon: float = GUIDE_EPSILON
) -> torch.Tensor:
    """Smooth maps where their guide is smooth, and keep their steps where the guide has an edge.

    In every window the map is replaced by the linear function of the guide that fits it best; a pixel gets the mean
    over the windows that hold it.

    Args:
        maps: float [B, H, W].
        guides: float [B, H, W] in [0, 1].
        radius_px: Windows have 2 * radius + 1 px a side.
        epsilon: Guides whose variance in a window is small against this count as flat there.

    Returns:
        float [B, H, W].

    Source: He, Sun & Tang, "Guided Image Filtering" (TPAMI 2013), Eq. 5, 6 and 8.
    """
    level = maps.mean(dim=(1, 2), keepdim=True)  # taken off, because differences of products cancel
    guide, given = guides - 0.5, maps - level
    mean_guide, mean_given = _box_mean(guide, radius_px), _box_mean(given, radius_px)
    variance = _box_mean(guide * guide, radius_px) - mean_guide.square()
    covariance = _box_mean(guide * given, radius_px) - mean_guide * mean_given
    slope = covariance / (variance + epsilon)
    offset = mean_given - slope * mean_guide
    return _box_mean(slope, radius_px) * guide + _box_mean(offset, radius_px) + level


def _box_mean(values: torch.Tensor, radius: int) -> torch.Tensor:
    """Return the mean [B, H, W] over the square window around each pixel, as far as it lies in the image."""
    size = 2 * radius + 1
    # By rows and columns: the cost grows with the radius, not with its square.
    rows = F.avg_pool2d(values[:, None], (size, 1), 1, (radius, 0), count_include_pad=False)
    return F.avg_pool2d(rows, (1, size), 1, (0, radius), count_include_pad=False)[:, 0]


def row_medians(values: torch.Tensor) -> torch.Tensor:
    """Return the medians [B, 1] of values [B, N], the lower of two."""
    return values.median(dim=1, keepdim=True).values


def robust_z_scores(maps: torch.Tensor, medians: Callable[[torch.Tensor], torch.Tensor] = row_medians) -> torch.Tensor:
    """Measure each map from its own median, in units of its own spread.

    What raises a whole image, such as another exposure, cancels. So does a defect that covers half of it.

    Args:
        maps: float [B, H, W].
        medians: What computes medians, as `row_medians` does.

    Returns:
        float [B, H, W]: about standard normal where the map of a normal image would be.

    Source: the robust z-score of Iglewicz & Hoaglin, "How to Detect and Handle Outliers" (1993).
    """
    flat = maps.flatten(1)
    centred = flat - medians(flat)
    spread = NORMAL_MAD * medians(centred.abs())
    floor = MIN_SPREAD * flat.abs().amax(dim=1, keepdim=True)
    return (centred / torch.maximum(spread, floor).clamp(min=torch.finfo(maps.dtype).tiny)).view_as(maps)

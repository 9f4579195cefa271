"""Overlapping tiles of an image: where they lie, how they are cut, and how their maps become one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from patchcore.configs import TileConfig
from patchcore.errors import DataError

TILES_AT_ONCE = 64  # fills a GPU
TILES_AT_ONCE_LOW_MEMORY = 8  # a tenth of the memory; on a CPU also faster

MapsOf = Callable[[torch.Tensor], torch.Tensor]
"""Tiles [T, 3, S, S] at the backbone's input size to their maps [T, p, p] at the size of a tile."""


class Corner(NamedTuple):
    """Upper left pixel of a tile."""

    top: int
    left: int


def tile_starts(length: int, size: int, stride: int) -> list[int]:
    """Return where tiles of `size` px begin along an axis of `length` px: every `stride` px, the last at the border."""
    return [*range(0, length - size, stride), length - size]


def tile_corners(height: int, width: int, config: TileConfig) -> list[Corner]:
    """Return the tiles that cover an image, row by row.

    Raises:
        DataError: The image is smaller than a tile.
    """
    size, stride = config.patch_size, config.patch_stride
    if size > min(height, width):
        raise DataError(
            f"an image of {width} x {height} px is smaller than a tile of {size} px: use --patch_size "
            f"{min(height, width)} or less"
        )
    rows, columns = tile_starts(height, size, stride), tile_starts(width, size, stride)
    return [Corner(*place) for place in itertools.product(rows, columns)]


def drawn_corners(height: int, width: int, config: TileConfig, seed: int) -> list[Corner]:
    """Draw the tiles of a training image, all of them where there are no more; row by row."""
    corners = tile_corners(height, width, config)
    if len(corners) <= config.training_tiles:
        return corners
    return sorted(random.Random(seed).sample(corners, config.training_tiles))


def cut_tiles(image: torch.Tensor, corners: list[Corner], config: TileConfig, input_size: int) -> torch.Tensor:
    """Cut tiles out of an image and resize each to the backbone's input.

    Args:
        image: uint8 [3, H, W].
        corners: Where the T tiles lie.
        config: Size of the tiles.
        input_size: Side S of what the backbone gets, px.

    Returns:
        float32 [T, 3, S, S] in [0, 255].
    """
    size = config.patch_size
    tiles = torch.stack([image[:, top : top + size, left : left + size] for top, left in corners])  # [T, 3, p, p]
    return resized(tiles, input_size)


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize images [B, 3, H, W] bilinearly to float32 [B, 3, S, S], against aliasing where that shrinks them."""
    if images.shape[-2:] == (size, size):
        return images.float()
    return F.interpolate(images.float(), size=(size, size), mode="bilinear", align_corners=False, antialias=True)


def tiled_map(image: torch.Tensor, config: TileConfig, input_size: int, maps_of: MapsOf) -> torch.Tensor:
    """Score an image tile by tile.

    Where tiles overlap, their maps are averaged with the weights of `smooth_window`: what a tile says near its
    border, where it cannot see on, counts least, and no weight jumps, so that there are no seams.

    Args:
        image: uint8 [3, H, W].
        config: Where tiles lie and how many are scored at once.
        input_size: Side of what the backbone gets, px.
        maps_of: Scores tiles.

    Returns:
        float32 [H, W].

    Raises:
        DataError: The image is smaller than a tile.
    """
    _, height, width = image.shape
    corners = tile_corners(height, width, config)
    at_once = TILES_AT_ONCE_LOW_MEMORY if config.low_memory else TILES_AT_ONCE
    size = config.patch_size
    window = smooth_window(size)  # [p, p]
    total, weight = torch.zeros(2, height, width, dtype=torch.float64)
    for start in range(0, len(corners), at_once):
        chunk = corners[start : start + at_once]
        maps = maps_of(cut_tiles(image, chunk, config, input_size)).cpu().double()  # [T, p, p]
        for (top, left), tile_map in zip(chunk, maps, strict=True):
            total[top : top + size, left : left + size] += window * tile_map
            weight[top : top + size, left : left + size] += window
    return (total / weight).float()


def smooth_window(size: int) -> torch.Tensor:
    """Return weights float64 [size, size] > 0: the product of two Hann windows, which fall smoothly towards the border.

    The samples lie in the centres of the pixels, so that no weight is zero and a pixel that a single tile covers has
    that tile's value.
    """
    line = torch.hann_window(2 * size + 1, periodic=False, dtype=torch.float64)[1::2]  # [size]
    return line[:, None] * line

"""Tiles of an image: where they lie, and that their maps join without seams."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from patchcore.configs import TileConfig
from patchcore.errors import ConfigurationError, DataError
from patchcore.methods.tiles import (
    Corner,
    cut_tiles,
    drawn_corners,
    resized,
    smooth_window,
    tile_corners,
    tile_starts,
    tiled_map,
)


@pytest.mark.parametrize(
    ("length", "size", "stride", "starts"),
    [
        (10, 4, 2, [0, 2, 4, 6]),
        (11, 4, 2, [0, 2, 4, 6, 7]),  # the last one ends at the border
        (4, 4, 2, [0]),
        (5, 4, 4, [0, 1]),
        (8, 4, 4, [0, 4]),
        (224, 160, 80, [0, 64]),
    ],
)
def test_starts_of_tiles(length: int, size: int, stride: int, starts: list[int]) -> None:
    assert tile_starts(length, size, stride) == starts


@pytest.mark.parametrize("size", [(7, 7), (7, 12), (23, 9), (40, 40)])
@pytest.mark.parametrize(("patch", "stride"), [(7, 7), (7, 3), (5, 1), (6, 5)])
def test_tiles_cover_every_pixel_and_leave_the_image_nowhere(size: tuple[int, int], patch: int, stride: int) -> None:
    covered = np.zeros(size, dtype=bool)
    corners = [Corner(t, le) for t in tile_starts(size[0], patch, stride) for le in tile_starts(size[1], patch, stride)]
    for top, left in corners:
        assert covered[top : top + patch, left : left + patch].shape == (patch, patch)
        covered[top : top + patch, left : left + patch] = True
    assert covered.all()
    assert len(set(corners)) == len(corners)


def test_corners_go_row_by_row() -> None:
    assert tile_corners(32, 48, TileConfig(16, 16)) == [(0, 0), (0, 16), (0, 32), (16, 0), (16, 16), (16, 32)]


def test_an_image_smaller_than_a_tile_is_named() -> None:
    with pytest.raises(DataError, match="an image of 100 x 40 px is smaller than a tile of 64 px: use --patch_size 40"):
        tile_corners(40, 100, TileConfig(64, 32))


def test_gaps_between_tiles_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="--patch_stride 33 is larger than --patch_size 32, which leaves"):
        TileConfig(32, 33)


def test_draw_of_training_tiles() -> None:
    config = TileConfig(16, 8, training_tiles=5)
    every = tile_corners(64, 64, config)
    drawn = drawn_corners(64, 64, config, seed=1)
    assert len(drawn) == 5 and set(drawn) <= set(every) and drawn == sorted(drawn)
    assert drawn == drawn_corners(64, 64, config, seed=1) != drawn_corners(64, 64, config, seed=2)
    assert drawn_corners(16, 24, config, seed=1) == [(0, 0), (0, 8)], "an image with fewer tiles gives them all"


def test_tiles_are_the_pixels_of_their_place() -> None:
    image = torch.arange(3 * 20 * 30, dtype=torch.int64).view(3, 20, 30).remainder(251).to(torch.uint8)
    tiles = cut_tiles(image, [Corner(4, 14), Corner(0, 0)], TileConfig(16, 8), 16)
    assert tiles.dtype == torch.float32
    assert torch.equal(tiles[0], image[:, 4:20, 14:30].float())
    assert torch.equal(tiles[1], image[:, :16, :16].float())


def test_resizing_keeps_constants_and_smooths_before_it_shrinks() -> None:
    flat = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)
    torch.testing.assert_close(resized(flat, 48), torch.full((1, 3, 48, 48), 77.0))
    stripes = torch.zeros(1, 3, 32, 32)
    stripes[..., ::2] = 100
    shrunk = resized(stripes, 8)[0, 0, :, 1:-1]
    assert float((shrunk - 50).abs().max()) < 1, "every other pixel would be all black or all white"


def test_window_is_positive_symmetric_and_falls_to_the_border() -> None:
    window = smooth_window(9)
    assert float(window.min()) > 0
    torch.testing.assert_close(window, window.T)
    torch.testing.assert_close(window, window.flip(0))
    assert torch.equal(window.argmax(), torch.tensor(40))
    tent = smooth_window(8).diagonal().sqrt()  # one axis
    torch.testing.assert_close(tent[:4] + tent[4:], torch.ones(4, dtype=torch.float64))


def position_map(tiles: torch.Tensor) -> torch.Tensor:
    """A tile's map that shows the tile's own red channel."""
    return tiles[:, 0]


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("stride", [16, 8, 5])
def test_maps_join_to_the_map_of_the_whole(low_memory: bool, stride: int) -> None:
    """Where a tile's map is a function of the pixel alone, tiling changes nothing."""
    image = torch.randint(0, 255, (3, 45, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    joined = tiled_map(image, TileConfig(16, stride, low_memory=low_memory), 16, position_map)
    torch.testing.assert_close(joined, image[0].float())


def test_overlap_by_hand() -> None:
    """Two tiles that say 0 and 1: their weights decide in the overlap, and a pixel of one tile alone has its value."""
    said = iter([0.0, 1.0])

    def maps_of(tiles: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.full((16, 16), next(said)) for _ in tiles])

    joined = tiled_map(torch.zeros(3, 16, 24, dtype=torch.uint8), TileConfig(16, 8), 16, maps_of)
    assert float(joined[:, :8].abs().max()) == 0 and float((joined[:, 16:] - 1).abs().max()) == 0
    line = np.sin(np.pi * (np.arange(16) + 0.5) / 16) ** 2
    expected = line[:8] / (line[8:] + line[:8])
    np.testing.assert_allclose(joined[5, 8:16].numpy(), expected, rtol=1e-6)
    assert np.all(np.diff(joined[0].numpy()) >= 0)


def test_low_memory_bounds_the_batch() -> None:
    sizes: list[int] = []

    def maps_of(tiles: torch.Tensor) -> torch.Tensor:
        sizes.append(len(tiles))
        return tiles[:, 0]

    image = torch.zeros(3, 80, 16 * 14, dtype=torch.uint8)
    tiled_map(image, TileConfig(16, 16), 16, maps_of)
    assert sizes == [64, 6]
    sizes.clear()
    tiled_map(image, TileConfig(16, 16, low_memory=True), 16, maps_of)
    assert sizes == [8] * 8 + [6]

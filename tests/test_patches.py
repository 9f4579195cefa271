"""Tests of the patch embeddings against the published steps, done one after the other in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from patchcore.features.patches import ConcatEmbedding, PooledEmbedding

GRIDS = ((9, 7), (5, 4), (2, 3))  # of the first, second and third layer: not square, no multiples of one another
BATCH = 2


pytestmark = pytest.mark.usefixtures("one_thread")


def random_maps(channels: Sequence[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, c, *grid, generator=generator) for c, grid in zip(channels, GRIDS, strict=False)]


def plain_pooled(
    feature_maps: Sequence[torch.Tensor], patchsize: int, pretrain_dimension: int, target_dimension: int
) -> torch.Tensor:
    """The published embedding step by step: unfold, resize every tap, pool per layer, stack, pool."""
    batch, _, height, width = feature_maps[0].shape
    pooled_layers = []
    for feature_map in feature_maps:
        _, channels, h, w = feature_map.shape
        taps = F.unfold(feature_map.double(), patchsize, padding=patchsize // 2).view(batch, -1, h, w)
        taps = F.interpolate(taps, size=(height, width), mode="bilinear", align_corners=False)
        flat = taps.permute(0, 2, 3, 1).reshape(batch * height * width, 1, channels * patchsize**2)
        pooled_layers.append(F.adaptive_avg_pool1d(flat, pretrain_dimension)[:, 0])
    stacked = torch.stack(pooled_layers, dim=1).flatten(1)
    pooled = F.adaptive_avg_pool1d(stacked[:, None], target_dimension)[:, 0]
    return pooled.view(batch, height, width, target_dimension)


def assert_as_published(channels: Sequence[int], patchsize: int, pretrain: int, target: int) -> None:
    maps = random_maps(channels)
    embedded = PooledEmbedding(channels, [patchsize], pretrain, target)(maps)
    assert embedded.shape == (BATCH, *GRIDS[0], target)
    expected = plain_pooled(maps, patchsize, pretrain, target)
    torch.testing.assert_close(embedded.double(), expected, rtol=0, atol=1e-5)


def test_several_patch_sizes_are_so_many_layers() -> None:
    """Per layer and size the first pooling as published, then one pooling over all of them, layer by layer."""
    channels, sizes, pretrain, target = (40, 112), (3, 1, 5), 64, 50
    maps = random_maps(channels)
    embedded = PooledEmbedding(channels, sizes, pretrain, target)(maps)
    parts = []
    for i, feature_map in enumerate(maps):
        for size in sizes:
            stacked = [maps[0], feature_map]  # the first layer gives the grid
            both = plain_pooled(stacked, size, pretrain, 2 * pretrain)
            parts.append(both[..., pretrain:] if i else plain_pooled(maps[:1], size, pretrain, pretrain))
    flat = torch.cat(parts, dim=-1).flatten(0, 2)  # [B * H * W, layers * sizes * pretrain]
    expected = F.adaptive_avg_pool1d(flat[:, None], target)[:, 0].view(embedded.shape)
    torch.testing.assert_close(embedded.double(), expected, rtol=0, atol=1e-5)


def test_several_patch_sizes_of_concat_stand_side_by_side() -> None:
    maps = random_maps((4, 6))
    together = ConcatEmbedding((4, 6), (1, 3))(maps)
    small, large = (ConcatEmbedding((4, 6), (p,))(maps) for p in (1, 3))
    expected = torch.cat([small[..., :4], large[..., :4], small[..., 4:], large[..., 4:]], dim=-1)
    assert torch.equal(together, expected)


@pytest.mark.parametrize("patchsize", [1, 3, 5])
@pytest.mark.parametrize("channels", [40, 112, 512, 1024])
def test_pooled_equals_published_steps_for_one_layer(channels: int, patchsize: int) -> None:
    assert_as_published([channels], patchsize, 1024, 1024)


@pytest.mark.parametrize("patchsize", [1, 3, 5])
@pytest.mark.parametrize("channels", [(40, 112), (112, 40), (512, 1024), (40, 112, 512), (1024, 512, 112)])
def test_pooled_equals_published_steps_for_several_layers(channels: tuple[int, ...], patchsize: int) -> None:
    assert_as_published(channels, patchsize, 1024, 1024)


@pytest.mark.parametrize(
    ("pretrain", "target"), [(384, 100), (100, 384), (1024, 7), (1500, 1500), (1500, 311), (37, 1500), (1, 1), (1, 5)]
)
@pytest.mark.parametrize("patchsize", [1, 3, 5])
@pytest.mark.parametrize("channels", [(40,), (40, 112), (16, 3, 130)])
def test_pooled_equals_published_steps_for_odd_dimensions(
    channels: tuple[int, ...], patchsize: int, pretrain: int, target: int
) -> None:
    assert_as_published(channels, patchsize, pretrain, target)


def test_pooled_by_hand() -> None:
    # One channel, one row of pixels 1, 2: the neighbourhoods with their zero padding, top to bottom, are
    # 0 0 0 | 0 1 2 | 0 0 0 and 0 0 0 | 1 2 0 | 0 0 0. Pooling 9 values to 3 gives the mean of each row of three.
    feature_map = torch.tensor([[[[1.0, 2.0]]]])
    embedded = PooledEmbedding([1], [3], 3, 3)([feature_map])
    torch.testing.assert_close(embedded, torch.tensor([[[[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]]]))
    # 9 values to 2: the windows are values 0-4 and 4-8, which share the centre.
    embedded = PooledEmbedding([1], [3], 2, 2)([feature_map])
    torch.testing.assert_close(embedded, torch.tensor([[[[0.2, 0.6], [0.6, 0.4]]]]))


@pytest.mark.parametrize("channels", [(40, 112), (512, 1024)])
@pytest.mark.parametrize("embedding", ["pooled", "concat"])
def test_memory_format_of_the_maps_does_not_matter(embedding: str, channels: tuple[int, ...]) -> None:
    embed = PooledEmbedding(channels, [3], 1024, 1024) if embedding == "pooled" else ConcatEmbedding(channels, [3])
    maps = random_maps(channels)
    channels_last = [m.contiguous(memory_format=torch.channels_last) for m in maps]
    transposed = [m.mT.contiguous().mT for m in maps]
    torch.testing.assert_close(embed(channels_last), embed(maps), rtol=0, atol=1e-5)
    torch.testing.assert_close(embed(transposed), embed(maps), rtol=0, atol=1e-5)


@pytest.mark.parametrize("embedding", ["pooled", "concat"])
def test_embeddings_are_linear_and_leave_their_input_alone(embedding: str) -> None:
    channels = (40, 112)
    embed = PooledEmbedding(channels, [3], 384, 100) if embedding == "pooled" else ConcatEmbedding(channels, [3])
    first, second = random_maps(channels, seed=1), random_maps(channels, seed=2)
    copies = [m.clone() for m in first]
    combined = embed([2.5 * a - 0.5 * b for a, b in zip(first, second, strict=True)])
    torch.testing.assert_close(combined, 2.5 * embed(first) - 0.5 * embed(second), rtol=0, atol=1e-5)
    assert all(torch.equal(m, copy) for m, copy in zip(first, copies, strict=True))


@pytest.mark.parametrize("embedding", ["pooled", "concat"])
def test_an_image_is_embedded_the_same_in_any_batch(embedding: str) -> None:
    channels = (40, 112)
    embed = PooledEmbedding(channels, [3], 1024, 1024) if embedding == "pooled" else ConcatEmbedding(channels, [3])
    maps = random_maps(channels)
    alone = torch.cat([embed([m[i : i + 1] for m in maps]) for i in range(BATCH)])
    torch.testing.assert_close(embed(maps), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("patchsize", [1, 3])
def test_pooled_is_finite_and_constant_inside_a_constant_map(patchsize: int) -> None:
    # Away from the padding every average of a constant is that constant: the weights of an output sum to one.
    maps = [torch.full((1, c, 8, 8), 3.0) for c in (24, 40)]
    inner = PooledEmbedding([24, 40], [patchsize], 384, 100)(maps)[:, 1:-1, 1:-1]
    torch.testing.assert_close(inner, torch.full_like(inner, 3.0))


def test_concat_by_hand_counts_the_padding() -> None:
    first = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    second = torch.tensor([[[[9.0]], [[18.0]]]])  # one place: its neighbourhood is itself and eight zeros
    embedded = ConcatEmbedding([1, 2], [3])([first, second])
    assert embedded.shape == (1, 3, 3, 3)
    # Sums over the neighbourhoods of 1 2 3 / 4 5 6 / 7 8 9, all of them divided by nine.
    sums = torch.tensor([[12.0, 21.0, 16.0], [27.0, 45.0, 33.0], [24.0, 39.0, 28.0]])
    torch.testing.assert_close(embedded[0, ..., 0], sums / 9)
    torch.testing.assert_close(embedded[0, ..., 1:], torch.tensor([1.0, 2.0]).expand(3, 3, 2))


def test_concat_aligns_bilinearly_by_hand() -> None:
    first = torch.zeros(1, 1, 1, 4)
    second = torch.tensor([[[[0.0, 4.0]]]])
    embedded = ConcatEmbedding([1, 1], [1])([first, second])
    # Pixel centres at 1/4 and 3/4 of the width; beyond them the border value goes on.
    torch.testing.assert_close(embedded[0, 0, :, 1], torch.tensor([0.0, 1.0, 3.0, 4.0]))


def test_dimension_is_what_comes_out() -> None:
    maps = random_maps((40, 112))
    for embed in (ConcatEmbedding((40, 112), [3]), PooledEmbedding((40, 112), [3], 384, 100)):
        assert embed(maps).shape[-1] == embed.dimension
        assert embed(maps).dtype == torch.float32

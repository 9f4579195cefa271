"""Feature maps to patch embeddings: neighbourhood aggregation and alignment to one grid.

Source: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022, section 3.1, Eq. 1-3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROWS_PER_BAND = 32  # fewer make many small convolutions, more read channels that most of their rows do not need


class ConcatEmbedding(nn.Module):
    """Neighbourhood means of every layer, aligned to the first layer's grid and concatenated.

    Args:
        channels: Channels of each layer.
        patchsizes: Sides of the neighbourhoods, odd; with several, each layer enters once with each.
    """

    def __init__(self, channels: Sequence[int], patchsizes: Sequence[int]) -> None:
        super().__init__()
        self.dimension = sum(channels) * len(patchsizes)
        self.patchsizes = tuple(patchsizes)

    def forward(self, feature_maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Embed the patches of a batch.

        Args:
            feature_maps: One [B, C_l, H_l, W_l] per layer; the first gives the grid H x W.

        Returns:
            [B, H, W, D] with D the sum of the channels, times the number of neighbourhoods.
        """
        grid = feature_maps[0].shape[-2:]
        # Zero padding is counted, as in the published unfold.
        means = [F.avg_pool2d(m, p, stride=1, padding=p // 2) for m in feature_maps for p in self.patchsizes]
        aligned = [_align(m, grid).permute(0, 2, 3, 1) for m in means]  # [B, H, W, C_l]
        return torch.cat(aligned, dim=-1)  # [B, H, W, D]


class PooledEmbedding(nn.Module):
    """The published embedding: two adaptive average poolings over flattened neighbourhoods.

    As published, each layer's patchsize x patchsize neighbourhoods are unfolded with zero padding, flattened to
    C * patchsize^2 values (channel first), resized bilinearly to the grid of the first layer, pooled to
    `pretrain_dimension` values, concatenated over layers and pooled again to `target_dimension` values. All of
    these steps are linear, and the resize treats every value alike, so that it may come last. What remains is
    one sparse convolution per layer: an output reads a few neighbouring channels. It is computed as such.

    With several neighbourhood sizes, each layer enters the second pooling once with each, as if it were so many layers.

    Args:
        channels: Channels of each layer.
        patchsizes: Sides of the neighbourhoods, odd.
        pretrain_dimension: Values per layer after the first pooling.
        target_dimension: Values of a patch embedding.
    """

    def __init__(
        self, channels: Sequence[int], patchsizes: Sequence[int], pretrain_dimension: int, target_dimension: int
    ) -> None:
        super().__init__()
        self.dimension = target_dimension
        self.num_sizes = len(patchsizes)
        repeated = [c for c in channels for _ in patchsizes]
        layer_maps = [
            _SparseLayerMap(i, repeated, patchsizes[i % self.num_sizes], pretrain_dimension, target_dimension)
            for i in range(len(repeated))
        ]
        self.layer_maps = nn.ModuleList(layer_maps)
        self.first_rows = [layer_map.first_row for layer_map in layer_maps]

    def forward(self, feature_maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Embed the patches of a batch.

        Args:
            feature_maps: One [B, C_l, H_l, W_l] per layer; the first gives the grid H x W.

        Returns:
            [B, H, W, D] with D = target_dimension.
        """
        grid = feature_maps[0].shape[-2:]
        batch = feature_maps[0].shape[0]
        embeddings = feature_maps[0].new_zeros(batch, *grid, self.dimension)  # [B, H, W, D]
        for first_row, part in self.parts(feature_maps):
            embeddings[..., first_row : first_row + part.shape[-1]] += part
        return embeddings

    def parts(self, feature_maps: Sequence[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield what each layer adds to the embeddings: the first value it adds to, and values [B, H, W, R_l]."""
        grid = feature_maps[0].shape[-2:]
        repeated = [m for m in feature_maps for _ in range(self.num_sizes)]
        for layer_map, first_row, feature_map in zip(self.layer_maps, self.first_rows, repeated, strict=True):
            yield first_row, _align(layer_map(feature_map), grid).permute(0, 2, 3, 1)


def _align(feature_map: torch.Tensor, grid: torch.Size) -> torch.Tensor:
    """Resize [B, C, h, w] bilinearly to [B, C, H, W]; nothing to do for the layer that gives the grid."""
    if feature_map.shape[-2:] == grid:
        return feature_map
    return F.interpolate(feature_map, size=grid, mode="bilinear", align_corners=False)


class _SparseLayerMap(nn.Module):
    """One layer's share of the published embedding, before its resize.

    Output row r reads channels first_channel[r] + g for g = 0 .. G-1, each through a patchsize x patchsize
    kernel weights[r, g]. Where the kernels of each row are multiples of one another (rows that average whole
    channels: layers with many channels), the channels are mixed first and one depthwise convolution follows.
    Elsewhere consecutive rows, which read overlapping channels, share a small dense convolution.
    """

    kernel: torch.Tensor
    index: torch.Tensor
    shares: torch.Tensor

    def __init__(
        self, layer: int, channels: Sequence[int], patchsize: int, pretrain_dimension: int, target_dimension: int
    ) -> None:
        super().__init__()
        self.patchsize = patchsize
        rows, first_channel, weights = _layer_weights(
            layer, len(channels), channels[layer], patchsize, pretrain_dimension, target_dimension
        )
        self.first_row = int(rows[0])
        shares = weights.sum(axis=2)  # [R, G]
        kernel = weights.sum(axis=1)  # [R, p*p], each sums to the row's total share
        kernel /= kernel.sum(axis=1, keepdims=True)
        difference = np.abs(shares[:, :, None] * kernel[:, None, :] - weights).max(initial=0.0)
        self.separable = bool(difference < 1e-12)
        if self.separable:
            # Channels past the last one have share 0: which channel stands in for them does not matter.
            index = np.minimum(first_channel[:, None] + np.arange(weights.shape[1]), channels[layer] - 1)
            self.register_buffer("index", torch.tensor(index.T.copy()), persistent=False)  # [G, R]
            self._register("shares", shares.T[..., None, None])  # [G, R, 1, 1]
            self._register("kernel", kernel.reshape(-1, 1, patchsize, patchsize))  # [R, 1, p, p]
        else:
            self.bands = self._register_bands(first_channel, weights, channels[layer])

    def _register(self, name: str, values: np.ndarray) -> None:
        self.register_buffer(name, torch.tensor(values.copy(), dtype=torch.float32), persistent=False)

    def _register_bands(self, first_channel: np.ndarray, weights: np.ndarray, num_channels: int) -> list[slice]:
        """Store one dense kernel for each band of rows, and return the channels that each band reads."""
        _, num_groups, taps = weights.shape
        bands: list[slice] = []
        for start in range(0, len(weights), ROWS_PER_BAND):
            band_weights, band_first = (
                weights[start : start + ROWS_PER_BAND],
                first_channel[start : start + ROWS_PER_BAND],
            )
            low, high = int(band_first[0]), int(band_first[-1]) + num_groups
            dense = np.zeros((len(band_weights), high - low, taps))
            for group in range(num_groups):
                dense[np.arange(len(dense)), band_first - low + group] = band_weights[:, group]
            high = min(high, num_channels)
            kernel = dense[:, : high - low].reshape(len(dense), high - low, self.patchsize, self.patchsize)
            self._register(f"kernel_{len(bands)}", kernel)
            bands.append(slice(low, high))
        return bands

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """Map [B, C, h, w] to [B, R, h, w]."""
        padding = self.patchsize // 2
        if self.separable:
            mixed = feature_map[:, self.index[0]] * self.shares[0]  # [B, R, h, w]
            for index, share in zip(self.index[1:], self.shares[1:], strict=True):
                mixed += feature_map[:, index] * share
            return F.conv2d(mixed, self.kernel, padding=padding, groups=len(self.kernel))
        parts = [
            F.conv2d(feature_map[:, band], self.get_buffer(f"kernel_{i}"), padding=padding)
            for i, band in enumerate(self.bands)
        ]
        return torch.cat(parts, dim=1)  # [B, R, h, w]


def _pooling_windows(num_inputs: int, num_outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return start and end of the window of each output of adaptive average pooling."""
    outputs = np.arange(num_outputs)
    starts = outputs * num_inputs // num_outputs
    ends = -(-(outputs + 1) * num_inputs // num_outputs)
    return starts, ends


def _layer_weights(
    layer: int, num_layers: int, num_channels: int, patchsize: int, pretrain_dimension: int, target_dimension: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compose the two poolings for one layer.

    Returns:
        rows: Consecutive outputs that read this layer, [R].
        first_channel: First channel that each of them reads, [R].
        weights: float64 [R, G, patchsize^2], of channel first_channel + g at each place of the neighbourhood.
    """
    taps = patchsize * patchsize
    tap_starts, tap_ends = _pooling_windows(num_channels * taps, pretrain_dimension)
    value_starts, value_ends = _pooling_windows(num_layers * pretrain_dimension, target_dimension)
    shares = 1.0 / (value_ends - value_starts)  # of each first-pooling value in an output
    low = np.maximum(value_starts - layer * pretrain_dimension, 0)
    high = np.minimum(value_ends - layer * pretrain_dimension, pretrain_dimension)
    rows = np.flatnonzero(low < high)
    low, high, shares = low[rows], high[rows], shares[rows]
    first_channel = tap_starts[low] // taps
    last_channel = (tap_ends[high - 1] - 1) // taps
    num_groups = int((last_channel - first_channel).max(initial=0)) + 1
    flat = np.zeros((len(rows), num_groups * taps))
    for offset in range(int((high - low).max(initial=0))):
        value = np.minimum(low + offset, high - 1)
        used = low + offset < high
        width = tap_ends[value] - tap_starts[value]
        for tap_offset in range(int(width.max(initial=0))):
            hit = np.flatnonzero(used & (tap_offset < width))
            column = tap_starts[value[hit]] + tap_offset - first_channel[hit] * taps
            flat[hit, column] += shares[hit] / width[hit]
    return rows, first_channel, flat.reshape(len(rows), num_groups, taps)

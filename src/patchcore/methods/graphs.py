"""Detectors as graphs of tensors alone: what is exported to programs that know neither torch nor this toolkit.

A graph gives what the detector's `predict` gives, written without what makes that fast here: threads, blocks, work in
place. Its search is one matrix product with the memory bank. What depends on sizes and weights alone is computed when a
graph is made: while it is traced, tensors have no values, and caches must not be filled with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import nn

from patchcore.configs import FastFlowConfig, PostProcessingConfig
from patchcore.features.extractor import FeatureExtractor
from patchcore.features.patches import ConcatEmbedding, PooledEmbedding
from patchcore.methods.fastflow import scaled_size
from patchcore.methods.normalizing_flow import (
    FastFlowNet,
    FeatureFlow,
    FlowStep,
    FoldedStep,
    latent_bits,
    mean_probability,
)
from patchcore.methods.patchcore import PatchCore
from patchcore.scoring.anomaly_map import SMOOTHING_SIGMA_PX, axis_matrix, image_scores, upsampling_matrix
from patchcore.scoring.post_processing import gray, guide_radius_px, guided_filter, robust_z_scores

SQUARED_NORM_FLOOR = 1e-12  # below it a distance counts as 0


class BankGraph(nn.Module):
    """Patch embeddings to patch scores and image scores: the part of PatchCore that learns.

    Args:
        detector: A fitted PatchCore with a float32 memory bank.
    """

    bank: torch.Tensor
    centre: torch.Tensor
    squared_norms: torch.Tensor

    def __init__(self, detector: PatchCore) -> None:
        super().__init__()
        bank = detector.memory_bank_.cpu()
        centre = bank.mean(dim=0)
        self.register_buffer("bank", bank)
        self.register_buffer("centre", centre)
        self.register_buffer("squared_norms", (bank - centre).square().sum(dim=1))
        self.num_nn = detector.config.num_nn
        self.patchscore = detector.config.patchscore
        self.support = detector.config.score_reweighting
        self.grid = detector.embedder.grid

    def forward(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return image scores [B] and patch scores [B, h, w] of embeddings [B, P, D]."""
        distances, rows = self._nearest(embeddings, self.num_nn)  # [B, P, k] each
        patch_scores = distances.mean(dim=-1)  # [B, P]
        height, width = self.grid
        grid = patch_scores.unflatten(1, (height, width))
        scores = image_scores(grid, self.patchscore)
        if self.support is not None:
            scores = scores * self._weights(embeddings, patch_scores, rows[..., 0], self.support)
        return scores, grid

    def _nearest(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return distances and bank rows [B, Q, k] of the nearest to queries [B, Q, D], nearest first.

        The product ranks, the distances are computed by subtraction: what cancels in the product is lost in float32.
        """
        keys = (-2 * (queries - self.centre)).flatten(0, 1)  # [B * Q, D]
        # What all members have in common is left out: neither the query's norm nor its product with the centre changes
        # the order.
        values = F.linear(keys, self.bank, self.squared_norms).unflatten(0, queries.shape[:2])  # [B, Q, M]
        rows = values.topk(k, dim=-1, largest=False).indices
        distances = torch.stack([self._distances(queries, rows[..., i]) for i in range(k)], dim=-1)
        if k == 1:
            return distances, rows
        order = distances.topk(k, dim=-1, largest=False)
        return order.values, rows.gather(-1, order.indices)

    def _distances(self, queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the distance [B, Q] of each query [B, Q, D] to its bank row [B, Q]."""
        return (queries - self.bank[rows]).square().sum(dim=-1).clamp(min=SQUARED_NORM_FLOOR).sqrt()

    def _weights(
        self, embeddings: torch.Tensor, patch_scores: torch.Tensor, nearest: torch.Tensor, support: int
    ) -> torch.Tensor:
        """Return the weight [B] of each image's highest patch score (Roth et al., CVPR 2022, Eq. 7)."""
        worst = patch_scores.argmax(dim=1, keepdim=True)  # [B, 1]
        queries = embeddings.gather(1, worst[..., None].expand(-1, -1, embeddings.shape[-1]))  # [B, 1, D]
        members = nearest.gather(1, worst)  # [B, 1]
        _, support_rows = self._nearest(self.bank[members], support)  # [B, 1, support]
        own = self._distances(queries, members)[:, 0]  # [B]
        others = torch.stack([self._distances(queries, support_rows[..., i])[:, 0] for i in range(support)], dim=-1)
        return 1 - torch.exp(own - others.logsumexp(dim=-1))


class AxisMatrices(nn.Module):
    """Grids [B, h, w] to [B, H, W] by one matrix for each axis."""

    rows: torch.Tensor
    columns: torch.Tensor

    def __init__(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows.contiguous())  # [H, h]
        self.register_buffer("columns", columns.T.contiguous())  # [w, W]

    def forward(self, grids: torch.Tensor) -> torch.Tensor:
        return self.rows @ grids @ self.columns


class PatchCoreGraph(nn.Module):
    """Images uint8 [B, 3, S, S] to scores [B] and maps [B, S, S], for PatchCore and its ensembles.

    Args:
        members: Fitted models; one, or those of an ensemble, which may share extractors and embeddings.
        scales: Mean and standard deviation of each member's patch scores on normal images; (0, 1) for a single one.
    """

    def __init__(self, members: Sequence[PatchCore], scales: Sequence[tuple[float, float]]) -> None:
        super().__init__()
        imagesize = members[0].preprocessing.imagesize_px
        self.banks = nn.ModuleList([BankGraph(member) for member in members])
        self.maps = nn.ModuleList([_smooth_upsampling(member.embedder.grid, imagesize) for member in members])
        self.embedders = [member.embedder for member in members]
        distinct: dict[FeatureExtractor, None] = dict.fromkeys(e.extractor for e in self.embedders)
        self.extractors = nn.ModuleList(distinct)
        self.embeddings = nn.ModuleList(dict.fromkeys(e.embedding for e in self.embedders))
        self.scales = tuple(scales)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean over members of standardised scores and maps."""
        feature_maps = {extractor: extractor(images) for extractor in self.extractors}
        embeddings = {}
        scores, maps = [], []
        for embedder, bank, to_map, (mean, std) in zip(self.embedders, self.banks, self.maps, self.scales, strict=True):
            if embedder not in embeddings:
                of_layers = [feature_maps[embedder.extractor][layer] for layer in embedder.layers]
                embeddings[embedder] = _embedded(embedder.embedding, of_layers).flatten(1, 2)  # [B, P, D]
            image_score, patch_scores = bank(embeddings[embedder])
            scores.append((image_score - mean) / std)
            maps.append(to_map((patch_scores - mean) / std))
        return torch.stack(scores).mean(dim=0), torch.stack(maps).mean(dim=0)


def _embedded(embedding: ConcatEmbedding | PooledEmbedding, feature_maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return patch embeddings [B, H, W, D], without writing parts into a whole, which is slow in other runtimes."""
    if isinstance(embedding, ConcatEmbedding):
        return embedding(feature_maps)
    parts = embedding.parts(feature_maps)
    whole = [F.pad(part, (first, embedding.dimension - first - part.shape[-1])) for first, part in parts]
    return sum(whole[1:], start=whole[0])


class StepGraph(nn.Module):
    """One step of a flow.

    Args:
        step: Its weights and constants.
        is_last: A sum over channels follows, which does not mind their order.
    """

    first: torch.Tensor
    first_bias: torch.Tensor
    last: torch.Tensor
    last_bias: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    log_scale: torch.Tensor
    order: torch.Tensor

    def __init__(self, step: FoldedStep, is_last: bool) -> None:
        super().__init__()
        for field in fields(step):
            value = getattr(step, field.name)
            if isinstance(value, torch.Tensor):
                by_channel = value[:, None, None] if field.name in ("scale", "offset", "log_scale") else value
                self.register_buffer(field.name, by_channel.contiguous())
        self.clamp = step.clamp
        self.is_last = is_last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform features [B, C, H, W]."""
        num_passive, num_active = len(self.scale), len(self.log_scale)
        passive, active = x[:, :num_passive], x[:, num_passive:]
        hidden = F.conv2d(passive, self.first, self.first_bias, padding=self.first.shape[2] // 2).relu()
        coefficients = F.conv2d(hidden, self.last, self.last_bias, padding=self.last.shape[2] // 2)
        log_factor, shift = coefficients[:, :num_active], coefficients[:, num_active:]
        changed = active * torch.exp(self.clamp * log_factor.tanh() + self.log_scale) + shift
        joined = torch.cat((passive * self.scale + self.offset, changed), dim=1)
        return joined if self.is_last else joined[:, self.order]


class FlowGraph(nn.Module):
    """Images uint8 [B, 3, S, S] to scores [B] and maps [B, S, S], for FastFlow without tiles, in float32.

    Args:
        config: How likelihoods become maps and scores.
        extractor: Feature maps of the backbone.
        flows: The trained flows.
        imagesize: Side of the images, px.
    """

    spread: torch.Tensor

    def __init__(self, config: FastFlowConfig, extractor: FeatureExtractor, flows: FastFlowNet, imagesize: int) -> None:
        super().__init__()
        self.config = config
        self.imagesize = imagesize
        self.extractor = extractor
        self.flows = nn.ModuleList([_flow_graph(flow) for flow in flows.flows])
        self.register_buffer("spread", flows.spread)
        sizes = [scaled_size(imagesize, scale) for scale in config.post_processing.scales]
        grids = [_grids(extractor, config.backbone.layers, size) for size in sizes]
        finest = [max(of_scale, key=math.prod) for of_scale in grids]
        exact = torch.float64 if config.map_mode == "prob" else torch.float32
        self.resizings = nn.ModuleList([_resizing(imagesize, size) for size in sizes])
        self.alignments = nn.ModuleList(
            [
                nn.ModuleList([_upsampling(grid, common, exact) for grid in of_scale])
                for of_scale, common in zip(grids, finest, strict=True)
            ]
        )
        self.upsamplings = nn.ModuleList([_upsampling(grid, (imagesize, imagesize), torch.float32) for grid in finest])
        self.smoothing = _smoothing(config.post_processing, imagesize)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores and maps after the post-processing."""
        scales = zip(self.resizings, self.alignments, self.upsamplings, strict=True)
        maps = torch.stack([self._maps(images, *of_scale) for of_scale in scales]).mean(dim=0)
        post = self.config.post_processing
        maps = self.smoothing(maps)
        if post.smoothing == "guided":
            maps = guided_filter(maps, gray(images), guide_radius_px(post))
        if post.adaptive_normalization:
            maps = robust_z_scores(maps, _row_medians)
        return image_scores(maps, self.config.image_score), maps

    def _maps(
        self, images: torch.Tensor, resizing: nn.Module, alignments: nn.Module, upsampling: nn.Module
    ) -> torch.Tensor:
        """Return maps [B, S, S] of the images at a scale."""
        of_layer = self.extractor(resizing(images.float()))
        features = [of_layer[layer] for layer in self.config.backbone.layers]
        squares = [flow(maps).square().mean(dim=1) for flow, maps in zip(self.flows, features, strict=True)]
        return upsampling(self._grid(squares, alignments).float())

    def _grid(self, squares: Sequence[torch.Tensor], alignments: nn.Module) -> torch.Tensor:
        """Join the flows as `FastFlowNet.anomaly_grid` does."""
        if self.config.map_mode == "prob":
            grids = [mean_probability(of_flow.double()) for of_flow in squares]
        else:
            grids = [latent_bits(of_flow) for of_flow in squares]
        if self.config.map_mode == "weighted":
            grids = [grid / spread for grid, spread in zip(grids, self.spread, strict=True)]
        assert isinstance(alignments, nn.ModuleList)
        mean = torch.stack([align(grid) for align, grid in zip(alignments, grids, strict=True)]).mean(dim=0)
        if self.config.map_mode == "prob":
            return -mean.clamp(min=torch.finfo(torch.float64).tiny).log2()
        return mean


def _row_medians(values: torch.Tensor) -> torch.Tensor:
    """Do what `row_medians` does, slower: no runtime knows medians."""
    num_lower = (values.shape[1] + 1) // 2
    return values.topk(num_lower, dim=1, largest=False).values[:, -1:]


class _Standardised(nn.Module):
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, flow: FeatureFlow) -> None:
        super().__init__()
        self.register_buffer("mean", flow.mean)
        self.register_buffer("std", flow.std)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean) / self.std


def _flow_graph(flow: nn.Module) -> nn.Module:
    """Return features [B, C, H, W] to the latent variable, its channels in any order."""
    assert isinstance(flow, FeatureFlow)
    steps = [step.folded() for step in flow.steps if isinstance(step, FlowStep)]
    last = len(steps) - 1
    return nn.Sequential(_Standardised(flow), *(StepGraph(step, number == last) for number, step in enumerate(steps)))


@torch.no_grad()
def _grids(extractor: FeatureExtractor, layers: Sequence[str], size: int) -> list[tuple[int, int]]:
    """Return height and width of the feature map of each layer, for inputs of a size."""
    feature_maps = extractor(torch.zeros(1, 3, size, size))
    return [(feature_maps[layer].shape[2], feature_maps[layer].shape[3]) for layer in layers]


def _smooth_upsampling(grid: Sequence[int], imagesize: int) -> nn.Module:
    """Return patch scores [B, h, w] to maps [B, S, S], as `anomaly_maps` does it."""
    rows, columns = (axis_matrix(length, imagesize, SMOOTHING_SIGMA_PX) for length in grid)
    return AxisMatrices(rows, columns)


def _smoothing(post: PostProcessingConfig, imagesize: int) -> nn.Module:
    """Return what smooths maps [B, S, S] by a Gaussian, where that is asked for."""
    if post.smoothing != "gaussian":
        return nn.Identity()
    matrix = axis_matrix(imagesize, imagesize, post.smoothing_px)
    return AxisMatrices(matrix, matrix)


def _upsampling(grid: Sequence[int], size: Sequence[int], dtype: torch.dtype) -> nn.Module:
    """Return what resizes grids [B, h, w] bilinearly, by matrices: not every runtime resizes float64."""
    if tuple(grid) == tuple(size):
        return nn.Identity()
    return AxisMatrices(*(upsampling_matrix(n, s).to(dtype) for n, s in zip(grid, size, strict=True)))


def _resizing(length: int, size: int) -> nn.Module:
    """Return what resizes square images [B, 3, n, n] as `tiles.resized` does."""
    if length == size:
        return nn.Identity()
    identity = torch.eye(length)[None, None]  # [1, 1, n, n]: each column is an image of one bright row
    matrix = F.interpolate(identity, size=(size, length), mode="bilinear", align_corners=False, antialias=True)[0, 0]
    return AxisMatrices(matrix, matrix)

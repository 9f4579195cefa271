"""Detectors as graphs of tensors alone: what is exported to programs that know neither torch nor this toolkit.

A graph gives what the detector's `predict` gives, written without what makes that fast here: threads, blocks, work in
place. Its search is one matrix product with the memory bank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from patchcore.configs import FastFlowConfig
from patchcore.features.extractor import FeatureExtractor
from patchcore.methods.fastflow import scaled_size
from patchcore.methods.normalizing_flow import FastFlowNet, FeatureFlow, FlowStep, latent_bits, mean_probability
from patchcore.methods.patchcore import PatchCore
from patchcore.scoring.anomaly_map import SMOOTHING_SIGMA_PX, axis_matrix, image_scores, upsampling_matrix
from patchcore.scoring.post_processing import post_processed

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
        values = self.squared_norms - 2 * (queries - self.centre) @ self.bank.T  # [B, Q, M]
        # The term that every member has in common is left out, as is the query's norm: neither changes the order.
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


class PatchCoreGraph(nn.Module):
    """Images uint8 [B, 3, S, S] to scores [B] and maps [B, S, S], for PatchCore and its ensembles.

    Args:
        members: Fitted models; one, or those of an ensemble, which may share extractors and embeddings.
        scales: Mean and standard deviation of each member's patch scores on normal images; (0, 1) for a single one.
    """

    def __init__(self, members: Sequence[PatchCore], scales: Sequence[tuple[float, float]]) -> None:
        super().__init__()
        self.banks = nn.ModuleList([BankGraph(member) for member in members])
        self.embedders = [member.embedder for member in members]
        distinct: dict[FeatureExtractor, None] = dict.fromkeys(e.extractor for e in self.embedders)
        self.extractors = nn.ModuleList(distinct)
        self.embeddings = nn.ModuleList(dict.fromkeys(e.embedding for e in self.embedders))
        self.scales = tuple(scales)
        self.imagesize = members[0].preprocessing.imagesize_px

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean over members of standardised scores and maps."""
        feature_maps = {extractor: extractor(images) for extractor in self.extractors}
        embeddings = {}
        scores, maps = [], []
        for embedder, bank, (mean, std) in zip(self.embedders, self.banks, self.scales, strict=True):
            if embedder not in embeddings:
                of_layers = [feature_maps[embedder.extractor][layer] for layer in embedder.layers]
                embeddings[embedder] = embedder.embedding(of_layers).flatten(1, 2)  # [B, P, D]
            image_score, patch_scores = bank(embeddings[embedder])
            scores.append((image_score - mean) / std)
            maps.append(self._map((patch_scores - mean) / std))
        return torch.stack(scores).mean(dim=0), torch.stack(maps).mean(dim=0)

    def _map(self, patch_scores: torch.Tensor) -> torch.Tensor:
        rows, columns = (axis_matrix(length, self.imagesize, SMOOTHING_SIGMA_PX) for length in patch_scores.shape[1:])
        return rows @ patch_scores @ columns.T


class FlowGraph(nn.Module):
    """Images uint8 [B, 3, S, S] to scores [B] and maps [B, S, S], for FastFlow without tiles.

    Args:
        config: How likelihoods become maps and scores.
        extractor: Feature maps of the backbone.
        flows: The trained flows.
        imagesize: Side of the images, px.
    """

    def __init__(self, config: FastFlowConfig, extractor: FeatureExtractor, flows: FastFlowNet, imagesize: int) -> None:
        super().__init__()
        self.config = config
        self.imagesize = imagesize
        self.extractor = extractor
        self.flows = flows

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores and maps after the post-processing."""
        post = self.config.post_processing
        maps = torch.stack([self._maps(images, scale) for scale in post.scales]).mean(dim=0)
        maps = post_processed(maps, images, post)
        return image_scores(maps, self.config.image_score), maps

    def _maps(self, images: torch.Tensor, scale: float) -> torch.Tensor:
        """Return maps [B, S, S] of the images at a scale."""
        size = scaled_size(self.imagesize, scale)
        inputs = images.float()
        if size != self.imagesize:
            matrix = _shrinking_matrix(self.imagesize, size)
            inputs = matrix @ inputs @ matrix.T
        of_layer = self.extractor(inputs)
        features = [of_layer[layer] for layer in self.config.backbone.layers]
        squares = [self._mean_squares(flow, maps) for flow, maps in zip(self.flows.flows, features, strict=True)]
        return _resized(self._grid(squares).float(), (self.imagesize, self.imagesize))

    def _mean_squares(self, flow: nn.Module, features: torch.Tensor) -> torch.Tensor:
        """Return the mean square over channels of the latent variable [B, H, W]."""
        assert isinstance(flow, FeatureFlow)
        x = (features - flow.mean) / flow.std
        for step in flow.steps:
            assert isinstance(step, FlowStep)
            x = step.transformed(x)
        return x.square().mean(dim=1)

    def _grid(self, squares: Sequence[torch.Tensor]) -> torch.Tensor:
        """Join the flows as `FastFlowNet.anomaly_grid` does."""
        finest = max((tuple(of_flow.shape[1:]) for of_flow in squares), key=math.prod)
        if self.config.map_mode == "prob":
            grids = [mean_probability(of_flow.double()) for of_flow in squares]
        else:
            grids = [latent_bits(of_flow) for of_flow in squares]
        if self.config.map_mode == "weighted":
            grids = [grid / spread for grid, spread in zip(grids, self.flows.spread, strict=True)]
        mean = torch.stack([_resized(grid, finest) for grid in grids]).mean(dim=0)
        if self.config.map_mode == "prob":
            return -mean.clamp(min=torch.finfo(torch.float64).tiny).log2()
        return mean


def _resized(grids: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize grids [B, h, w] bilinearly, by matrices: not every runtime resizes float64."""
    if tuple(grids.shape[1:]) == tuple(size):
        return grids
    rows, columns = (upsampling_matrix(n, s).to(grids.dtype) for n, s in zip(grids.shape[1:], size, strict=True))
    return rows @ grids @ columns.T


def _shrinking_matrix(length: int, size: int) -> torch.Tensor:
    """Return the [size, length] matrix that resizes along one axis as `tiles.resized` does."""
    identity = torch.eye(length)[None, None]  # [1, 1, n, n]: each column is an image of one bright row
    return F.interpolate(identity, size=(size, length), mode="bilinear", align_corners=False, antialias=True)[0, 0]

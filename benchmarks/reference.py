"""PatchCore as published, step by step: what the benchmarks measure the toolkit against.

Written from the paper (Roth et al., CVPR 2022) and the way the published code goes about it: images in batches of two,
every neighbourhood unfolded, each of its nine taps resized by itself, two adaptive poolings, each embedding a numpy
array of its own, the coreset with all norms anew in every step, one search of a flat faiss index per batch, one
Gaussian filter per map, the curves of scikit-learn over all pixels. Nothing in it is slowed down, and nothing is
shared with the toolkit but the weights and, so that results can be compared, the random draws.

One departure: distances are Euclidean, as in the paper, where the published code leaves them squared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from flat_index import flat_index
from PIL import Image
from scipy.ndimage import gaussian_filter, label
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

BATCH_SIZE = 2
PATCHSIZE = 3
DIMENSION = 1024  # of each layer after the first pooling, and of an embedding after the second
PROJECTION_DIM = 128
NUM_STARTS = 10
SMOOTHING_SIGMA_PX = 4.0
PRO_FPR_LIMIT = 0.3
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ReferenceImages(Dataset[Any]):
    """Images of some files as the published data sets read them, with their masks.

    Args:
        paths: Image files.
        mask_paths: Ground truth of each; None for a good image.
        resize_px: Shorter side after the resize.
        imagesize_px: Side of the central crop.
    """

    def __init__(
        self, paths: Sequence[Path], mask_paths: Sequence[Path | None], resize_px: int, imagesize_px: int
    ) -> None:
        self.paths = list(paths)
        self.mask_paths = list(mask_paths)
        crop = transforms.CenterCrop(imagesize_px)
        self.transform = transforms.Compose(
            [
                transforms.Resize(resize_px),
                crop,
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )
        nearest = transforms.Resize(resize_px, transforms.InterpolationMode.NEAREST)
        self.mask_transform = transforms.Compose([nearest, crop, transforms.ToTensor()])

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> torch.Tensor:
        """Return the normalised image [3, S, S]."""
        return self.transform(Image.open(self.paths[index]).convert("RGB"))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the normalised image [3, S, S] and its mask [S, S] in {0, 1}."""
        image = self.image(index)
        mask_path = self.mask_paths[index]
        if mask_path is None:
            return image, torch.zeros(image.shape[1:])
        return image, (self.mask_transform(Image.open(mask_path).convert("L"))[0] > 0).float()


class _LastLayerReached(Exception):
    """Ends a forward pass: no later layer is wanted."""


class HookedBackbone:
    """Feature maps by hooks; the one of the last layer ends the forward pass.

    Args:
        network: In evaluation mode.
        layers: Names of modules, in the order in which they run.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        self.network = network
        self.layers = tuple(layers)
        self.maps: dict[str, torch.Tensor] = {}
        modules = dict(network.named_modules())
        for layer in self.layers:
            modules[layer].register_forward_hook(self._keep(layer))

    def _keep(self, layer: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            self.maps[layer] = output
            if layer == self.layers[-1]:
                raise _LastLayerReached

        return hook

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the feature maps [B, C, H, W] of normalised images [B, 3, S, S]."""
        self.maps = {}
        with suppress(_LastLayerReached):
            self.network(images)
        return [self.maps[layer] for layer in self.layers]


@torch.no_grad()
def embed(feature_maps: Sequence[torch.Tensor], patchsize: int = PATCHSIZE, dimension: int = DIMENSION) -> torch.Tensor:
    """Embed the patches of a batch.

    Args:
        feature_maps: One [B, C_l, H_l, W_l] per layer; the first gives the grid H x W.
        patchsize: Side of the neighbourhoods, odd.
        dimension: Values per layer after the first pooling, and of an embedding after the second.

    Returns:
        float32 [B * H * W, dimension].

    Source: Roth et al. (CVPR 2022), section 3.1, Eq. 1-3.
    """
    grid = feature_maps[0].shape[-2:]
    pooled = []
    for feature_map in feature_maps:
        patches = _unfolded(feature_map, patchsize)  # [B, C, p, p, h, w]
        if patches.shape[-2:] != grid:
            patches = _resized(patches, grid)
        values = patches.permute(0, 4, 5, 1, 2, 3).reshape(-1, 1, patches.shape[1] * patchsize**2)  # [B*H*W, 1, C*p*p]
        pooled.append(F.adaptive_avg_pool1d(values, dimension)[:, 0])  # [B*H*W, dimension]
    stacked = torch.stack(pooled, dim=1).flatten(1)  # [B*H*W, L*dimension]
    return F.adaptive_avg_pool1d(stacked[:, None], dimension)[:, 0]


def _unfolded(feature_map: torch.Tensor, patchsize: int) -> torch.Tensor:
    """Return the neighbourhood of every place, [B, C, p, p, h, w], zeros beyond the border."""
    batch, channels, height, width = feature_map.shape
    columns = F.unfold(feature_map, patchsize, padding=patchsize // 2)  # [B, C*p*p, h*w]
    return columns.view(batch, channels, patchsize, patchsize, height, width)


def _resized(patches: torch.Tensor, grid: torch.Size) -> torch.Tensor:
    """Resize each tap of the neighbourhoods [B, C, p, p, h, w] bilinearly to [B, C, p, p, H, W]."""
    planes = patches.reshape(-1, 1, *patches.shape[-2:])
    planes = F.interpolate(planes, size=grid, mode="bilinear", align_corners=False)
    return planes.view(*patches.shape[:4], *grid)


def as_arrays(embeddings: torch.Tensor) -> list[np.ndarray]:
    """Return each embedding as a numpy array of its own."""
    return [embedding.detach().cpu().numpy() for embedding in embeddings]


@torch.no_grad()
def project(features: np.ndarray, generator: torch.Generator) -> torch.Tensor:
    """Project features [N, D] at random to [N, 128], by a linear layer as torch initialises it."""
    bound = 1 / math.sqrt(features.shape[1])
    weight = torch.empty(PROJECTION_DIM, features.shape[1]).uniform_(-bound, bound, generator=generator)
    return F.linear(torch.from_numpy(features), weight)


def start_rows(num_points: int, generator: torch.Generator) -> torch.Tensor:
    """Draw the random points from which the first distances are measured."""
    return torch.randperm(num_points, generator=generator)[:NUM_STARTS]


@torch.no_grad()
def greedy_coreset(points: torch.Tensor, starts: torch.Tensor, num_steps: int) -> np.ndarray:
    """Pick the point farthest from everything picked so far, `num_steps` times.

    Args:
        points: float32 [N, R].
        starts: Rows of the random points; a point's first distance is its mean distance to them.
        num_steps: Picks.

    Returns:
        int64 [num_steps], in order.

    Source: Roth et al. (CVPR 2022), Algorithm 1; the start is that of the published approximate sampler.
    """
    anchors = _distances(points, points[starts]).mean(dim=1, keepdim=True)  # [N, 1]
    picks = []
    for _ in range(num_steps):
        pick = int(torch.argmax(anchors))
        picks.append(pick)
        to_pick = _distances(points, points[pick : pick + 1])  # [N, 1]
        anchors = torch.cat([anchors, to_pick], dim=-1).min(dim=1).values[:, None]
    return np.array(picks)


def _distances(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return distances [N, M] between rows, all norms computed anew by batched products."""
    left_norms = left[:, None].bmm(left[:, :, None]).reshape(-1, 1)
    right_norms = right[:, None].bmm(right[:, :, None]).reshape(1, -1)
    return (-2 * left.mm(right.T) + left_norms + right_norms).clamp(min=0).sqrt()


@dataclass
class StageSeconds:
    """How long each stage of a run took in all, s."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        """Leave out the time since the last stage ended."""
        self._last = time.perf_counter()

    def end(self, stage: str) -> None:
        """Count the time since the last stage ended for this one."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


@dataclass(frozen=True)
class ReferenceScores:
    """What the published loop says of the test images.

    Attributes:
        scores: float [N], image scores.
        maps: float32 [N, S, S].
        masks: uint8 [N, S, S] in {0, 1}.
    """

    scores: np.ndarray
    maps: np.ndarray
    masks: np.ndarray


class ReferencePatchCore:
    """The published loop from image files to scores.

    Args:
        network: In evaluation mode, its weights loaded.
        layers: The two layers, the first gives the grid.
        num_workers: Processes that read images.
        threads: Of faiss and torch.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], num_workers: int, threads: int) -> None:
        self.backbone = HookedBackbone(network, layers)
        self.num_workers = num_workers
        self.threads = threads
        self.stages = StageSeconds()

    def fit(
        self, images: ReferenceImages, percentage: float, projection: torch.Generator, selection: torch.Generator
    ) -> ReferencePatchCore:
        """Fill the memory bank.

        Args:
            images: Normal images.
            percentage: Share of the patches that is kept.
            projection: Draws the projection of the coreset.
            selection: Draws its random start.
        """
        self.stages = StageSeconds()
        features = []
        for batch in self._batches(images):
            features.append(np.asarray(self._embedded(batch[0])))
        all_features = np.concatenate(features, axis=0)
        self.stages.end("embedding")
        points = project(all_features, projection)
        starts = start_rows(len(points), selection)
        picks = greedy_coreset(points, starts, int(len(points) * percentage))
        self.stages.end("coreset")
        self.set_bank(all_features[picks])
        self.stages.end("search")
        return self

    def set_bank(self, bank: np.ndarray) -> None:
        """Put a memory bank float32 [M, D] into a flat index."""
        self.index = flat_index(bank, self.threads)

    def predict(self, images: ReferenceImages) -> ReferenceScores:
        """Score images, two at a time."""
        self.stages = StageSeconds()
        scores: list[float] = []
        maps: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        for batch, batch_masks in self._batches(images):
            features = np.asarray(self._embedded(batch))
            self.stages.end("embedding")
            squared, _ = self.index.search(features, 1)
            patch_scores = np.sqrt(np.maximum(squared, 0)).mean(axis=-1).reshape(len(batch), -1)  # [B, H*W]
            self.stages.end("search")
            scores += patch_scores.max(axis=-1).tolist()
            side = math.isqrt(patch_scores.shape[1])
            maps += smooth_maps(patch_scores.reshape(-1, side, side), batch.shape[-1])
            masks += [mask.numpy() for mask in batch_masks]
            self.stages.end("maps")
        return ReferenceScores(np.array(scores), np.stack(maps), np.stack(masks).astype(np.uint8))

    def _batches(self, images: ReferenceImages) -> Iterator[Any]:
        loader = DataLoader(images, batch_size=BATCH_SIZE, num_workers=self.num_workers)
        self.stages.start()
        for batch in loader:
            self.stages.end("decode")
            yield batch

    def _embedded(self, images: torch.Tensor) -> list[np.ndarray]:
        feature_maps = self.backbone(images)
        self.stages.end("backbone")
        arrays = as_arrays(embed(feature_maps))
        self.stages.end("embedding")
        return arrays


def smooth_maps(patch_scores: np.ndarray, imagesize: int) -> list[np.ndarray]:
    """Return an anomaly map [S, S] for each grid of patch scores [B, h, w]."""
    grids = torch.from_numpy(patch_scores)[:, None].float()
    upsampled = F.interpolate(grids, size=(imagesize, imagesize), mode="bilinear", align_corners=False)[:, 0].numpy()
    return [gaussian_filter(one, sigma=SMOOTHING_SIGMA_PX) for one in upsampled]


def all_metrics(scores: np.ndarray, labels: np.ndarray, maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Compute every ranking metric by the curves of scikit-learn over all pixels.

    PRO is the ROC curve with weights: where each pixel of a region weighs 1 / its area, the true-positive rate is the
    mean coverage of the regions.

    Args:
        scores: float [N].
        labels: bool [N].
        maps: float32 [N, S, S].
        masks: uint8 [N, S, S] in {0, 1}.

    Returns:
        By the names of the columns of results.csv.
    """
    pixels, truth, weights = maps.ravel(), masks.ravel(), _region_weights(masks).ravel()
    kept = masks.any(axis=(1, 2))
    own_pixels, own_truth = maps[kept].ravel(), masks[kept].ravel()
    return {
        "instance_auroc": float(roc_auc_score(labels, scores)),
        "image_ap": float(average_precision_score(labels, scores)),
        "image_f1_max": _f1_max(labels, scores),
        "full_pixel_auroc": float(roc_auc_score(truth, pixels)),
        "pixel_ap": float(average_precision_score(truth, pixels)),
        "pixel_f1_max": _f1_max(truth, pixels),
        "full_pro": _pro(truth, pixels, weights),
        "anomaly_pixel_auroc": float(roc_auc_score(own_truth, own_pixels)),
        "anomaly_pro": _pro(own_truth, own_pixels, _region_weights(masks[kept]).ravel()),
    }


def _f1_max(truth: np.ndarray, scores: np.ndarray) -> float:
    precision, recall, _ = precision_recall_curve(truth, scores)
    total = precision + recall
    return float(np.max(np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)))


def _region_weights(masks: np.ndarray) -> np.ndarray:
    """Return float64 [N, S, S]: 1 for a normal pixel, 1 / area of its 8-connected region for a defect pixel."""
    weights = np.ones(masks.shape)
    for mask, weight in zip(masks, weights, strict=True):
        regions, count = label(mask, structure=np.ones((3, 3)))
        areas = np.bincount(regions.ravel(), minlength=count + 1)
        weight[mask > 0] = 1 / areas[regions[mask > 0]]
    return weights


def _pro(truth: np.ndarray, pixels: np.ndarray, weights: np.ndarray) -> float:
    """Return the area under the PRO curve up to a false-positive rate of 0.3, divided by 0.3."""
    rates, coverage, _ = roc_curve(truth, pixels, sample_weight=weights)
    inside = rates <= PRO_FPR_LIMIT
    at_limit = np.interp(PRO_FPR_LIMIT, rates, coverage)
    x, y = np.append(rates[inside], PRO_FPR_LIMIT), np.append(coverage[inside], at_limit)
    return float(np.diff(x) @ (y[1:] + y[:-1]) / 2 / PRO_FPR_LIMIT)

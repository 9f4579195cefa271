"""A memory bank that is chosen in two rounds, so that no process sees all patches.

Each share of the training images keeps a greedy coreset of its own patches, and of each of them how far the patches
reach that it stands for; the bank is a greedy coreset of what all shares have kept.

Source: the two-round scheme for k-center of Malkomes et al., "Fast Distributed k-Center Clustering with Outliers on
    Massive Data" (NeurIPS 2015). Where each share keeps as many patches as the bank has, the distance of the patch that
    lies farthest from the bank is at most 4 times the least possible one, against 2 times for the greedy selection from
    all patches. With fewer, nothing of the kind is known. Keeping more brings it nearer to 2: Ceccarello et al.,
    "Solving k-center Clustering (with Outliers) in MapReduce and Streaming, almost as Accurately as Sequentially"
    (VLDB 2019).
    In the second round a patch counts as farther the farther it reaches: a quarter of its reach is added, in squares.
    That was chosen on training patches alone, by how far the farthest one lies from the bank (benchmarks/shards.py).
    The factor of 4 remains: with reaches up to twice the least possible distance r, picks are so far apart that what a
    patch counts as in the end is at most sqrt(4 r^2 + r^2); and of a patch that reaches 2 r, what it stands for lies
    within 2 r + sqrt(5 r^2 - r^2).
    Two departures that both factors share with the original repository: distances are those of random projections, and
    `approx_greedy_coreset` lets a patch count as no farther than its mean distance to ten random ones, which binds only
    banks that cover so little.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from patchcore.configs import PatchCoreConfig, PreprocessingConfig, RuntimeConfig, TrainingSource
from patchcore.detector import DetectorBuilder, ImageBatches, ImageShares
from patchcore.errors import DataError
from patchcore.memory.buffers import Buffers
from patchcore.memory.nearest_neighbours import build_nearest_neighbours
from patchcore.memory.points import Points
from patchcore.memory.sampler import GreedyCoresetSampler, num_selected
from patchcore.methods.patchcore import PatchCore
from patchcore.methods.training_features import TrainingFeatures, embed_images, training_features
from patchcore.runtime import progress, resolve_device
from patchcore.scoring.calibration import NUM_FOLDS, Calibration, MapStatistics, calibrate

R = TypeVar("R")

SHARE_OF_REACH = 0.25  # see above
FOLD_BANK = "memory bank of a calibration fold"
FEWER = "use --calibration none"


@dataclass(frozen=True)
class ModelOfShare:
    """What a process needs to see images as the model does.

    Attributes:
        config: That of the model.
        preprocessing: Resize and crop that the images have had.
        source: What it is trained on.
        runtime: How the processes compute.
    """

    config: PatchCoreConfig
    preprocessing: PreprocessingConfig
    source: TrainingSource
    runtime: RuntimeConfig

    def build(self) -> PatchCore:
        """Return the model, with nothing learned."""
        device = resolve_device(self.runtime.device, self.runtime.gpus, warn=False)
        model = _builder(self.config, self.preprocessing, self.runtime)(self.source, device)
        assert isinstance(model, PatchCore)
        return model


@functools.lru_cache(maxsize=1)  # a process gets one share after the other
def _builder(config: PatchCoreConfig, preprocessing: PreprocessingConfig, runtime: RuntimeConfig) -> DetectorBuilder:
    return PatchCore.prepare(config, preprocessing, runtime)


@dataclass(frozen=True)
class LocalCoreset:
    """First round: what a share keeps.

    Attributes:
        model: Sees the images.
        share: Number of the share.
        num_select: How many patches it keeps.
    """

    model: ModelOfShare
    share: int
    num_select: int

    def __call__(self, loader: ImageBatches) -> tuple[np.ndarray, np.ndarray]:
        """Return patch embeddings float32 [K, D] and their squared reaches [K], K = `num_select` or all there are.

        Above the budget of memory, by default 0, the embeddings of the share lie in files of its own machine.
        """
        model = self.model.build()
        buffers = Buffers(self.model.runtime.memory_budget_bytes or 0)
        images = embed_images(loader, [model], buffers, f"{model.source.category}: features of share {self.share}")
        features = training_features(images, model, model.random_numbers("coreset"))  # one projection for all shares
        numbers = model.random_numbers("share", self.share)
        return first_round(features, _greedy(model), self.num_select, numbers)


def first_round(
    features: TrainingFeatures, sampler: GreedyCoresetSampler, num_select: int, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return what a share keeps: embeddings float32 [K, D] and their squared reaches [K], K = `num_select` at most."""
    points = features.points
    chosen = sampler.select_number(points, min(num_select, len(points)), generator)
    return features.bank(chosen).cpu().numpy(), squared_reaches(points, chosen).numpy()


def second_round(
    points: Points,
    reaches: torch.Tensor,
    sampler: GreedyCoresetSampler,
    num_select: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the numbers [M] of the points [U] of all shares that make the bank, from their squared reaches [U]."""
    return sampler.select_number(points, min(num_select, len(points)), generator, SHARE_OF_REACH * reaches)


def squared_reaches(points: Points, chosen: torch.Tensor) -> torch.Tensor:
    """Return how far each chosen point reaches: to the farthest one that is nearer to no other.

    Args:
        points: [N, R], on the CPU.
        chosen: Numbers [K] of those that were chosen.

    Returns:
        Squared distances float32 [K].
    """
    reaches = torch.zeros(len(chosen))
    if len(chosen) < len(points):
        search = build_nearest_neighbours(False, None, points.device, "flat").fit(points[chosen])
        for rows in points.chunks(points.dim):
            distances, nearest = search.search(points[rows], 1)
            reaches.scatter_reduce_(0, nearest[:, 0], distances[:, 0], "amax")
    return reaches.square_()


@dataclass(frozen=True)
class ShareScores:
    """Scores of a share by a bank that has none of its patches.

    Attributes:
        model: Sees the images.
        bank: float32 [M, D].
    """

    model: ModelOfShare
    bank: np.ndarray

    def __call__(self, loader: ImageBatches) -> tuple[np.ndarray, MapStatistics]:
        """Return the scores [n] of the images, and what calibration needs of their maps."""
        bank = torch.from_numpy(self.bank.copy())  # what comes from another process may be read-only
        model = self.model.build().fit_bank(bank, FOLD_BANK, FEWER)
        scores: list[np.ndarray] = []

        def maps() -> Iterator[np.ndarray]:
            description = f"{model.source.category}: calibration"
            for batch in progress(loader, description, total=len(loader)):
                prediction = model.predict(batch["image"])
                assert prediction.maps is not None
                scores.append(prediction.scores)
                yield prediction.maps

        statistics = MapStatistics.of(maps())
        return np.concatenate(scores), statistics


class ShardedBank:
    """What the shares of the training images have kept, as the rows that banks are chosen from.

    It is held where the run is: rows of all shares together, whatever the number of images.

    Args:
        model: The model that learns; its sampler is a greedy one.
        shares: What reads the images.
        rows: float32 [U, D], what the shares have kept, one after the other.
        reaches: float32 [U], how far each of them reaches, squared.
        counts: How many rows are of each share.
        buffers: Where further arrays come from.
    """

    def __init__(
        self,
        model: PatchCore,
        shares: ImageShares,
        rows: torch.Tensor,
        reaches: torch.Tensor,
        counts: Sequence[int],
        buffers: Buffers,
    ) -> None:
        self._model = model
        self._shares = shares
        self._rows = rows
        self._reaches = reaches
        self._buffers = buffers
        self._share_of_row = torch.repeat_interleave(torch.tensor(counts))
        width = model.sampler.projection_dim(rows.shape[1])
        room = buffers.empty(len(rows), width) if width else None
        self._points = model.sampler.reduce(rows, model.random_numbers("coreset"), room)

    @classmethod
    def gathered(cls, model: PatchCore, shares: ImageShares, buffers: Buffers) -> ShardedBank:
        """Let every share choose what it keeps.

        Args:
            model: The model that learns.
            shares: What reads the images.
            buffers: Where arrays come from.

        Raises:
            DataError: Together the shares would keep fewer patches than the bank has, an image cannot be used, or a
                process was lost again and again.
        """
        num_patches = [len(images) * model.patches_per_image for images in shares.images]
        shards = model.config.sampler.shards
        assert shards is not None
        num_rows = num_selected(sum(num_patches), model.config.sampler.percentage)
        kept = [min(shards.coreset or num_rows, count) for count in num_patches]
        if sum(kept) < num_rows:
            raise DataError(
                f"--shard_coreset {shards.coreset} keeps {sum(kept)} patches of {len(kept)} shares, the memory bank of "
                f"{num_rows} needs as many: give at least {-(-num_rows // len(kept))}, or a smaller sampler -p"
            )
        rows = buffers.empty(sum(kept), model.embedder.dimension)
        reaches = torch.empty(sum(kept))
        places, reach_places = rows.split(kept), reaches.split(kept)  # views
        seen = model_of_share(model, shares)
        calls = ((share, LocalCoreset(seen, share, count)) for share, count in enumerate(kept))
        for share, (patches, squared) in _told(shares, calls, f"{model.source.category}: coresets of shares"):
            np.copyto(places[share].numpy(), patches)
            np.copyto(reach_places[share].numpy(), squared)
        return cls(model, shares, rows, reaches, kept, buffers)

    def bank(self) -> torch.Tensor:
        """Return the memory bank float32 [M, D] of all images: the second round."""
        return self._chosen(torch.arange(len(self._rows)), range(len(self._shares.images)), "selection")

    def _chosen(self, candidates: torch.Tensor, shares: Sequence[int], *purpose: str | int) -> torch.Tensor:
        """Return the bank [M, D] that some shares give, chosen from rows [U'] of theirs."""
        images = sum(len(self._shares.images[share]) for share in shares)
        wanted = num_selected(images * self._model.patches_per_image, self._model.config.sampler.percentage)
        points, reaches = self._points.subset(candidates), self._reaches[candidates]
        sampler, numbers = _greedy(self._model), self._model.random_numbers(*purpose)
        chosen = candidates[second_round(points, reaches, sampler, wanted, numbers)]
        return torch.index_select(self._rows, 0, chosen, out=self._buffers.empty(len(chosen), self._rows.shape[1]))

    def out_of_fold_calibration(self) -> Calibration:
        """Calibrate on the training images, each scored by a bank of the shares that it does not belong to.

        Shares are random parts of the images, so that they serve as folds: five groups of them, or each by itself
        where there are fewer. No image is embedded for a selection again. With fewer folds than five the banks know
        less than on one machine, which makes scores and threshold higher, on the safe side of false alarms.

        Raises:
            DataError: The bank of a fold has fewer patches than neighbours are asked for.
        """
        num_shares = len(self._shares.images)
        num_folds = min(NUM_FOLDS, num_shares)
        num_images = sum(map(len, self._shares.images))
        scores, maxima, means = (np.empty(num_images, dtype=np.float32) for _ in range(3))
        calls = self._scoring_calls(num_folds)
        for share, told in _told(self._shares, calls, f"{self._model.source.category}: calibration, shares"):
            images = self._shares.images[share].numpy()
            scores[images], maxima[images], means[images] = told[0], told[1].maxima, told[1].means
        return calibrate("kfold", num_folds, scores, MapStatistics(maxima, means))

    def _scoring_calls(self, num_folds: int) -> Iterator[tuple[int, ShareScores]]:
        """Yield what scores each share; the bank of a fold is chosen while those before it are at work."""
        seen = model_of_share(self._model, self._shares)
        numbers = range(len(self._shares.images))
        for fold in range(num_folds):
            others = [share for share in numbers if share % num_folds != fold]
            candidates = torch.nonzero(torch.isin(self._share_of_row, torch.tensor(others)))[:, 0]
            bank = self._chosen(candidates, others, "fold", fold).numpy()
            for share in numbers[fold::num_folds]:
                yield share, ShareScores(seen, bank)


def model_of_share(model: PatchCore, shares: ImageShares) -> ModelOfShare:
    """Return what processes need to see images as a model does."""
    return ModelOfShare(model.config, model.preprocessing, model.source, shares.runtime)


def _greedy(model: PatchCore) -> GreedyCoresetSampler:
    assert isinstance(model.sampler, GreedyCoresetSampler)  # the configuration of shards allows no other
    return model.sampler


def _told(
    shares: ImageShares, calls: Iterator[tuple[int, Callable[[ImageBatches], R]]], description: str
) -> Iterator[tuple[int, R]]:
    """Yield what the shares return, under a progress bar."""
    with progress(None, description, total=len(shares.images)) as bar:
        for answer in shares.map(calls):
            yield answer
            bar.update()

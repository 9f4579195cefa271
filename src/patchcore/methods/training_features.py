"""The patch embeddings of the training images, in memory or on disk as the budget says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from patchcore.detector import ImageBatches
from patchcore.errors import DataError
from patchcore.memory.buffers import Buffers
from patchcore.memory.points import Points
from patchcore.methods.patch_embedding import embed_batch
from patchcore.methods.staging import writes_from
from patchcore.runtime import progress

if TYPE_CHECKING:
    from patchcore.methods.patchcore import PatchCore, PatchEmbedder


@dataclass(frozen=True)
class TrainingFeatures:
    """What is computed once from the training images, for the memory bank and for calibration.

    Attributes:
        embeddings: float32 [N, P, D], P patches per image.
        points: [N * P, R], what the sampler selects from.
        buffers: Where further arrays of their size come from.
    """

    embeddings: torch.Tensor
    points: Points
    buffers: Buffers

    def patch_numbers(self, images: torch.Tensor) -> torch.Tensor:
        """Return the rows [n * P] of `points` that belong to images [n]."""
        num_patches = self.embeddings.shape[1]
        return (images[:, None] * num_patches + torch.arange(num_patches)).flatten()

    def bank(self, patches: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [M, D] of patches [M]; all of them in order are not copied."""
        flat = self.embeddings.flatten(0, 1)  # [N * P, D]
        if len(patches) == len(flat) and torch.equal(patches, torch.arange(len(flat))):
            return flat
        return torch.index_select(flat, 0, patches, out=self.buffers.empty(len(patches), flat.shape[1]))


@dataclass(frozen=True)
class EmbeddedImages:
    """Patch embeddings of all training images, for PatchCore models that share one backbone.

    Attributes:
        embeddings: float32 [N, P, D] on the CPU, of each embedder.
        projection: float32 [E], room for the projected points of one model at a time.
        buffers: Where further arrays of their size come from.
    """

    embeddings: dict[PatchEmbedder, torch.Tensor]
    projection: torch.Tensor
    buffers: Buffers


def embed_images(
    loader: ImageBatches, models: Sequence[PatchCore], buffers: Buffers, description: str
) -> EmbeddedImages:
    """Compute the patch embeddings of all images, once for all models that embed alike.

    Everything is claimed before the first image is read, the projection first: a sampler reads it again and again,
    the embeddings only a few times, so that it is the last thing to go to disk.

    Args:
        loader: Batches of images.
        models: They share one extractor, whose forward pass runs once.
        buffers: Where the arrays come from.
        description: What is going on, for the progress bar.

    Raises:
        DataError: There are no images, or the disk has no room for the arrays.
    """
    if loader.num_images == 0:
        raise DataError("no training images, expected at least one")
    projection = buffers.empty(max(loader.num_images * _projected_numbers(model) for model in models))
    embedders = dict.fromkeys(model.embedder for model in models)
    arrays = {e: buffers.empty(loader.num_images, _num_patches(e), e.dimension) for e in embedders}
    start = 0
    with writes_from(models[0].device) as write:
        for batch in progress(loader, description, total=len(loader)):
            end = start + len(batch["image"])
            parts = [array[start:end] for array in arrays.values()]
            write(parts, partial(embed_batch, batch["image"], list(arrays)))
            start = end
    return EmbeddedImages(arrays, projection, buffers)


def training_features(images: EmbeddedImages, model: PatchCore, generator: torch.Generator) -> TrainingFeatures:
    """Return what a model selects from: its embeddings, and their projection where its sampler needs one.

    Args:
        images: Embeddings; their room for a projection is used.
        model: One of those that they were computed for.
        generator: Source of the sampler's randomness, on the CPU.
    """
    embeddings = images.embeddings[model.embedder]
    room = images.projection[: len(embeddings) * _projected_numbers(model)]
    flat = embeddings.flatten(0, 1)  # [N * P, D]
    points = model.sampler.reduce(flat, generator, room.view(len(flat), -1) if len(room) else None)
    return TrainingFeatures(embeddings, points, images.buffers)


def _num_patches(embedder: PatchEmbedder) -> int:
    return embedder.grid[0] * embedder.grid[1]


def _projected_numbers(model: PatchCore) -> int:
    """Return how many numbers a model's sampler stores for the patches of one image."""
    return _num_patches(model.embedder) * model.sampler.projection_dim(model.embedder.dimension)

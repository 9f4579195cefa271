"""Batches of images to patch embeddings, on a CPU by all cores at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from patchcore.runtime import in_parts

if TYPE_CHECKING:
    from patchcore.methods.patchcore import PatchEmbedder


def embed_batch(
    images: torch.Tensor, embedders: Sequence[PatchEmbedder], buffers: Sequence[torch.Tensor] | None = None
) -> Sequence[torch.Tensor]:
    """Compute the patch embeddings of a batch.

    Args:
        images: uint8 [B, 3, S, S].
        embedders: They share one extractor, whose forward pass runs once.
        buffers: Where the embeddings go, float32 [B, P, D] for each embedder, on any device; None makes them where
            the embedders are.

    Returns:
        The buffers. Page-locked ones hold the embeddings once the GPU has come that far.
    """
    extractor = embedders[0].extractor
    device = extractor.mean.device
    if buffers is None:
        buffers = [torch.empty(len(images), e.grid[0] * e.grid[1], e.dimension, device=device) for e in embedders]

    def fill(part: torch.Tensor, *buffers_of_part: torch.Tensor) -> None:
        feature_maps = extractor(part)
        for embedder, buffer in zip(embedders, buffers_of_part, strict=True):
            buffer.copy_(embedder(feature_maps), non_blocking=device.type == "cuda")

    in_parts(fill, device, images, *buffers)
    return buffers

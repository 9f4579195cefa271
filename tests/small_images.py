"""Small random images in memory, for detectors."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from patchcore.configs import BackboneConfig, PreprocessingConfig

SIDE = 64
PREPROCESSING = PreprocessingConfig(SIDE, SIDE)
BACKBONE = BackboneConfig("efficientnet_lite0", ("blocks.1", "blocks.2"), weights="random")


class Batches:
    """Images in memory, in batches of three."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images
        self.num_images = len(images)

    def __len__(self) -> int:
        return -(-len(self.images) // 3)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for images in self.images.split(3):
            yield {"image": images}


def random_images(count: int, seed: int, side: int = SIDE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(90, 160, (count, 3, side, side), dtype=torch.uint8, generator=generator)

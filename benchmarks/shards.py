"""A bank that is chosen in shares beside that of one machine: how far it covers, and what it finds.

    python benchmarks/shards.py --data /path/to/mpdd --category metal_plate

prints a line for each number of shares, means over several seeds with the largest radius. The covering radius is the
distance of the training patch that lies farthest from the bank, in the projections that the selection sees. The rounds
are the functions of the tasks of `--launcher ray --shards N`.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from material import Material, Settings
from search import CPU, quality

from patchcore.errors import ConfigurationError, DataError
from patchcore.memory.buffers import Buffers
from patchcore.memory.nearest_neighbours import build_nearest_neighbours
from patchcore.memory.points import Points
from patchcore.memory.sampler import ApproximateGreedyCoresetSampler, num_selected
from patchcore.methods.sharded_bank import first_round, second_round
from patchcore.methods.training_features import TrainingFeatures
from patchcore.runtime import derive_seed, progress, set_threads

COUNTS = (2, 4, 8)
MAX_RADIUS = 1.15  # times that of one machine
MAX_AUROC_CHANGE = 0.005
HEADER = "| class | bank | shares | each keeps | radius, mean | largest | image AUROC | pixel AUROC | holds |"


@dataclass(frozen=True)
class Found:
    """How far a bank covers, and what it finds."""

    radius: float
    image_auroc: float
    pixel_auroc: float


class Selection:
    """The selections of one seed.

    Args:
        material: Images and embeddings.
        tests: Embeddings [N, P, D] of the test images.
        seed: The seed.
    """

    def __init__(self, material: Material, tests: torch.Tensor, seed: int) -> None:
        self.material = material
        self.tests = tests
        self.seed = seed
        self.sampler = ApproximateGreedyCoresetSampler(material.settings.percentage)
        self.rows = material.embeddings.flatten(0, 1)  # [N * P, D]

    @cached_property
    def points(self) -> Points:
        return self.sampler.reduce(self.rows, self._numbers("coreset"))

    @property
    def num_rows(self) -> int:
        """Return how many patches the bank has."""
        return num_selected(len(self.rows), self.material.settings.percentage)

    def _numbers(self, *purpose: str | int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, self.material.settings.category, *purpose))

    def alone(self) -> torch.Tensor:
        """Return the numbers [M] of the patches that one machine chooses."""
        return self.sampler.select_reduced(self.points, self._numbers("selection"))

    def shared(self, count: int, kept: int) -> torch.Tensor:
        """Return the numbers [M] of the patches that are chosen from what so many shares keep."""
        num_images, num_patches, _ = self.material.embeddings.shape
        order = torch.randperm(num_images, generator=self._numbers("shards"))
        candidates, reaches = [], []
        for share, images in enumerate(order.tensor_split(count)):
            numbers = (images.sort().values[:, None] * num_patches + torch.arange(num_patches)).flatten()
            # In place of its embedding, a patch is its number, so that the bank is known by numbers too.
            features = TrainingFeatures(numbers[:, None, None], self.points.subset(numbers), _Numbers())
            rows, squared = first_round(features, self.sampler, kept, self._numbers("share", share))
            candidates.append(torch.from_numpy(rows)[:, 0])
            reaches.append(torch.from_numpy(squared))
        union, squared_reaches = torch.cat(candidates), torch.cat(reaches)
        points = self.points.subset(union)
        return union[second_round(points, squared_reaches, self.sampler, self.num_rows, self._numbers("selection"))]

    def found(self, chosen: torch.Tensor) -> Found:
        """Measure a bank of these patches."""
        bank = build_nearest_neighbours(False, None, CPU, "flat").fit(self.rows[chosen])
        projected = build_nearest_neighbours(False, None, CPU, "flat").fit(self.points[chosen])
        parts = progress(self.points[:].split(4096), "radius")
        radius = max(float(projected.search(part, 1)[0].max()) for part in parts)
        result = quality(bank, self.tests, self.material)
        return Found(radius, result.image_auroc, result.pixel_auroc)


class _Numbers(Buffers):
    """Gives room for numbers of patches."""

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def lines(material: Material, counts: Sequence[int], kept: Sequence[float], num_seeds: int) -> list[str]:
    """Return the rows of the table: one machine, then each number of shares, which keep so many times the bank."""
    tests = material.embedded(material.test_images)
    selections = [Selection(material, tests, seed) for seed in range(num_seeds)]
    alone = [selection.found(selection.alone()) for selection in progress(selections, "one machine")]
    name, num_rows = material.settings.data_name, selections[0].num_rows
    rows = [
        f"| {name} | {num_rows:,} | one machine | | {mean([f.radius for f in alone]):.2f} "
        f"| {max(f.radius for f in alone):.2f} | {_with_range([f.image_auroc for f in alone])} "
        f"| {_with_range([f.pixel_auroc for f in alone])} | |"
    ]
    for factor in kept:
        for count in counts:
            coreset = math.ceil(factor * num_rows)
            shared = [s.found(s.shared(count, coreset)) for s in progress(selections, f"{count} shares")]
            ratios = [f.radius / one.radius for f, one in zip(shared, alone, strict=True)]
            image = mean([f.image_auroc - one.image_auroc for f, one in zip(shared, alone, strict=True)])
            pixel = mean([f.pixel_auroc - one.pixel_auroc for f, one in zip(shared, alone, strict=True)])
            holds = max(ratios) <= MAX_RADIUS and max(abs(image), abs(pixel)) <= MAX_AUROC_CHANGE
            rows.append(
                f"| {name} | {num_rows:,} | {count} | {coreset:,} | {mean(ratios):.3f}x | {max(ratios):.3f}x "
                f"| {image:+.4f} | {pixel:+.4f} | {'yes' if holds else '**no**'} |"
            )
    return rows


def _with_range(values: Sequence[float]) -> str:
    return f"{mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Folder of the data set, in the layout of MPDD.")
    parser.add_argument("--category", required=True, help="Class.")
    parser.add_argument("--percentage", type=float, default=0.1, help="Share of the patches in the memory bank.")
    parser.add_argument("--shards", type=int, nargs="+", default=COUNTS, help="Numbers of shares.")
    parser.add_argument("--kept", type=float, nargs="+", default=(1.0,), help="Patches of a share, times the bank's.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    settings = Settings(
        options.data, options.category, options.category, threads=options.threads, percentage=options.percentage
    )
    try:
        with tempfile.TemporaryDirectory(prefix="shards_") as folder:
            rows = lines(Material(settings, Path(folder)), options.shards, options.kept, options.seeds)
    except (ConfigurationError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{HEADER}\n|{'---|' * (HEADER.count('|') - 1)}")
    print("\n".join(rows))
    print(f"\nholds: radius <= {MAX_RADIUS}x with each seed, mean AUROC within {MAX_AUROC_CHANGE} of one machine")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A bank that is chosen in shares beside that of one machine: how far it covers, and what it finds.

    python benchmarks/shards.py --data /path/to/mpdd --category metal_plate

prints a line for each number of shares. The covering radius is the distance of the training patch that lies farthest
from the bank: in the projections that the selection sees, where the two-round scheme has its factor, and in the
embeddings themselves. The tasks are those of `--launcher ray --shards N`, one after the other in this process.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from material import SEED, Material, Settings
from search import CPU, Quality, quality

from patchcore.class_run import ClassTask
from patchcore.class_shares import Crew
from patchcore.configs import DatasetConfig, OutputConfig, ShardsConfig
from patchcore.datasets.inspection import DatasetSplit
from patchcore.detector import TrainingPlan
from patchcore.errors import ConfigurationError, DataError
from patchcore.launching import InThisProcess
from patchcore.memory.nearest_neighbours import build_nearest_neighbours
from patchcore.runtime import progress, set_threads

COUNTS = (2, 4, 8)
MAX_RADIUS = 1.15  # times that of one machine
MAX_AUROC_CHANGE = 0.005
HEADER = "| class | bank | shares | each keeps | radius: projections | embeddings | image AUROC | pixel AUROC | holds |"


def bank_in_shares(material: Material, shards: ShardsConfig) -> torch.Tensor:
    """Return the memory bank [M, D] that a run with so many shares has."""
    config = replace(material.config, sampler=replace(material.config.sampler, shards=shards))
    model = type(material.detector()).prepare(config, material.settings.preprocessing, material.runtime)
    detector = model(material.detector().source, CPU)
    train = material.dataset(DatasetSplit.TRAIN)
    settings = material.settings
    dataset = DatasetConfig("mpdd", str(settings.data), (settings.category,), num_workers=material.num_workers)
    (material.folder / "logs").mkdir(exist_ok=True)
    crew = Crew(InThisProcess(), material.runtime, shards.count)
    task = ClassTask(material.folder, dataset, OutputConfig(), CPU)
    detector.plan = TrainingPlan(shares=crew.shares(task, train, SEED, task.images_per_pass))
    detector.fit(material.loader(DatasetSplit.TRAIN))
    return detector.memory_bank_  # type: ignore[attr-defined]


def radius(rows: torch.Tensor, bank: torch.Tensor) -> float:
    """Return the distance of the row of [N, D] that lies farthest from a bank [M, D]."""
    search = build_nearest_neighbours(False, None, CPU, "flat").fit(bank)
    return max(float(search.search(part, 1)[0].max()) for part in progress(rows.split(4096), "radius"))


def radii(material: Material, bank: torch.Tensor) -> tuple[float, float]:
    """Return the covering radius of a bank [M, D], of projections and of embeddings."""
    rows = material.embeddings.flatten(0, 1)
    together = material.points(torch.cat([rows, bank])[None])  # one centre
    return radius(together[: len(rows)], together[len(rows) :]), radius(rows, bank)


def found(material: Material, bank: torch.Tensor, images: torch.Tensor) -> Quality:
    return quality(build_nearest_neighbours(False, None, CPU, "flat").fit(bank), images, material)


def lines(material: Material, counts: Sequence[int], kept: Sequence[float]) -> list[str]:
    """Return the rows of the table: one machine, then each number of shares, which keep so many times the bank."""
    images = material.embedded(material.test_images)
    bank = material.fitted.memory_bank_
    alone, alone_found = radii(material, bank), found(material, bank, images)
    name = material.settings.data_name
    rows = [
        f"| {name} | {len(bank):,} | one machine | | {alone[0]:.4f} | {alone[1]:.4f} | {alone_found.image_auroc:.4f} "
        f"| {alone_found.pixel_auroc:.4f} | |"
    ]
    for factor in kept:
        for count in counts:
            coreset = math.ceil(factor * len(bank))
            chosen = bank_in_shares(material, ShardsConfig(count, coreset))
            ratios = [shared / one for shared, one in zip(radii(material, chosen), alone, strict=True)]
            here = found(material, chosen, images)
            changes = (
                here.image_auroc - alone_found.image_auroc,
                here.pixel_auroc - alone_found.pixel_auroc,
            )
            holds = ratios[0] <= MAX_RADIUS and max(map(abs, changes)) <= MAX_AUROC_CHANGE
            rows.append(
                f"| {name} | {len(chosen):,} | {count} | {coreset:,} | {ratios[0]:.3f}x | {ratios[1]:.3f}x "
                f"| {changes[0]:+.4f} | {changes[1]:+.4f} | {'yes' if holds else '**no**'} |"
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Folder of the data set, in the layout of MPDD.")
    parser.add_argument("--category", required=True, help="Class.")
    parser.add_argument("--percentage", type=float, nargs="+", default=(0.1, 0.01), help="Share of the patches kept.")
    parser.add_argument("--shards", type=int, nargs="+", default=COUNTS, help="Numbers of shares.")
    parser.add_argument(
        "--kept", type=float, nargs="+", default=(1.0, 0.5), help="Patches that a share keeps, times the bank's."
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    settings = Settings(options.data, options.category, options.category, threads=options.threads)
    try:
        with tempfile.TemporaryDirectory(prefix="shards_") as folder:
            rows = []
            for percentage in options.percentage:
                material = Material(replace(settings, percentage=percentage), Path(folder))
                rows += lines(material, options.shards, options.kept)
    except (ConfigurationError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{HEADER}\n|{'---|' * (HEADER.count('|') - 1)}")
    print("\n".join(rows))
    print(f"\nholds: radius of projections <= {MAX_RADIUS}x, AUROC within {MAX_AUROC_CHANGE} of one machine")
    return 0


if __name__ == "__main__":
    sys.exit(main())

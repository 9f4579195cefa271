"""Nearest-neighbour search on real embeddings: speed beside faiss, and what each `--index` gains and costs.

    python benchmarks/search.py --data /path/to/mpdd --category metal_plate --percentage 0.1

prints a line for each index: recall@1 and AUROC against exact search, bytes, time. `rows` is for benchmarks/run.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path

import numpy as np
import torch
from flat_index import flat_index
from material import Material, Settings, alternating, timed
from results import Row

from patchcore.configs import INDEXES
from patchcore.errors import ConfigurationError, DataError
from patchcore.evaluation.metrics import image_metrics, pixel_metrics
from patchcore.memory.nearest_neighbours import build_nearest_neighbours
from patchcore.memory.search import NearestNeighbours
from patchcore.runtime import progress, set_threads
from patchcore.scoring.anomaly_map import anomaly_maps, image_scores

BANK_ROWS = 16_000
FLAT_TOLERANCE = 1e-4
MIN_RECALL = 0.99
MAX_AUROC_CHANGE = 0.001
GOALS = {"flat": 1.0, "projected": 2.5}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Quality:
    """How a search does on the test images.

    Attributes:
        distances: float32 [Q], of each test patch to its nearest row.
        rows: int64 [Q], that row.
        image_auroc: Of the highest distance in each image.
        pixel_auroc: Of the maps.
    """

    distances: torch.Tensor
    rows: torch.Tensor
    image_auroc: float
    pixel_auroc: float


def rows(material: Material) -> list[Row]:
    """Measure `flat` and `projected` beside faiss on one image's patches, with one and with three neighbours."""
    bank = coreset(material, min(BANK_ROWS, material.embeddings.flatten(0, 1).shape[0]))
    images = material.embedded(material.test_images)
    queries = images[int(material.labels.argmax())]  # of the first anomalous image
    reference = flat_index(bank.numpy(), material.settings.threads)
    searches = {name: build_nearest_neighbours(False, None, CPU, name).fit(bank) for name in GOALS}
    exact = quality(searches["flat"], images, material)
    found = {"flat": exact, "projected": quality(searches["projected"], images, material)}
    measured = []
    for k in (1, 3):
        work = {name: timed(lambda s=s, k=k: s.search(queries, k)) for name, s in searches.items()}
        work["faiss"] = timed(lambda k=k: reference.search(queries.numpy(), k))
        seconds = alternating(work, 3 * material.settings.rounds, f"search, k = {k}")
        squared, _ = reference.search(queries.numpy(), k)
        expected = torch.from_numpy(squared).sqrt()
        for name, search in searches.items():
            measured.append(_row(name, k, search, queries, expected, seconds, exact, found[name], bank))
    return measured


def coreset(material: Material, num_rows: int) -> torch.Tensor:
    """Return a memory bank [num_rows, D] of the training images, chosen as the toolkit does."""
    embeddings = material.embeddings.flatten(0, 1)
    sampler = type(material.detector().sampler)(num_rows / len(embeddings))
    return embeddings[sampler.select(embeddings, material.generator("coreset"))]


def quality(search: NearestNeighbours, images: torch.Tensor, material: Material) -> Quality:
    """Score the test images' embeddings [N, P, D] by one neighbour."""
    found = [search.search(patches, 1) for patches in progress(images, "test images")]
    distances = torch.stack([d for d, _ in found])[:, :, 0]  # [N, P]
    side = round(distances.shape[1] ** 0.5)
    patch_scores = distances.view(-1, side, side)
    maps = anomaly_maps(patch_scores, material.settings.preprocessing.imagesize_px).numpy()
    image = image_metrics(image_scores(patch_scores).numpy(), material.labels)
    pixel = pixel_metrics(maps, material.masks)
    assert image.auroc is not None and pixel.auroc is not None  # the test images show both kinds
    nearest = torch.stack([r for _, r in found]).flatten()
    return Quality(distances.flatten(), nearest, image.auroc, pixel.auroc)


def recall(found: Quality, exact: Quality) -> float:
    """Return the share of patches whose nearest row was found, or one as near."""
    same = (found.rows == exact.rows) | (found.distances == exact.distances)
    return float(same.float().mean())


def _row(
    name: str,
    k: int,
    search: NearestNeighbours,
    queries: torch.Tensor,
    expected: torch.Tensor,
    seconds: dict[str, float],
    exact: Quality,
    found: Quality,
    bank: torch.Tensor,
) -> Row:
    distances, nearest = search.search(queries, k)
    if name == "flat":
        difference = float(((distances - expected).abs() / expected.clamp(min=1e-6)).max())
        condition, holds = f"equal to {FLAT_TOLERANCE:g}", difference <= FLAT_TOLERANCE
        measured = f"largest relative difference {difference:.1e}"
    else:
        share = recall(found, exact)
        own = torch.linalg.vector_norm(queries.double()[:, None] - bank[nearest].double(), dim=2)
        error = float(((distances - own).abs() / own.clamp(min=1e-6)).max())
        change = max(
            abs(found.image_auroc - exact.image_auroc),
            abs(found.pixel_auroc - exact.pixel_auroc),
        )
        condition = (
            f"recall@1 >= {MIN_RECALL}, distances to the rows found exact to {FLAT_TOLERANCE:g}, AUROC within "
            f"{MAX_AUROC_CHANGE:g}"
        )
        holds = share >= MIN_RECALL and error <= FLAT_TOLERANCE and change <= MAX_AUROC_CHANGE
        measured = f"recall@1 {share:.4f}; distances to {error:.1e}; AUROC to {change:.1e}"
    return Row(
        f"search_{name}_k{k}",
        f"search `{name}`, {len(queries):,} x {len(bank):,} x {bank.shape[1]:,}, k = {k}",
        "ms",
        1000 * seconds[name],
        1000 * seconds["faiss"],
        "faiss flat",
        seconds["faiss"] / seconds[name],
        at_least=GOALS[name],
        condition=condition,
        measured=measured,
        holds=holds,
    )


def index_table(material: Material, indexes: Sequence[str] = INDEXES) -> str:
    """Return a Markdown table of what each index gains and costs, with the bank of the settings' percentage."""
    bank = coreset(material, max(1, int(material.settings.percentage * material.embeddings[:, :, 0].numel())))
    images = material.embedded(material.test_images)
    exact: Quality | None = None
    lines = [
        f"{material.settings.data_name}, bank {len(bank):,} x {bank.shape[1]:,}, {len(images)} test images",
        "",
        "| `--index` | recall@1 | image AUROC | pixel AUROC | model, MB | memory, MB | ms/image | learned in, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in indexes:
        search = build_nearest_neighbours(False, None, CPU, name)
        try:
            fit_seconds = timed(lambda search=search: search.fit(bank))()
        except DataError as error:
            lines.append(f"| `{name}` | {error} | | | | | | |")
            continue
        search_seconds = timed_searches(search, images)
        found = quality(search, images, material)
        exact = exact or found
        lines.append(
            f"| `{name}` | {recall(found, exact):.4f} | {found.image_auroc:.4f} "
            f"({found.image_auroc - exact.image_auroc:+.4f}) | {found.pixel_auroc:.4f} "
            f"({found.pixel_auroc - exact.pixel_auroc:+.4f}) | {model_bytes(search) / 1e6:.1f} "
            f"| {held_bytes(search) / 1e6:.1f} | {1000 * search_seconds:.0f} | {fit_seconds:.1f} |"
        )
    return "\n".join(lines)


def timed_searches(search: NearestNeighbours, images: torch.Tensor) -> float:
    """Return the median time of a search with the patches of one image, s."""
    runs = {str(i): timed(lambda patches=patches: search.search(patches, 1)) for i, patches in enumerate(images[:9])}
    return float(np.median(list(alternating(runs, 1, "time").values())))


def model_bytes(search: NearestNeighbours) -> int:
    """Return what a model folder holds of the bank."""
    return sum(t.nbytes for t in search.tensors().values())


def held_bytes(search: NearestNeighbours) -> int:
    """Return what a search holds in memory."""
    parts = [
        part for value in vars(search).values() for part in (vars(value).values() if is_dataclass(value) else [value])
    ]
    own = [part for part in parts if isinstance(part, torch.Tensor)]
    return sum(t.nbytes for t in own) if own else model_bytes(search) + 8 * search.num_rows_  # and where each row is


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Folder of the data set, in the layout of MPDD.")
    parser.add_argument("--category", required=True, help="Class.")
    parser.add_argument("--percentage", type=float, default=0.1, help="Share of the patches in the memory bank.")
    parser.add_argument("--threads", type=int, default=2, help="Of torch and faiss.")
    parser.add_argument("--index", nargs="+", choices=INDEXES, default=INDEXES, help="Which to measure.")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    settings = Settings(
        options.data, options.category, options.category, threads=options.threads, percentage=options.percentage
    )
    indexes = list(dict.fromkeys(["flat", *options.index]))  # the others are compared with it
    try:
        with tempfile.TemporaryDirectory() as folder:
            print(index_table(Material(settings, Path(folder)), indexes))
    except (ConfigurationError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a bank of very many patches costs when it is chosen in shares: a model of the cost, and a run that checks it.

    python benchmarks/scaling.py

measures both rounds of the selection on small sets of synthetic patches, fits how their time grows, says what a run on
ten million patches will take, and does that run: on a Ray cluster that it starts, with the tasks' own functions. Then
it prints what the model says of a hundred thousand and of a million images.

Synthetic patches lie near a space of few dimensions, as embeddings do; they are of 128 numbers, which is what a
selection from larger embeddings sees, and each task makes its own.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from patchcore.configs import LaunchConfig, RuntimeConfig
from patchcore.launching import Job, open_executor
from patchcore.memory.buffers import Buffers
from patchcore.memory.points import PROJECTION_DIM
from patchcore.memory.sampler import ApproximateGreedyCoresetSampler
from patchcore.methods.sharded_bank import first_round, second_round
from patchcore.methods.training_features import TrainingFeatures
from patchcore.runtime import derive_seed, peak_memory_megabytes, progress, reset_peak_memory, set_threads

LATENT_DIM = 16
NOISE = 0.1
CHUNK = 65536
FIT_POINTS = (40_000, 80_000, 160_000, 320_000)
FIT_PICKS = (1_000, 2_000, 4_000)
SAMPLER = ApproximateGreedyCoresetSampler(1.0)  # the number is given
EMBEDDING_BYTES = 4 * 1024
PATCHES = {224: 28 * 28, 1024: 128 * 128}  # of an image, on a grid of every eighth pixel


def generator(*purpose: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(0, "scaling", *purpose))


def synthetic(share: int, count: int, buffers: Buffers) -> torch.Tensor:
    """Return patches float32 [count, 128] of a share, in a file above the budget of memory."""
    basis = torch.randn(LATENT_DIM, PROJECTION_DIM, generator=generator("basis"))
    numbers = generator("share", share)
    rows = buffers.empty(count, PROJECTION_DIM)
    for part in rows.split(CHUNK):
        part.normal_(generator=numbers).mul_(NOISE)
        part.addmm_(torch.randn(len(part), LATENT_DIM, generator=numbers), basis)
    return rows


@dataclass(frozen=True)
class FirstRound:
    """What the task of a share does, and how long each part of it takes.

    Attributes:
        share: Number of the share.
        count: Its patches.
        num_select: How many of them it keeps.
    """

    share: int
    count: int
    num_select: int

    def __call__(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Return patches and reaches as `first_round`, and its time, s."""
        set_threads(1)
        buffers = Buffers(0)
        rows = synthetic(self.share, self.count, buffers)
        started = time.perf_counter()
        points = SAMPLER.reduce(rows, generator("projection"))
        kept = first_round(
            TrainingFeatures(rows[:, None], points, buffers), SAMPLER, self.num_select, generator("pick")
        )
        return *kept, time.perf_counter() - started


def timed_second_round(rows: torch.Tensor, reaches: torch.Tensor, num_select: int) -> tuple[torch.Tensor, float]:
    """Return the rows of the bank, and how long it took to choose them, s."""
    started = time.perf_counter()
    chosen = second_round(SAMPLER.reduce(rows, generator("projection")), reaches, SAMPLER, num_select, generator("end"))
    return rows[chosen], time.perf_counter() - started


@dataclass(frozen=True)
class PowerLaw:
    """seconds = scale x points^a x picks^b."""

    scale: float
    points: float
    picks: float

    @classmethod
    def fitted(cls, points: Sequence[int], picks: Sequence[int], seconds: Sequence[float]) -> PowerLaw:
        """Fit by least squares of the logarithms."""
        columns = np.stack([np.ones(len(points)), np.log(points), np.log(picks)], axis=1)
        constant, a, b = np.linalg.lstsq(columns, np.log(seconds), rcond=None)[0]
        return cls(float(np.exp(constant)), float(a), float(b))

    def __call__(self, points: float, picks: float) -> float:
        return float(self.scale * points**self.points * picks**self.picks)

    def __str__(self) -> str:
        return f"{self.scale:.2e} s x points^{self.points:.2f} x picks^{self.picks:.2f}"


def growth() -> tuple[PowerLaw, list[str]]:
    """Measure the first round on small shares, and return its law and a table."""
    cases = [(points, picks) for points in FIT_POINTS for picks in FIT_PICKS]
    seconds = [FirstRound(0, points, picks)()[2] for points, picks in progress(cases, "growth")]
    law = PowerLaw.fitted(*zip(*cases, strict=True), seconds)
    lines = ["| patches of a share | kept | measured, s | law, s |", "|---|---|---|---|"]
    lines += [
        f"| {points:,} | {picks:,} | {taken:.2f} | {law(points, picks):.2f} |"
        for (points, picks), taken in zip(cases, seconds, strict=True)
    ]
    return law, lines


def run(num_points: int, num_shards: int, num_select: int, folder: Path) -> dict[str, float]:
    """Choose a bank from synthetic patches in shares, on Ray, and return what it took."""
    (folder / "logs").mkdir()
    sizes = [len(part) for part in np.array_split(np.empty(num_points, np.int8), num_shards)]
    jobs = (
        Job(share, f"share {share}", folder / "logs" / f"{share}.log", FirstRound(share, size, num_select))
        for share, size in enumerate(sizes)
    )
    rows = torch.empty(num_shards * num_select, PROJECTION_DIM)
    reaches = torch.empty(len(rows))
    found: dict[str, float] = {"task_seconds": 0.0}
    runtime = RuntimeConfig("cpu", threads=1)
    with open_executor(LaunchConfig("ray", cpus_per_task=1), runtime) as cluster:
        cluster.settle(runtime)
        reset_peak_memory()
        before = peak_memory_megabytes()
        started = time.perf_counter()
        with progress(None, "shares", total=num_shards) as bar:
            for ended in cluster.run(jobs):
                patches, squared, seconds = ended.value
                place = slice(ended.key * num_select, (ended.key + 1) * num_select)
                np.copyto(rows[place].numpy(), patches)
                np.copyto(reaches[place].numpy(), squared)
                found["task_seconds"] += seconds
                bar.update()
        found["first_round_seconds"] = time.perf_counter() - started
    set_threads(os.cpu_count() or 1)
    _, found["second_round_seconds"] = timed_second_round(rows, reaches, num_select)
    found["run_megabytes"] = peak_memory_megabytes() - before
    found["rows_megabytes"] = rows.nbytes / 1e6
    return found


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB" if count < 1e10 else f"{count / 1e9:,.0f} GB"


def duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def forecast(law: PowerLaw, ms_per_image: float) -> list[str]:
    """Return the table of what the model says of large sets."""
    lines = [
        "| images | px | patches | shares | bank | features, one core | first round, one core | second round "
        "| files of a share | rows held by the run | sent |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for images, side, shards, bank in (
        (100_000, 224, 16, 16_384),
        (1_000_000, 224, 128, 16_384),
        (100_000, 1024, 128, 16_384),
        (1_000_000, 1024, 1024, 16_384),
    ):
        patches = images * PATCHES[side]
        share = patches / shards
        held = shards * bank * (EMBEDDING_BYTES + 4 * PROJECTION_DIM)
        lines.append(
            f"| {images:,} | {side} | {patches:.1e} | {shards:,} | {bank:,} "
            f"| {duration(images * ms_per_image / 1000 * (side / 224) ** 2)} | {duration(shards * law(share, bank))} "
            f"| {duration(law(shards * bank, bank))} "
            f"| {megabytes(share * (EMBEDDING_BYTES + 4 * PROJECTION_DIM))} | {megabytes(held)} "
            f"| {megabytes(shards * bank * EMBEDDING_BYTES)} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=10_000_000, help="synthetic patches of the run")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--picks", type=int, default=10_000, help="patches in the bank, and kept by each share")
    parser.add_argument(
        "--ms_per_image", type=float, default=50.0, help="of one core to read, resize and embed at 224 px"
    )
    options = parser.parse_args()
    law, lines = growth()
    print("\n".join(lines), f"\nfirst round: {law}", sep="\n", flush=True)
    expected = options.shards * law(options.points / options.shards, options.picks)
    second = law(options.shards * options.picks, options.picks)
    with tempfile.TemporaryDirectory(prefix="scaling_") as folder:
        found = run(options.points, options.shards, options.picks, Path(folder))
    print(
        f"\n{options.points:,} patches x {PROJECTION_DIM}, {options.shards} shares, {options.picks:,} kept by each\n\n"
        "| | model | measured |\n|---|---|---|\n"
        f"| first round, time of all tasks on one core each | {expected:.0f} s | {found['task_seconds']:.0f} s |\n"
        f"| first round, until the last share was there | | {found['first_round_seconds']:.0f} s |\n"
        f"| second round | {second:.1f} s on one core | {found['second_round_seconds']:.1f} s |\n"
        f"| memory that the run adds | {found['rows_megabytes']:.0f} MB of rows | {found['run_megabytes']:.0f} MB |\n"
    )
    print("\n".join(forecast(law, options.ms_per_image)))


if __name__ == "__main__":
    main()

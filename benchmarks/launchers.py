"""What a task costs beyond its own work: workers and Ray against the sequential run, at equal threads per task.

Each launcher trains and evaluates PatchCore once with one seed and once with nine, by the command as a user types it.
The difference is what eight further tasks take; start-up, which is the same in both, is stated by itself. One task runs
at a time with all threads, so that launchers are compared, not numbers of cores; a last row has a task on each core.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from patchcore.configs import DemoConfig
from patchcore.datasets.demo import render_demo_dataset
from patchcore.runtime import available_cpus, progress

REPOSITORY = Path(__file__).parents[1]
FURTHER_TASKS = 8
GOAL = 0.10
CATEGORY = "metal_plate"
HEADER = "| launcher | 1 task | 9 tasks | each further task | overhead | goal |"


@dataclass(frozen=True)
class Launch:
    """A way to run tasks.

    Attributes:
        name: In the table.
        options: Of the command.
        threads: Of each task.
        at_once: Tasks that run at the same time.
    """

    name: str
    options: tuple[str, ...]
    threads: int
    at_once: int = 1


@dataclass(frozen=True)
class Times:
    """Medians of whole commands, s."""

    one: float
    all: float

    @property
    def further(self) -> float:
        """Return what a further task takes, s."""
        return (self.all - self.one) / FURTHER_TASKS


def launches(threads: int) -> list[Launch]:
    """Return what is compared, each after the sequential run of as many threads."""
    cores = available_cpus()
    return [
        Launch("sequential", (), threads),
        # A task that takes all cores is alone.
        Launch("Ray, one task at a time", ("--launcher", "ray", "--cpus_per_task", str(cores)), threads),
        Launch("sequential, 1 thread", (), 1),
        Launch(f"local, {cores} workers", ("--workers", str(cores)), 1, cores),
        Launch(f"Ray, {cores} tasks at once", ("--launcher", "ray", "--cpus_per_task", "1"), 1, cores),
    ]


def command(launch: Launch, data: Path, category: str, out: Path, num_seeds: int) -> list[str]:
    """Return a command that does so many tasks."""
    seeds = [part for seed in range(num_seeds) for part in ("--seed", str(seed))]
    return [
        *(sys.executable, str(REPOSITORY / "bin" / "run_patchcore.py"), str(out)),
        *("--device", "cpu", "--threads", str(launch.threads), *launch.options, *seeds),
        *("patch_core", "-b", "efficientnet_lite0", "-le", "blocks.2", "-le", "blocks.4"),
        *("--anomaly_scorer_num_nn", "1", "sampler", "-p", "0.1", "approx_greedy_coreset"),
        *("dataset", "-d", category, "mpdd", str(data)),
    ]


def measure(launch: Launch, data: Path, category: str, repeats: int) -> Times:
    """Time the commands by turns."""
    seconds: dict[int, list[float]] = {1: [], 1 + FURTHER_TASKS: []}
    for _ in range(repeats):
        for num_seeds, taken in progress(seconds.items(), launch.name):
            with tempfile.TemporaryDirectory(prefix="launchers_") as out:
                started = time.perf_counter()
                subprocess.run(
                    command(launch, data, category, Path(out), num_seeds),
                    check=True,
                    capture_output=True,
                    env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
                )
                taken.append(time.perf_counter() - started)
    one, every = (statistics.median(taken) for taken in seconds.values())
    return Times(one, every)


def overhead(launch: Launch, times: Times, sequential: Times) -> float:
    """Return what a further task takes beyond its share of the sequential run, as a part of that."""
    return times.further * launch.at_once / sequential.further - 1


def rows(measured: Sequence[tuple[Launch, Times]]) -> list[str]:
    """Return the rows of the table; each launcher is compared with the sequential run of as many threads."""
    lines = []
    baseline: dict[int, Times] = {}
    for launch, times in measured:
        cells = [launch.name, f"{times.one:.1f} s", f"{times.all:.1f} s", f"{times.further:.2f} s", "", ""]
        if not launch.options:
            baseline[launch.threads] = times
        else:
            share = overhead(launch, times, baseline[launch.threads])
            cells[4:] = [f"{share:+.1%}", "" if launch.at_once > 1 else f"<= {GOAL:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder in the layout of MPDD; the demo set is rendered if left out")
    parser.add_argument("--category", default=CATEGORY)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=available_cpus(), help="of a task that runs by itself")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="launchers_data_") as rendered:
        if options.data is None:
            render_demo_dataset(Path(rendered), DemoConfig(categories=(options.category,)))
        data = options.data or Path(rendered)
        ways = progress(launches(options.threads), "launchers")
        measured = [(launch, measure(launch, data, options.category, options.repeats)) for launch in ways]
    print(f"{HEADER}\n|{'---|' * HEADER.count(' | ')}---|")
    print("\n".join(rows(measured)))


if __name__ == "__main__":
    main()

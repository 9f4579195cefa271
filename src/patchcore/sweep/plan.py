"""What is left to do of the runs of a sweep, and how long that may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from patchcore.configs.typed import TypedRun
from patchcore.datasets.inspection import resolve_categories
from patchcore.datasets.registry import dataset_class
from patchcore.errors import ConfigurationError
from patchcore.evaluation.report import text_table
from patchcore.pipeline import possible_outputs, require_same_runs, seed_folder_name
from patchcore.resuming import Earlier, finished_classes
from patchcore.storage import run_folder
from patchcore.storage.run_folder import ClassResult


@dataclass(frozen=True)
class PlannedRun:
    """A variant of a sweep with what earlier calls have left of it.

    Attributes:
        name: Name of the variant.
        typed: Its command.
        categories: Its classes.
        folders: Run folder of each seed.
        earlier: What is there already, of each seed.
    """

    name: str
    typed: TypedRun
    categories: tuple[str, ...]
    folders: dict[int, Path]
    earlier: dict[int, Earlier]

    @property
    def missing(self) -> list[tuple[int, str]]:
        """Seed and class of each task that is to be done."""
        return [
            (seed, category)
            for seed, earlier in self.earlier.items()
            for category in self.categories
            if not isinstance(earlier.get(category), ClassResult)
        ]

    @property
    def num_finished(self) -> int:
        return len(self.folders) * len(self.categories) - len(self.missing)

    def seconds_left(self) -> float | None:
        """Estimate the time of the missing tasks from the finished ones, one after the other.

        A class takes what it took with other seeds, or what the finished classes took on average.

        Returns:
            Seconds, or None where no class of the variant is finished.
        """
        taken: dict[str, list[float]] = {}
        for earlier in self.earlier.values():
            for category, result in earlier.items():
                if isinstance(result, ClassResult):
                    taken.setdefault(category, []).append(seconds_of(result.timings))
        if not self.missing:
            return 0.0
        if not taken:
            return None
        usual = fmean(fmean(seconds) for seconds in taken.values())
        return sum(fmean(taken[category]) if category in taken else usual for _, category in self.missing)


def seconds_of(timings: Mapping[str, float | None]) -> float:
    """Return how long training, calibration and scoring of a class took by its record, s; metrics are not counted."""
    images, rate = timings.get("test_images"), timings.get("images_per_second")
    scoring = images / rate if images and rate else 0.0
    return (timings.get("train_seconds") or 0.0) + (timings.get("calibration_seconds") or 0.0) + scoring


def plan_run(name: str, typed: TypedRun) -> PlannedRun:
    """Look what is there of a variant.

    Raises:
        ConfigurationError: The data set or one of its classes is not there, or a run folder holds another run.
    """
    dataset, run = typed.dataset, typed.run
    categories = tuple(resolve_categories(dataset, dataset_class(dataset.name).categories))
    parent = Path(run.results_path) / run.log_project
    folders = {seed: parent / seed_folder_name(run, seed) for seed in run.seeds}
    try:
        require_same_runs(typed.method, typed.config_of, run, replace(dataset, categories=categories), folders)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"variant {name}: {error} (of a sweep: another --out, or another name of the variant)"
        ) from error
    rows = {category: run_folder.row_name(dataset.name, category) for category in categories}
    outputs = possible_outputs(typed.method, run.outputs)
    earlier = {seed: finished_classes(folder, rows, outputs) for seed, folder in folders.items()}
    return PlannedRun(name, typed, categories, folders, earlier)


def plan_table(planned: Sequence[PlannedRun]) -> str:
    """Return the plan as lines: per variant and in all, what is finished, what is left, and for how long."""
    rows = []
    for run in planned:
        rows.append([run.name, str(run.num_finished), str(len(run.missing)), _duration(run.seconds_left())])
    known = [seconds for seconds in (run.seconds_left() for run in planned) if seconds is not None]
    total = _duration(sum(known))
    if len(known) < len(planned):
        total = f"> {total}" if known else "?"
    rows.append(
        ["all", str(sum(run.num_finished for run in planned)), str(sum(len(run.missing) for run in planned)), total]
    )
    return text_table(("variant", "finished", "to do", "one after the other"), rows)


def _duration(seconds: float | None) -> str:
    """Return a time as h:mm:ss, "?" where nothing is known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"

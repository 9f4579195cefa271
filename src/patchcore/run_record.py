"""The tables of one run folder, kept up to date while its classes end in whatever order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from patchcore.class_jobs import RUN_LOG
from patchcore.class_run import ClassTask
from patchcore.evaluation.report import false_alarm_report, text_table
from patchcore.resuming import Earlier, remove_checkpoint
from patchcore.runtime import log_to_file
from patchcore.storage import run_folder
from patchcore.storage.run_folder import ClassResult
from patchcore.tracking import Tracker

LOGGER = logging.getLogger(__name__)

TABLE_COLUMNS = ("instance_auroc", "full_pixel_auroc", "full_pro", "image_f1_max", "precision", "recall")

Announce = Callable[[str], None]


class RunRecord:
    """What is known of the classes of one run folder; only this writes its tables.

    Everything that is logged meanwhile goes to run.log. The tables are written after each class, so that an
    interrupted run keeps what it has.

    Args:
        task: The run.
        earlier: What an earlier call left, for --skip_existing.
        tracker: Opens what gets the numbers of each class.
        environment: What the run is made on, for the log.
        announce: Receives the lines meant for the user.

    Attributes:
        left: The classes that are to be done.
    """

    def __init__(
        self,
        task: ClassTask,
        earlier: Earlier,
        tracker: AbstractContextManager[Tracker],
        environment: Mapping[str, Any],
        announce: Announce,
    ) -> None:
        self.task = task
        self.left = [c for c in task.dataset.categories if earlier.get(c) is None]
        self._announce = announce
        self._row_names = {category: task.row_name(category) for category in task.dataset.categories}
        self._outcomes: dict[str, ClassResult | str] = {}
        self._missing = set(self.left)
        self._stack = ExitStack()
        self._is_finished = False
        announce(f"results: {task.folder}")
        with self._logged():
            LOGGER.debug("%s", environment)
            self._tracker = self._stack.enter_context(tracker)
            self._take_over(earlier)

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._is_finished:
            with self._logged():
                self._stack.__exit__(kind, error, traceback)

    def _logged(self) -> AbstractContextManager[None]:
        return log_to_file(self.task.folder / RUN_LOG)

    def _take_over(self, earlier: Earlier) -> None:
        """Enter what an earlier call has finished."""
        if earlier:  # an interruption must not take finished classes out of the tables
            for category in self._row_names:
                self._outcomes[category] = earlier.get(category) or "not done yet"
            self._write_tables()
        for category, known in earlier.items():
            if known is None:
                LOGGER.warning("%s: finished before, but files of it are gone: done anew", category)
            elif isinstance(known, ClassResult):
                LOGGER.info("%s: finished before, skipped", category)
                remove_checkpoint(self.task.checkpoint(category))  # which a kill right after the record has left
                self._track(category, known)
            else:
                LOGGER.error("%s failed: %s", category, known)

    def add(self, category: str, outcome: ClassResult | str, messages: Sequence[tuple[int, str]] = ()) -> bool:
        """Enter the result of a class, or why it failed.

        Args:
            category: The class.
            outcome: The result or the reason.
            messages: What its worker had to tell: level and text of each.

        Returns:
            Whether it was the last.
        """
        with self._logged():
            for level, message in messages:
                LOGGER.log(level, "%s", message)
            self._outcomes[category] = outcome
            self._write_tables()
            if isinstance(outcome, ClassResult):
                self._track(category, outcome)
        self._missing.discard(category)
        return not self._missing

    def _track(self, category: str, result: ClassResult) -> None:
        self._tracker.log_class(list(self._row_names).index(category), result)

    def _write_tables(self) -> None:
        known = {name: self._outcomes[c] for c, name in self._row_names.items() if c in self._outcomes}
        run_folder.write_tables(self.task.folder, known)

    @property
    def results(self) -> list[ClassResult]:
        """The finished classes, in the order of the tables."""
        outcomes = [self._outcomes.get(category) for category in self._row_names]
        return [outcome for outcome in outcomes if isinstance(outcome, ClassResult)]

    @property
    def failures(self) -> dict[str, str]:
        """Why each failed class did, by row name."""
        outcomes = {name: self._outcomes.get(category) for category, name in self._row_names.items()}
        return {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, str)}

    def finish(self) -> None:
        """Close the trackers, and print the table, where the pictures are, what failed, and the run folder last."""
        with self._logged():
            self._tracker.log_mean(run_folder.mean_metrics(self.results))
            self._is_finished = True
            self._stack.close()
        self._announce_results()

    def _announce_results(self) -> None:
        folder, outputs, results, announce = self.task.folder, self.task.outputs, self.results, self._announce
        rows = [(r.row_name, r.metrics) for r in results]
        if len(results) > 1:
            rows.append((run_folder.MEAN_ROW, run_folder.mean_metrics(results)))
        cells = [[name, *(_short(m[c]) for c in TABLE_COLUMNS)] for name, m in rows]
        if results:
            announce(text_table((run_folder.ROW_NAMES, *TABLE_COLUMNS), cells))
        alarms = {r.row_name: r.false_alarms for r in results if r.false_alarms}
        if alarms:
            announce(false_alarm_report(run_folder.ROW_NAMES, alarms))
        if outputs.models and results:
            announce(f"models: {folder / 'models'}")
        if outputs.segmentation_images and results:
            announce(f"pictures: {folder / 'segmentation_images'}")
        for name, why in self.failures.items():
            announce(f"failed: {name}: {why}")
        announce(f"results: {folder}")


def write_seed_table(path: Path, finished: Sequence[Sequence[ClassResult]], announce: Announce) -> None:
    """Write mean and standard deviation over seeds beside the run folders, and print them."""
    statistics = run_folder.seed_statistics(finished)
    run_folder.write_seed_table(path, statistics)
    cells = [[s.row_name, *(_short_with_std(*s.columns[c]) for c in TABLE_COLUMNS)] for s in statistics]
    announce(text_table((run_folder.ROW_NAMES, *TABLE_COLUMNS), cells))
    announce(f"mean and standard deviation over {len(finished)} seeds: {path}")


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _short_with_std(mean: float | None, std: float | None) -> str:
    return _short(mean) if std is None else f"{_short(mean)} ± {std:.4f}"

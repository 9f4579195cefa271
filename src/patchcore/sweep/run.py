"""Do what is missing of a sweep, and compare all of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from patchcore.comparison.compare import ComparisonOptions, compare_results
from patchcore.configs.typed import TypedRun
from patchcore.errors import ConfigurationError
from patchcore.pipeline import train_and_evaluate
from patchcore.sweep.definition import ComparisonChoice
from patchcore.sweep.plan import PlannedRun, plan_run, plan_table

LOGGER = logging.getLogger(__name__)

COMPARISON_FOLDER = "comparison"


def run_sweep(
    runs: Sequence[tuple[str, TypedRun]],
    out: Path,
    comparison: ComparisonChoice,
    is_dry: bool,
    announce: Callable[[str], None],
) -> bool:
    """Do the runs of a sweep that are missing, one after the other, and compare all of them.

    Args:
        runs: Name and command of each variant.
        out: Folder of the run folders; the comparison goes to a folder in it.
        comparison: How the runs are compared.
        is_dry: Only print what would be done.
        announce: Receives the lines meant for the user.

    Returns:
        Whether everything is finished and compared.

    Raises:
        ConfigurationError: The data are not there, or a run folder holds another run; nothing has been written then.
    """
    planned = [plan_run(name, typed) for name, typed in runs]
    announce(plan_table(planned))
    if is_dry:
        return True
    complete = True
    for number, run in enumerate(planned, start=1):
        if run.missing:
            LOGGER.info("variant %s (%d of %d)", run.name, number, len(planned))
            complete = _do(run, announce) and complete
    folders = [folder for run in planned for folder in run.folders.values() if (folder / "results.csv").is_file()]
    if not folders:
        raise ConfigurationError("no run of the sweep has left a table to compare: see the errors above")
    return (
        compare_results(folders, out / COMPARISON_FOLDER, ComparisonOptions(**asdict(comparison)), announce)
        and complete
    )


def _do(run: PlannedRun, announce: Callable[[str], None]) -> bool:
    """Do what is missing of a variant; what is wrong with it alone loses no other."""
    typed = run.typed
    try:
        return train_and_evaluate(typed.method, typed.config_of, typed.run, typed.dataset, announce)
    except ConfigurationError as error:
        LOGGER.error("variant %s: %s", run.name, error)
        return False

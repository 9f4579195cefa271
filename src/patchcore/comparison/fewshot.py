"""Tables and curve over runs that differ in the number of training images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from patchcore.comparison.folders import StoredConfig, no_run_folder, read_stored_config
from patchcore.errors import ConfigurationError, DataError
from patchcore.evaluation.fewshot import (
    FEWSHOT_METRICS,
    FewShotPoint,
    Observation,
    fewshot_points,
    images_text,
    markdown_tables,
    point_rows,
)
from patchcore.evaluation.plots.curves import fewshot_picture
from patchcore.evaluation.plots.pictures import png_bytes
from patchcore.evaluation.report import text_table
from patchcore.storage import run_folder
from patchcore.storage.files import write_bytes, write_csv
from patchcore.storage.run_folder import MEAN_ROW, format_number

LOGGER = logging.getLogger(__name__)

MAY_DIFFER = ("seed", "outputs", "dataset.limit_train")


def fewshot_curve(folders: Sequence[Path], out: Path, announce: Callable[[str], None]) -> bool:
    """Write table and curve of runs that differ in `--limit_train` and `--seed` alone.

    `fewshot.csv`, `fewshot.md` and `fewshot_curve.png` in `out` are replaced if they exist: they can be made again.

    Args:
        folders: Run folders of `run_patchcore`.
        out: Where the three files go.
        announce: Receives the table and the path, meant for the user.

    Returns:
        Whether every class of every run was there; classes that are not are named and left out.

    Raises:
        ConfigurationError: A folder holds no run, the runs cannot be compared, or `out` is no place for files; nothing
            has been written then.
    """
    if not folders:
        raise ConfigurationError("no run folder is named, expected at least one")
    runs = [_read_trained(folder) for folder in folders]
    _require_comparable(runs)
    run_folder.require_output_folder(out)
    observations = [o for run in runs for o in _observations(run)]
    if not observations:
        raise ConfigurationError("no class is finished in any of the run folders: let at least one run end")
    points = fewshot_points(observations, MEAN_ROW)
    _write(points, out)
    announce(text_table(*point_rows(points)))
    announce(f"few-shot table and curve: {out}")
    return len(observations) == sum(len(run.row_names) for run in runs)


def _read_trained(folder: Path) -> StoredConfig:
    stored = read_stored_config(folder)
    if stored.seed is None:
        raise no_run_folder(folder, "it holds evaluations of stored models, expected a training run")
    return stored


def _require_comparable(runs: Sequence[StoredConfig]) -> None:
    """Raise ConfigurationError if runs differ in more than limit and seed, or in neither."""
    first = runs[0]
    taken: dict[tuple[int | None, int | None], Path] = {}
    for run in runs:
        differences = [
            f"{name} is {there!r} there and {here!r} here"
            for name, there, here in run_folder.differences(first.config, run.config)
            if not any(name == free or name.startswith(f"{free}.") for free in MAY_DIFFER)
        ]
        if differences:
            raise ConfigurationError(
                f"{str(first.folder)!r} and {str(run.folder)!r} differ in more than --limit_train and --seed "
                f"({'; '.join(differences)}): name runs of one configuration"
            )
        key = (run.limit_train, run.seed)
        if key in taken:
            raise ConfigurationError(
                f"{str(taken[key])!r} and {str(run.folder)!r} are both of --limit_train "
                f"{'(all)' if run.limit_train is None else run.limit_train} and --seed {run.seed}: name one of them"
            )
        taken[key] = run.folder


def _observations(run: StoredConfig) -> Iterator[Observation]:
    """Yield the finished classes of a run, and warn of the others."""
    for row_name in run.row_names.values():
        try:
            result = run_folder.load_class_result(run.folder, row_name)
        except DataError as error:
            LOGGER.warning("%s of %s is left out: %s", row_name, run.folder, error)
            continue
        if result is None or result.timings["train_images"] is None:
            LOGGER.warning("%s of %s is left out: not finished (failures.csv may say why)", row_name, run.folder)
            continue
        num_images = result.timings["train_images"]
        metrics = {metric: result.metrics[metric] for metric in FEWSHOT_METRICS}
        yield Observation(row_name, run.limit_train, int(num_images), run.seed, metrics)


def _write(points: Sequence[FewShotPoint], out: Path) -> None:
    picture = png_bytes(fewshot_picture(points, MEAN_ROW))  # first: what fails here has replaced no file
    tables = markdown_tables(points).encode("utf-8", "surrogateescape")
    header = ["class", "num_images", "num_seeds", *(f"{m}_{s}" for m in FEWSHOT_METRICS for s in ("mean", "std"))]
    rows = []
    for p in points:
        cells = [format_number(v) for m in FEWSHOT_METRICS for v in (p.means[m], p.stds[m])]
        rows.append([p.row_name, images_text(p.num_images), str(p.num_seeds), *cells])
    write_csv(out / "fewshot.csv", header, rows)
    write_bytes(out / "fewshot.md", tables)
    write_bytes(out / "fewshot_curve.png", picture)

"""Tables and curve over runs that differ in the number of training images."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchcore.comparison.folders import are_distinct_strings, is_integer, why_no_run
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

MAX_IMAGES = 2**31  # more than a data set has, and far from where the arithmetic of the curve overflows
ROUNDING = 1e-9  # an area that is 1 may have been summed up to a little more
MAY_DIFFER = ("seed", "outputs", "dataset.limit_train")


@dataclass(frozen=True)
class _Run:
    """What config.json says of one run.

    Attributes:
        folder: The run folder.
        settings: Its whole configuration.
        row_names: Its classes.
        limit: Number of training images that was asked for; None asks for all.
        seed: Its seed.
    """

    folder: Path
    settings: dict[str, Any]
    row_names: tuple[str, ...]
    limit: int | None
    seed: int


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
    runs = [_read_run(folder) for folder in folders]
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


def _read_run(folder: Path) -> _Run:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["config"]
        dataset = config["dataset"]
        name, categories, limit = dataset["name"], dataset["categories"], dataset["limit_train"]
        seed = config["seed"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{str(folder)!r} is no folder of a training run ({why_no_run(folder, error)}): name folders that "
            "run_patchcore has written"
        ) from error
    if not is_integer(seed) or not (limit is None or (is_integer(limit) and limit >= 1)):
        raise ConfigurationError(
            f"{path}: seed {seed!r} and limit_train {limit!r}, expected integers, limit_train >= 1"
        )
    if not are_distinct_strings(categories):
        raise ConfigurationError(f"{path}: categories {categories!r}, expected a list of names, each once")
    return _Run(folder, config, tuple(f"{name}_{category}" for category in categories), limit, seed)


def _require_comparable(runs: Sequence[_Run]) -> None:
    """Raise ConfigurationError if runs differ in more than limit and seed, or in neither."""
    first = runs[0]
    taken: dict[tuple[int | None, int], Path] = {}
    for run in runs:
        differences = [
            f"{name} is {there!r} there and {here!r} here"
            for name, there, here in run_folder.differences(first.settings, run.settings)
            if not any(name == free or name.startswith(f"{free}.") for free in MAY_DIFFER)
        ]
        if differences:
            raise ConfigurationError(
                f"{str(first.folder)!r} and {str(run.folder)!r} differ in more than --limit_train and --seed "
                f"({'; '.join(differences)}): name runs of one configuration"
            )
        key = (run.limit, run.seed)
        if key in taken:
            raise ConfigurationError(
                f"{str(taken[key])!r} and {str(run.folder)!r} are both of --limit_train "
                f"{'(all)' if run.limit is None else run.limit} and --seed {run.seed}: name one of them"
            )
        taken[key] = run.folder


def _observations(run: _Run) -> Iterator[Observation]:
    """Yield the finished classes of a run, and warn of the others."""
    for row_name in run.row_names:
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
        impossible = _impossible_values(num_images, metrics)
        if impossible:
            path = run_folder.class_result_path(run.folder, row_name)
            LOGGER.warning(
                "%s of %s is left out: %s: damaged (%s): remove it to have the class done anew",
                *(row_name, run.folder, path, "; ".join(impossible)),
            )
            continue
        yield Observation(row_name, run.limit, int(num_images), run.seed, metrics)


def _impossible_values(num_images: int | float, metrics: Mapping[str, float | None]) -> list[str]:
    """Say which values cannot be those of a finished class; written so that NaN is one of them."""
    found = []
    if isinstance(num_images, bool) or not (1 <= num_images <= MAX_IMAGES and num_images == int(num_images)):
        found.append(f"train_images is {num_images!r}, expected a whole number from 1 up")
    for name, value in metrics.items():
        if value is not None and (isinstance(value, bool) or not -ROUNDING <= value <= 1 + ROUNDING):
            found.append(f"{name} is {value!r}, expected a number in [0, 1]")
    return found


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

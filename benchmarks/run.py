"""Speed of PatchCore's stages and runs beside the published loop, measured in one process by turns.

    python benchmarks/run.py --data /path/to/mpdd --category metal_plate

Without --data, the demo set is rendered and measured. Results go to benchmarks/results.json, where rows that are not
measured now stay as they are, and as a table to benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import runs
import search
import stages
from flat_index import tell_faiss_the_processor
from material import Material, Settings, demo_data
from results import README, RESULTS, Row, environment, markdown_table, update_results, write_between_markers

from patchcore.errors import ConfigurationError, DataError
from patchcore.runtime import available_cpus, progress, set_threads

DEFAULT_CATEGORY = "metal_plate"
DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "data"

GROUPS: dict[str, Callable[[Material], list[Row]]] = {
    "coreset": stages.coreset,
    "embedding": stages.embedding,
    "search": search.rows,
    "metrics": stages.metrics,
    "pictures": stages.pictures,
    "fit": runs.fit,
    "predict": runs.predict,
    "calibration": runs.calibration,
    "start": runs.start,
    "coreset_large": stages.coreset_large,
}
LONG = ("coreset_large",)  # measured by `make bench-full`
ORDER = (
    "coreset",
    "coreset_large",
    "embedding",
    "search_flat_k1",
    "search_flat_k3",
    "search_projected_k1",
    "search_projected_k3",
    "metrics",
    "fit",
    "peers_fit",
    "predict_small",
    "predict_flat",
    "predict_projected",
    "predict_auto",
    "peers_test",
    "calibration",
    "pictures",
    "help",
    "skip_existing",
)


def chosen_groups(typed: str | None, full: bool) -> list[str]:
    """Return the groups of rows to measure.

    Args:
        typed: Names with commas between them; None for all.
        full: Whether "all" includes what takes minutes.

    Raises:
        ConfigurationError: A name is unknown.
    """
    if typed is None:
        return [name for name in GROUPS if full or name not in LONG]
    names = list(dict.fromkeys(part.strip() for part in typed.split(",")))
    unknown = [name for name in names if name not in GROUPS]
    if unknown:
        raise ConfigurationError(f"--rows {unknown[0]!r} is unknown, expected some of {', '.join(GROUPS)}")
    return names


def settings_of(options: argparse.Namespace) -> Settings:
    """Return what is measured, with the demo set where no data are named.

    Raises:
        ConfigurationError: The options do not fit each other, or there are no such data.
    """
    for name in ("threads", "rounds"):
        if getattr(options, name) < 1:
            raise ConfigurationError(f"--{name} is {getattr(options, name)}, expected 1 or more")
    if options.threads > available_cpus():
        raise ConfigurationError(f"--threads is {options.threads}, this machine has {available_cpus()}: give fewer")
    if options.data is None:
        data, name = demo_data(DEMO_FOLDER, options.category), "demo set"
    else:
        data, name = options.data, options.data.name
        if not (data / options.category / "train" / "good").is_dir():
            raise ConfigurationError(
                f"found no {options.category}/train/good in {str(data)!r}: name the folder that holds the class "
                "with --data, and the class with --category"
            )
    return Settings(data, options.category, f"{name}/{options.category}", options.threads, options.rounds)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options that every measurement on a data set has."""
    parser.add_argument("--data", type=Path, help="folder that holds the class, in the layout of MPDD")
    parser.add_argument("--category", default=DEFAULT_CATEGORY, help="the class (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch and faiss (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions, of which the median counts (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of all rows")
    parser.add_argument("--readme", type=Path, default=README, help="Markdown file whose table is renewed")


def report(rows: Sequence[Row], where: Mapping[str, Any], results: Path, readme: Path) -> None:
    """Keep rows beside those measured before, renew the table, and print what is new.

    Args:
        rows: What was measured.
        where: Of `environment`.
        results: File of all rows.
        readme: File whose table is renewed.
    """
    known = update_results(rows, where, results)
    write_between_markers(markdown_table(known, ORDER), "table", readme)
    print(markdown_table({row.name: known[row.name] for row in rows}, ORDER), flush=True)


def measure(names: Sequence[str], material: Material, results: Path, readme: Path) -> bool:
    """Measure groups of rows, keep each as soon as it is there, and return whether every condition holds.

    Args:
        names: Groups.
        material: What is measured.
        results: File of all rows.
        readme: File whose table is renewed.
    """
    where = environment(material.settings.data_name, material.settings.threads)
    fine = True
    for name in progress(names, "benchmark"):
        rows = GROUPS[name](material)
        report(rows, where, results, readme)
        fine = fine and all(row.holds for row in rows)
    return fine


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was asked for and return the exit code: 1 if a condition does not hold, however fast it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help=f"some of {','.join(GROUPS)}; all but {','.join(LONG)} if left out")
    parser.add_argument("--full", action="store_true", help="the long ones too")
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        names = chosen_groups(options.rows, options.full)
        settings = settings_of(options)
        set_threads(options.threads)
        tell_faiss_the_processor()
        with tempfile.TemporaryDirectory(prefix="patchcore-benchmark-") as folder:
            fine = measure(names, Material(settings, Path(folder)), options.results, options.readme)
    except (ConfigurationError, DataError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())

"""The commands that compare run folders."""

from __future__ import annotations

from pathlib import Path

import click

from patchcore.cli.grammar import EXIT_FAILED, OneLineErrors, announce, quiet_libraries
from patchcore.cli.steps import not_empty
from patchcore.runtime import log_to_console

METHODS_HELP = (
    "Runs are one method, hence one column, if their configurations agree in all but seed, outputs, classes and place "
    "of the data; where presets differ between classes, by the name of the run folder without class and seed. The "
    "column is named after the run folder without class and seed."
)


@click.command("compare_results", cls=OneLineErrors, epilog=METHODS_HELP)
@click.argument("run_folders", nargs=-1, required=True)
@click.option(
    "--out",
    required=True,
    callback=not_empty,
    help="Folder of the tables and plots; its own earlier files are replaced.",
)
@click.option("--published", is_flag=True, help="Put published numbers of the same classes beside the measured ones.")
@click.option(
    "--intersect", is_flag=True, help="Compare on the test images that all runs have, if they have different ones."
)
@click.option(
    "--image_metrics_only", is_flag=True, help="Leave pixel metrics out, so that runs may differ in resolution."
)
@click.option(
    "--html", is_flag=True, help="Write report.html too: tables, plots and a gallery of the images, one file."
)
def compare_results(
    run_folders: tuple[str, ...], out: str, published: bool, intersect: bool, image_metrics_only: bool, html: bool
) -> int:
    """Tables, plots and summary.json of RUN_FOLDERS: any methods and classes, several seeds each.

    Exit code 1: a class of a run was not finished, or its files are damaged, and it is left out.
    """
    log_to_console()
    quiet_libraries()
    from patchcore.comparison.compare import ComparisonOptions
    from patchcore.comparison.compare import compare_results as write_comparison

    options = ComparisonOptions(intersect, published, image_metrics_only, html)
    complete = write_comparison([Path(folder) for folder in run_folders], Path(out), options, announce)
    return 0 if complete else EXIT_FAILED


@click.command("fewshot_curve", cls=OneLineErrors)
@click.argument("run_folders", nargs=-1, required=True)
@click.option(
    "--out",
    required=True,
    callback=not_empty,
    help="Folder of fewshot.csv, fewshot.md and fewshot_curve.png, which it replaces.",
)
def fewshot_curve(run_folders: tuple[str, ...], out: str) -> int:
    """Table and curve over the number of training images: RUN_FOLDERS differ in --limit_train and --seed alone."""
    log_to_console()
    from patchcore.comparison.fewshot import fewshot_curve as write_fewshot_curve

    complete = write_fewshot_curve([Path(folder) for folder in run_folders], Path(out), announce)
    return 0 if complete else EXIT_FAILED

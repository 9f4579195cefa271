"""The commands that compare run folders."""

from __future__ import annotations

from pathlib import Path

import click

from patchcore.cli.grammar import EXIT_FAILED, OneLineErrors, announce
from patchcore.runtime import log_to_console


@click.command("fewshot_curve", cls=OneLineErrors)
@click.argument("run_folders", nargs=-1, required=True)
@click.option(
    "--out", required=True, help="Folder of fewshot.csv, fewshot.md and fewshot_curve.png, which it replaces."
)
def fewshot_curve(run_folders: tuple[str, ...], out: str) -> int:
    """Table and curve over the number of training images: RUN_FOLDERS differ in --limit_train and --seed alone."""
    log_to_console()
    from patchcore.comparison import fewshot_curve as write_fewshot_curve

    complete = write_fewshot_curve([Path(folder) for folder in run_folders], Path(out), announce)
    return 0 if complete else EXIT_FAILED

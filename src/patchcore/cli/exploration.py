"""The command `explore_dataset`."""

from __future__ import annotations

from pathlib import Path

import click

from patchcore.cli.grammar import EXIT_FAILED, OneLineErrors, announce, quiet_libraries
from patchcore.cli.steps import CATEGORIES_OPTION, DATASET_ARGUMENTS, PREPROCESSING_OPTIONS, not_empty, with_options
from patchcore.configs import DatasetConfig, PreprocessingConfig
from patchcore.runtime import log_to_console


@click.command("explore_dataset", cls=OneLineErrors)
@with_options(
    *DATASET_ARGUMENTS,
    click.option(
        "--out", required=True, callback=not_empty, help="Folder of the files; those of the same name are replaced."
    ),
    CATEGORIES_OPTION,
    *PREPROCESSING_OPTIONS,
)
def explore_dataset(
    name: str, data_path: str, out: str, categories: tuple[str, ...], resize: int, imagesize: int, resize_mode: str
) -> int:
    """Say what is in a data set and what will go wrong with it: NAME is mvtec, mpdd or folder.

    Writes exploration.json, exploration.md, distributions.png and contact_sheet_<class>.png to --out.

    Exit code 1 if a run would fail on a class (an "error"); warnings alone give 0.
    """
    log_to_console()
    quiet_libraries()
    from patchcore.exploration import explore_dataset as write_exploration

    preprocessing = PreprocessingConfig(resize, imagesize, resize_mode)
    dataset = DatasetConfig(name, data_path, categories, preprocessing=preprocessing)
    return 0 if write_exploration(dataset, Path(out), announce) else EXIT_FAILED

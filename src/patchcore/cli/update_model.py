"""The command `update_model`."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from patchcore.cli.grammar import EXIT_FAILED, OneLineErrors, announce, quiet_libraries
from patchcore.cli.steps import PRECISION_OPTION, RUNTIME_OPTIONS, not_empty, with_options
from patchcore.configs import RuntimeConfig, require_at_least
from patchcore.configs.thresholds import ThresholdRule
from patchcore.errors import DataError
from patchcore.runtime import log_to_console

LOGGER = logging.getLogger(__name__)


@click.command("update_model", cls=OneLineErrors)
@with_options(
    click.argument("model_folder"),
    click.argument("inputs", metavar="IMAGE_OR_FOLDER...", nargs=-1, required=True),
    click.option(
        "--out",
        default=None,
        callback=not_empty,
        help="New folder for the new model; MODEL_FOLDER is replaced if left out.",
    ),
    click.option("--threshold_rule", default=None, help="mean3std or quantile:Q; that of the model if left out."),
    *RUNTIME_OPTIONS,
    PRECISION_OPTION,
    click.option("--batch_size", type=int, default=8, show_default=True, help="Images that the model takes at once."),
)
def update_model(
    model_folder: str,
    inputs: tuple[str, ...],
    out: str | None,
    threshold_rule: str | None,
    gpus: tuple[int, ...],
    device: str,
    threads: int | None,
    precision: str,
    batch_size: int,
) -> int:
    """Teach the PatchCore in MODEL_FOLDER more normal images: files, folders with all below them, globs in quotes.

    The memory bank grows by the sampler's share of the new patches, and the thresholds are learned anew. The model
    before is kept in the folder before_update beside MODEL_FOLDER.

    Exit code 0; 1 if an image could not be read, and then nothing is changed; 2 for wrong arguments.
    """
    require_at_least("--batch_size", batch_size, 1, 65536)
    log_to_console()
    quiet_libraries()
    from patchcore.model_update import UpdateJob
    from patchcore.model_update import update_model as update

    runtime = RuntimeConfig(device, gpus, threads, precision)
    rule = ThresholdRule.parse(threshold_rule) if threshold_rule is not None else None
    job = UpdateJob(Path(model_folder), inputs, Path(out) if out is not None else None, runtime, batch_size, rule)
    try:
        update(job, announce)
    except DataError as error:
        LOGGER.error("%s: the model is as it was", " ".join(str(error).split()))
        return EXIT_FAILED
    return 0

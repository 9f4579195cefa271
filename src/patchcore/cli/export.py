"""The command `export_model`."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from patchcore.cli.grammar import EXIT_FAILED, OneLineErrors, announce, quiet_libraries
from patchcore.cli.steps import not_empty, with_options
from patchcore.configs import RuntimeConfig
from patchcore.errors import DataError
from patchcore.runtime import log_to_console, set_threads

LOGGER = logging.getLogger(__name__)


@click.command("export_model", cls=OneLineErrors)
@with_options(
    click.argument("model_folder"),
    click.option(
        "--out", required=True, callback=not_empty, help="The new ONNX file; weights above 2 GB go to a file beside it."
    ),
    click.option(
        "--resize_in_graph",
        is_flag=True,
        help="The file takes one image of any size, and resizes and crops it itself.",
    ),
    click.option(
        "--precision",
        type=click.Choice(("float32", "int8")),
        default="float32",
        show_default=True,
        help="Numbers of the file; int8 is smaller and faster, and moves scores and thresholds a little.",
    ),
    click.option(
        "--calibration_images",
        multiple=True,
        help="For int8: training images, from which the ranges are learned; a file, folder or glob, repeatable.",
    ),
    click.option(
        "--resize", type=int, default=None, help="The model's; folders of the original PatchCore do not store it."
    ),
    click.option("--threads", type=int, default=None, help="CPU threads; torch's own choice if left out."),
)
def export_model(
    model_folder: str,
    out: str,
    resize_in_graph: bool,
    precision: str,
    calibration_images: tuple[str, ...],
    resize: int | None,
    threads: int | None,
) -> int:
    """Write the model in MODEL_FOLDER as an ONNX file, which runs without torch and without this toolkit.

    The file takes images as the model's resize and crop leave them, uint8 RGB [batch, 3, height, width], and gives
    score, normalised score (0.5 is the threshold) and map. How to resize and crop stands in its metadata.

    Exit code 0; 1 if an image of --calibration_images cannot be read; 2 for wrong arguments.
    """
    if (precision == "int8") != bool(calibration_images):
        raise click.UsageError(
            "--precision int8 needs --calibration_images, images of the training, and float32 needs none: type both or "
            "none"
        )
    runtime = RuntimeConfig(threads=threads)
    log_to_console()
    quiet_libraries()
    set_threads(runtime.threads)
    from patchcore.model_export import ExportJob
    from patchcore.model_export import export_model as export

    try:
        export(ExportJob(Path(model_folder), Path(out), resize_in_graph, calibration_images, resize), announce)
    except DataError as error:  # of an image of the calibration
        LOGGER.error("%s", " ".join(str(error).split()))
        return EXIT_FAILED
    return 0

"""The command `export_model`."""

from __future__ import annotations

from pathlib import Path

import click

from patchcore.cli.grammar import OneLineErrors, announce, quiet_libraries
from patchcore.cli.steps import with_options
from patchcore.runtime import log_to_console, set_threads


@click.command("export_model", cls=OneLineErrors)
@with_options(
    click.argument("model_folder"),
    click.option("--out", required=True, help="The new ONNX file; weights above 2 GB go to a file beside it."),
    click.option(
        "--resize_in_graph",
        is_flag=True,
        help="The file takes one image of any size, and resizes and crops it itself.",
    ),
    click.option(
        "--resize", type=int, default=None, help="The model's; folders of the original PatchCore do not store it."
    ),
    click.option("--threads", type=int, default=None, help="CPU threads; torch's own choice if left out."),
)
def export_model(model_folder: str, out: str, resize_in_graph: bool, resize: int | None, threads: int | None) -> None:
    """Write the model in MODEL_FOLDER as an ONNX file, which runs without torch and without this toolkit.

    The file takes images as the model's resize and crop leave them, uint8 RGB [batch, 3, height, width], and gives
    score, normalised score (0.5 is the threshold) and map. How to resize and crop stands in its metadata.
    """
    log_to_console()
    quiet_libraries()
    set_threads(threads)
    from patchcore.model_export import ExportJob
    from patchcore.model_export import export_model as export

    export(ExportJob(Path(model_folder), Path(out), resize_in_graph, resize), announce)

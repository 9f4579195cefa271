"""The command `serve_demo`."""

from __future__ import annotations

from pathlib import Path

import click

from patchcore.cli.grammar import OneLineErrors, announce, quiet_libraries
from patchcore.cli.steps import RUNTIME_OPTIONS, with_options
from patchcore.configs import RuntimeConfig
from patchcore.runtime import log_to_console, resolve_device, set_threads

PORT = 7860


@click.command("serve_demo", cls=OneLineErrors)
@with_options(
    click.argument("model_folder"),
    click.option("--port", type=int, default=PORT, show_default=True, help="Port on this machine; 0: any free one."),
    *RUNTIME_OPTIONS,
)
def serve_demo(model_folder: str, port: int, gpus: tuple[int, ...], device: str, threads: int | None) -> None:
    """A page to try the model in MODEL_FOLDER, or in an export: drop an image, see score, decision and heat map.

    The page is for this machine alone, asks nothing of any other, and keeps no image after its end (Ctrl-C).
    """
    runtime = RuntimeConfig(device, gpus, threads)
    log_to_console()
    quiet_libraries()
    from patchcore.web import serve_demo as serve_page

    set_threads(runtime.threads)
    try:
        serve_page(Path(model_folder), port, resolve_device(runtime.device, runtime.gpus), announce)
    except KeyboardInterrupt:  # how it ends
        announce("ended")

"""The command `predict`."""

from __future__ import annotations

from pathlib import Path

import click

from patchcore.cli.grammar import EXIT_FAILED, OneLineErrors, announce, quiet_libraries
from patchcore.cli.steps import PRECISION_OPTION, RAY_OPTIONS, RUNTIME_OPTIONS, not_empty, with_options
from patchcore.configs import LAUNCHERS, LOCAL, LaunchConfig, RuntimeConfig, require_positive
from patchcore.runtime import log_to_console

EXIT_DEFECT = 3


@click.command("predict", cls=OneLineErrors)
@with_options(
    click.argument("model_folder"),
    click.argument("inputs", metavar="IMAGE_OR_FOLDER...", nargs=-1, required=True),
    click.option(
        "--out", default=None, callback=not_empty, help="Folder of the outputs; needed unless --json is typed."
    ),
    click.option("--overlays/--no_overlays", default=True, help="Images with a line around defects, overlays/."),
    click.option("--masks/--no_masks", default=True, help="Black and white masks of the defects, masks/."),
    click.option(
        "--heat_maps",
        type=click.Choice(("png16", "npy", "none")),
        default="png16",
        show_default=True,
        help="Anomaly maps, heat_maps/: 16-bit PNG of normalised scores, or raw float32.",
    ),
    click.option("--mm_per_px", type=float, default=None, help="Side of a pixel, mm: tells areas in mm2 as well."),
    click.option("--roi", default=None, help="Mask of the size of the images: what is black in it plays no part."),
    click.option("--json", "as_json", is_flag=True, help="One line of JSON per image on standard output, no other."),
    click.option("--fail_on_defect", is_flag=True, help=f"Exit code {EXIT_DEFECT} if an image is anomalous."),
    click.option("--watch", is_flag=True, help="Go on with files as they land, until Ctrl-C; each is scored once."),
    click.option(
        "--patience",
        type=float,
        default=30.0,
        show_default=True,
        help="With --watch: seconds until a file that cannot be read counts as broken.",
    ),
    click.option(
        "--resize", type=int, default=None, help="The model's; folders of the original PatchCore do not store it."
    ),
    *RUNTIME_OPTIONS,
    PRECISION_OPTION,
    click.option("--batch_size", type=int, default=8, show_default=True, help="Images that the model takes at once."),
    click.option("--num_workers", type=int, default=None, help="Threads that read and write images; one per core."),
    click.option(
        "--launcher",
        type=click.Choice(LAUNCHERS),
        default=LOCAL,
        show_default=True,
        help="Where images are scored: on this machine or, in tasks of some batches each, on a Ray cluster.",
    ),
    *RAY_OPTIONS,
)
def predict(
    model_folder: str,
    inputs: tuple[str, ...],
    out: str | None,
    overlays: bool,
    masks: bool,
    heat_maps: str,
    mm_per_px: float | None,
    roi: str | None,
    as_json: bool,
    fail_on_defect: bool,
    watch: bool,
    patience: float,
    resize: int | None,
    gpus: tuple[int, ...],
    device: str,
    threads: int | None,
    precision: str,
    batch_size: int,
    num_workers: int | None,
    launcher: str,
    ray_address: str | None,
    gpus_per_task: float | None,
    cpus_per_task: int | None,
) -> int:
    """Score images with the model in MODEL_FOLDER: files, folders with all below them, and globs in quotes.

    Writes predictions.csv and, in folders beside it, overlays, masks and heat maps at the size of the images.

    Exit code 0; 1 if an image could not be scored (its row says why); 3 if --fail_on_defect is typed and an image is
    anomalous, whatever else happened; 2 for wrong arguments.
    """
    if out is None and not as_json:
        raise click.UsageError("nothing would be left of the results: type --out FOLDER, or --json, or both")
    require_positive("--patience", patience)
    log_to_console()
    quiet_libraries()
    from patchcore.inference.outputs import OutputChoice
    from patchcore.inference.run import PredictionJob, predict_files
    from patchcore.inference.watch import watch_files

    job = PredictionJob(
        model=Path(model_folder),
        inputs=inputs,
        out=Path(out) if out is not None else None,
        choice=OutputChoice(overlays, masks, heat_maps, mm_per_px),
        roi=Path(roi) if roi is not None else None,
        runtime=RuntimeConfig(device, gpus, threads, precision),
        batch_size=batch_size,
        num_workers=num_workers,
        needs_decision=fail_on_defect,
        resize_px=resize,
        launch=LaunchConfig(launcher, None, ray_address, gpus_per_task, cpus_per_task),
    )
    say, tell = (_aside, announce) if as_json else (announce, None)
    tally = watch_files(job, say, tell, patience) if watch else predict_files(job, say, tell)
    if fail_on_defect and tally.anomalous:
        return EXIT_DEFECT
    return EXIT_FAILED if tally.failed else 0


def _aside(line: str) -> None:
    """Print a line for the user beside standard output, which belongs to another program."""
    click.echo(line, err=True)

"""The command `make_demo_dataset`."""

from __future__ import annotations

from pathlib import Path

import click

from patchcore.cli.grammar import OneLineErrors
from patchcore.configs import DEMO_CATEGORIES, DemoConfig
from patchcore.runtime import log_to_console

DEFAULTS = DemoConfig()


@click.command("make_demo_dataset", cls=OneLineErrors)
@click.argument("out")
@click.option(
    "-d", "--categories", multiple=True, default=DEMO_CATEGORIES, show_default=True, help="Class; repeatable."
)
@click.option("--size", type=int, default=DEFAULTS.image_size_px, show_default=True, help="Side of the images, px.")
@click.option("--num_train", type=int, default=DEFAULTS.num_train, show_default=True, help="Training images per class.")
@click.option(
    "--num_test_good", type=int, default=DEFAULTS.num_test_good, show_default=True, help="Good test images per class."
)
@click.option(
    "--num_test_defect",
    type=int,
    default=DEFAULTS.num_test_defect,
    show_default=True,
    help="Test images per defect type.",
)
@click.option("--seed", type=int, default=DEFAULTS.seed, show_default=True, help="Same seed, same images.")
def make_demo_dataset(
    out: str,
    categories: tuple[str, ...],
    size: int,
    num_train: int,
    num_test_good: int,
    num_test_defect: int,
    seed: int,
) -> None:
    """Render a data set in the layout of MPDD to the folder OUT: four classes of metal parts with exact masks."""
    from patchcore.datasets.demo import render_demo_dataset

    log_to_console()
    config = DemoConfig(categories, size, num_train, num_test_good, num_test_defect, seed)
    click.echo(f"demo data: {render_demo_dataset(Path(out), config)}")

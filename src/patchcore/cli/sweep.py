"""The command `run_sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from patchcore.cli.baselines import run_baselines
from patchcore.cli.commands import CollectedRuns, prepare_console
from patchcore.cli.fastflow import run_fastflow
from patchcore.cli.grammar import EXIT_FAILED, OneLineErrors, announce
from patchcore.cli.patchcore import run_patchcore
from patchcore.cli.steps import not_empty
from patchcore.configs.typed import TypedRun
from patchcore.errors import ConfigurationError

COMMANDS: dict[str, click.Command] = {c.name: c for c in (run_patchcore, run_fastflow, run_baselines) if c.name}
OWN_OPTIONS = ("--log_group", "--log_project", "--eval_only", "--checkpoint", "--category")


@click.command("run_sweep", cls=OneLineErrors, context_settings={"ignore_unknown_options": True})
@click.argument("sweep")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--data", required=True, callback=not_empty, help="DATA_PATH of every run: the folder that holds the classes."
)
@click.option(
    "--out",
    required=True,
    callback=not_empty,
    help="Run folders go to OUT/<sweep>, their comparison to `comparison` there.",
)
@click.option("--only", multiple=True, help="Variant; repeatable; all if left out.")
@click.option(
    "-d", "--subdatasets", "classes", multiple=True, help="Class; repeatable; those of the sweep if left out."
)
@click.option("--seed", "seeds", type=int, multiple=True, help="Repeatable; those of the sweep if left out.")
@click.option("--dry_run", is_flag=True, help="Print what is missing and how long it may take, and do nothing.")
def run_sweep(
    sweep: str,
    flags: tuple[str, ...],
    data: str,
    out: str,
    only: tuple[str, ...],
    classes: tuple[str, ...],
    seeds: tuple[int, ...],
    dry_run: bool,
) -> int:
    """Do what is missing of SWEEP, a file or a preset such as mpdd_paper, and compare all of its runs.

    Every other option, FLAGS, reaches each command and wins over the sweep, as in --device cpu or --launcher ray.
    """
    prepare_console()
    from patchcore.sweep.definition import read_sweep
    from patchcore.sweep.run import run_sweep as run_all

    read = read_sweep(sweep)
    _refuse_own_options(flags)
    runs = [
        (name, _typed_run(name, variant.script, read.command_line(name, data, out, classes, seeds, flags)))
        for name, variant in read.chosen(only).items()
    ]
    complete = run_all(runs, Path(out) / read.name, read.comparison, dry_run, announce)
    return 0 if complete else EXIT_FAILED


def _refuse_own_options(flags: Sequence[str]) -> None:
    for flag in flags:
        if flag.partition("=")[0] in OWN_OPTIONS:
            raise click.UsageError(f"{flag.partition('=')[0]} is set by the sweep: leave it out")


def _typed_run(name: str, script: str, arguments: list[str]) -> TypedRun:
    """Let the script's own command read its arguments, so that every mistake in them is found before any work."""
    collected = CollectedRuns()
    try:
        click.Command.main(COMMANDS[script], arguments, prog_name=script, standalone_mode=False, obj=collected)
    except click.ClickException as error:
        raise ConfigurationError(f"variant {name}: {error.format_message()}") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"variant {name}: {error}") from error
    if len(collected.runs) != 1:
        raise ConfigurationError(f"variant {name}: its arguments train nothing, as with --help: mend them")
    return collected.runs[0]

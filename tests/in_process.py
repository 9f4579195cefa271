"""Run a command in the process of the test, which spares the seconds that a new one needs to import torch."""

from __future__ import annotations

import contextlib
import csv
import io
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import torch


@dataclass(frozen=True)
class Finished:
    """What a user sees of a command."""

    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        return self.err.splitlines()


def invoke(command: click.Command, *args: object) -> Finished:
    """Run a command to its exit code; what --threads sets ends with it."""
    out, err = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
        command.main([str(a) for a in args], prog_name=command.name)
    torch.set_num_threads(threads)
    assert isinstance(left.value.code, int)
    return Finished(left.value.code, out.getvalue(), err.getvalue())


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a csv file, one dictionary per row."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))

"""What fuzz tests share: each case is counted, ends in time, writes nowhere else and says clearly what is wrong."""

from __future__ import annotations

import csv
import os
import random
import signal
import stat
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from in_process import Finished, invoke

SECONDS_PER_CASE = 60  # of running, far more than any takes: beyond, it hangs


class Hang(BaseException):
    """A case took longer than any may; no Exception, so that nothing takes it for a failure of its own."""


class Cases:
    """The cases of one module.

    Args:
        at_least: How many run when all tests of the module do; README states the sum over the modules.
    """

    def __init__(self, at_least: int) -> None:
        self.at_least = at_least
        self.count = 0

    @contextmanager
    def __call__(self, seconds: int = SECONDS_PER_CASE) -> Iterator[None]:
        """Count a case, and end it if it hangs.

        The clock ticks once a second of running, so that a process that is stopped meanwhile does not hang.
        """
        self.count += 1
        ticks = 0

        def tick(number: int, frame: FrameType | None) -> None:
            nonlocal ticks
            ticks += 1
            if ticks >= seconds:
                raise Hang(f"a case runs for more than {seconds} s")

        before = signal.signal(signal.SIGALRM, tick)
        signal.setitimer(signal.ITIMER_REAL, 1, 1)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def require(self, request: pytest.FixtureRequest) -> None:
        """Fail unless as many cases ran as are stated; where some tests were chosen, that says nothing."""
        chosen = request.config.getoption("keyword") or any("::" in argument for argument in request.config.args)
        if chosen:
            pytest.skip("not all tests of the module were asked for")
        assert self.count >= self.at_least, f"{self.count} cases ran, {self.at_least} are stated"


def generated(max_examples: int) -> settings:
    """Return what makes hypothesis draw so many cases, the same ones in every run."""
    return settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate),  # shrinking runs a failing command for minutes
        report_multiple_bugs=False,
    )


def damaged(content: bytes, seed: int) -> bytes:
    """Return a file with bits flipped, or cut off, or with a part left out, doubled or filled with other bytes."""
    rng = random.Random(seed)
    changed = bytearray(content)
    reach = min(len(changed), rng.choice((40, 200, len(changed))))  # headers decide more than pixels
    begin = rng.randrange(reach)
    end = min(len(changed), begin + rng.choice((1, 4, 30)))
    match rng.choice(("flip", "flip", "flip", "cut", "remove", "double", "fill", "noise")):
        case "flip":
            for _ in range(rng.choice((1, 1, 3, 20))):
                changed[rng.randrange(reach)] ^= 1 << rng.randrange(8)
        case "cut":
            del changed[rng.randrange(len(changed)) :]
        case "remove":
            del changed[begin:end]
        case "double":
            changed[begin:begin] = changed[begin:end]
        case "fill":
            changed[begin:end] = bytes([rng.choice((0, 127, 255))]) * (end - begin)
        case "noise":
            changed[begin:end] = rng.randbytes(end - begin)
    return bytes(changed)


Snapshot = dict[str, tuple[int, int, int, str]]


def snapshot(root: Path, but: Collection[Path] = ()) -> Snapshot:
    """Return what tells every file and folder below `root` from a changed one, apart from what lies in `but`."""
    found: Snapshot = {}
    skipped = {os.fspath(path) for path in but}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if os.path.join(folder, name) not in skipped]
        for name in [*folders, *names]:
            path = os.path.join(folder, name)
            if path in skipped:
                continue
            status = os.lstat(path)
            is_file = stat.S_ISREG(status.st_mode)
            target = os.readlink(path) if stat.S_ISLNK(status.st_mode) else ""
            # The time of a folder changes with what is made and removed in it, such as a probe for permissions.
            found[path] = (status.st_mode, *((status.st_size, status.st_mtime_ns) if is_file else (0, 0)), target)
    return found


@contextmanager
def nothing_outside(root: Path, *outputs: Path) -> Iterator[None]:
    """Fail if anything below `root` but the outputs is made, changed or removed meanwhile."""
    before = snapshot(root, outputs)
    yield
    after = snapshot(root, outputs)
    assert before == after, sorted(set(before.items()) ^ set(after.items()))


def require_one_line(text: str) -> None:
    """Fail unless a message is one line."""
    assert text.strip() and len(text.splitlines()) == 1 and "Traceback" not in text, repr(text)


def run(command: click.Command, *args: object) -> Finished:
    """Run a command as `invoke` does; a warning of a library, which a terminal shows in two lines, fails the test."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.resetwarnings()
        for unseen in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", unseen)  # as Python does outside of tests
        done = invoke(command, *args)
    assert not shown, [str(warning.message) for warning in shown]
    return done


def require_refused(done: Finished) -> None:
    """Fail unless a command found its arguments wrong and said so in one line."""
    assert done.code == 2, (done.code, done.out, done.err)
    lines = [line for line in done.error_lines if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) > len("error: "), done.err


def require_clear(done: Finished, codes: Collection[int] = (0, 1, 2)) -> None:
    """Fail unless a command ended as it says it ends: with a result, or with lines that say what is wrong."""
    assert done.code in codes, (done.code, done.out, done.err)
    assert "Traceback" not in done.out + done.err, done.err
    if done.code == 2:
        require_refused(done)
    elif done.code:
        assert done.err.strip() or "error" in done.out, "it failed and says nothing"
        assert "Error: " not in done.err, done.err  # the name of an exception: a failure that nobody has foreseen


# Pieces of names that break tables, pages, terminals, shells, globs, formats or file systems.
HOSTILE = (
    "=1+1", "=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "\r", "\n", "\r\n=1", "\u2028", "'", "''=1", '"', ",",
    ";", "|", "`", "\\", "..", "%s", "%n", "{0}", "{category}", "$HOME", "$(touch pwned)", "*", "[a]", "?", "~", "#",
    " ", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</td>", "&lt;", "--help", "-d", "CON",
    "NUL", "_mask",
    "good", "\uff27\uff2f\uff2f\uff24", "\uff1d\uff11", "\udcff", "\udce9\udcb1", "\u202e", "\u0301", "é",
    "e\u0301", "日本", "😀", "\x1b[31m",
    "\x7f", "a" * 60, "é" * 40, ".png", ".json", "\ufeff", "None", "nan", "1e400",
)  # fmt: skip


@st.composite
def file_names(draw: st.DrawFn) -> str:
    """Draw a name that a folder may have on this file system: any bytes but a slash and a null, 200 at most."""
    pieces = draw(st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=4))
    joined = os.fsencode("".join(pieces))[: draw(st.sampled_from((20, 100, 200)))]
    name = os.fsdecode(joined).replace("/", "_")
    return f"x{name}" if not name or name.startswith(".") else name  # hidden ones and the two dots are no classes


# What a spreadsheet takes for the beginning of a formula: OWASP, CSV injection.
FORMULA_STARTS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")


def require_no_formula(path: Path) -> None:
    """Fail if a csv file has a cell that a spreadsheet would run, or a row of another length than its header."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.reader(file))
    for row in rows:
        assert len(row) == len(rows[0]), (path, row)
        for cell in row:
            assert not cell.startswith(FORMULA_STARTS) or is_number(cell), (path, cell)


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell and cell.isascii() and cell.strip() == cell

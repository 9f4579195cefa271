"""Run a command many times over in processes that share the import of torch, and end some of them at a write.

Called as `killed_runs.py SEED NUM_KILLS NUM_FULL FOLDER ARGUMENT...`, where the arguments are those of
run_patchcore.py without RESULTS_PATH. A first run counts the changes that it makes below its results path: opening a
file to write it, giving or removing a name, making a folder. Others are killed in front of one of them, or find the
disk full from one of them on, both drawn by the seed; each is then made anew to its end. Prints, for each, its name,
exit codes and files with their hashes after either run, as JSON.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import patchcore.pipeline  # here, once for all
from patchcore.cli import run_patchcore
from patchcore.features.backbones import load_backbone

NAMES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
WRITING = os.O_WRONLY | os.O_RDWR


def changes(event: str, arguments: tuple[Any, ...], below: str) -> bool:
    """Return whether an audit event of Python announces a change below a folder."""
    if event not in NAMES and not (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
        return False
    return isinstance(arguments[0], (str, os.PathLike)) and os.fspath(arguments[0]).startswith(below)


def at_change(number: int, below: Path, act: Callable[[], None], lasting: bool = False) -> None:
    """Call `act` in front of a change below a folder, counted from 0; with `lasting` in front of all later ones too."""
    count = -1

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if changes(event, arguments, f"{below}{os.sep}"):
            count += 1
            if count == number or (lasting and count > number):
                act()

    sys.addaudithook(watch)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_room() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_child(work: Callable[[], Any], log: Path) -> int:
    """Do something in a forked process, and return the number of the signal that killed it, negative, or its code."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        try:
            work()
        except SystemExit as left:
            sys.stdout.flush()
            os._exit(int(left.code or 0))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(99)  # nothing of the parent's is to be ended here
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(out: Path, arguments: list[str]) -> None:
    run_patchcore.main([str(out), "--skip_existing", *arguments], prog_name="run_patchcore.py")


def hashes(out: Path) -> dict[str, str]:
    """Return the hash of every file below a folder, hidden ones too, by its path."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def undisturbed(out: Path, arguments: list[str]) -> int:
    """Run to the end, and return the number of changes."""
    tally = out.with_suffix(".tally")

    def count() -> None:
        with open(tally, "a") as file:
            file.write("x")

    def work() -> None:
        at_change(0, out, count, lasting=True)
        run(out, arguments)

    report(out, in_child(work, out.with_suffix(".log")), 0, hashes(out))
    return len(tally.read_text())


def disturbed(out: Path, arguments: list[str], kind: str, number: int) -> None:
    def work() -> None:
        at_change(number, out, kill if kind == "kill" else no_room, lasting=kind == "full")
        run(out, arguments)

    first = in_child(work, out.with_suffix(".first"))
    before = hashes(out)
    report(out, first, in_child(lambda: run(out, arguments), out.with_suffix(".second")), before)


def report(out: Path, first: int, second: int, before: dict[str, str]) -> None:
    print(json.dumps([out.name, first, second, before, hashes(out)]), flush=True)


def main(seed: int, num_kills: int, num_full: int, folder: Path, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    assert patchcore.pipeline.DETECTORS
    load_backbone("efficientnet_lite0", "random", 0)
    num_changes = undisturbed(folder / "whole", arguments)
    numbers = random.Random(seed).sample(range(num_changes), num_kills + num_full)
    for kind, chosen in (("kill", numbers[:num_kills]), ("full", numbers[num_kills:])):
        for number in sorted(chosen):
            disturbed(folder / f"{kind}{number}", arguments, kind, number)


if __name__ == "__main__":
    typed_seed, typed_kills, typed_full, typed_folder, *typed = sys.argv[1:]
    main(int(typed_seed), int(typed_kills), int(typed_full), Path(typed_folder), typed)

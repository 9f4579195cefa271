"""The fuzz tests themselves: they run as many cases as README says, end what hangs, and see what is written."""

from __future__ import annotations

import importlib
import re
import signal
import time
from pathlib import Path

import click
import pytest
from conftest import REPOSITORY
from fuzzing import Cases, Hang, damaged, nothing_outside, require_no_formula, require_refused, run

from patchcore.cli import (
    compare_results,
    explore_dataset,
    export_model,
    fewshot_curve,
    make_demo_dataset,
    predict,
    run_sweep,
    serve_demo,
    update_model,
)


def test_the_readme_states_how_many_cases_run() -> None:
    modules = sorted(path.stem for path in Path(__file__).parent.glob("test_fuzz_*.py"))
    stated = re.search(r"At\s+least\s+([0-9,]+)\s+generated\s+cases", (REPOSITORY / "README.md").read_text("utf-8"))
    assert stated is not None
    numbers = {name: importlib.import_module(name).CASES.at_least for name in modules}
    assert int(stated[1].replace(",", "")) == sum(numbers.values()), numbers


def test_what_hangs_is_ended() -> None:
    cases, before = Cases(1), signal.getsignal(signal.SIGALRM)
    with pytest.raises(Hang), cases(seconds=1):
        time.sleep(20)
    assert cases.count == 1 and signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_is_written_elsewhere_is_seen(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "data").write_text("a")
    with nothing_outside(tmp_path, tmp_path / "out"):
        (tmp_path / "out" / "table.csv").touch()
    for write in (lambda: (tmp_path / "new").touch(), (tmp_path / "data").unlink):
        with pytest.raises(AssertionError), nothing_outside(tmp_path, tmp_path / "out"):
            write()


def test_damage_is_damage_and_the_same_each_time() -> None:
    content = bytes(range(256)) * 4
    assert len({damaged(content, seed) for seed in range(50)} - {content}) > 45
    assert damaged(content, 7) == damaged(content, 7)


@pytest.mark.parametrize("cell", ["=1", "+a", "-a", "@a", "\t=1", '"\r"', "\uff1d1"])
def test_formulas_are_seen(cell: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(f"a,b\n{cell},-1.5\n", encoding="utf-8", newline="")
    with pytest.raises(AssertionError):
        require_no_formula(path)


# What the generated command lines have found once: none of it was one line.
FOUND: list[tuple[click.Command, tuple[str, ...], str]] = [
    (serve_demo, ("model", "--threads", "0"), "--threads is 0"),
    (serve_demo, ("model", "--gpu", "-1"), "--gpu is -1"),
    (update_model, ("model", "a.png", "--batch_size", str(10**30)), "--batch_size is 1000"),
    (predict, ("model", "a.png", "--json", "--patience", "nan"), "--patience is nan"),
    (predict, ("model", "a.png", "--out", ""), "--out is empty"),
    (update_model, ("model", "a.png", "--out", " "), "--out is empty"),
    (explore_dataset, ("mpdd", "data", "--out", ""), "--out is empty"),
    (compare_results, ("run", "--out", ""), "--out is empty"),
    (fewshot_curve, ("run", "--out", ""), "--out is empty"),
    (export_model, ("model", "--out", "a.onnx", "--threads", "0"), "--threads is 0"),
    (export_model, ("model", "--out", ""), "--out is empty"),
    (run_sweep, ("mpdd_paper", "--data", "data", "--out", " "), "--out is empty"),
    (make_demo_dataset, ("out", "--size", str(10**30)), "--size is 1000"),
]


@pytest.mark.parametrize(("command", "arguments", "words"), FOUND, ids=[str(i) for i in range(len(FOUND))])
def test_what_was_found_is_refused(
    command: click.Command, arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(command, *arguments)
    require_refused(done)
    assert words in done.err and not list(tmp_path.iterdir())

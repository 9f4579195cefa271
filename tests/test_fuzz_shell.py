"""Hostile input through real command lines: what a terminal shows, byte for byte, and what is left on the disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, small_run, write_category
from fuzzing import Cases, nothing_outside, require_no_formula
from PIL import Image

from patchcore.storage.files import read_csv

pytestmark = pytest.mark.slow

CASES = Cases(at_least=20)

COMMON = ("--device", "cpu", "--threads", "1")


def call(script: str, *arguments: object, cwd: Path) -> tuple[int, bytes, bytes]:
    """Run a script of bin/ and return exit code, standard output and standard error."""
    with CASES(seconds=200):
        done = subprocess.run(
            [sys.executable, os.fspath(REPOSITORY / "bin" / script), *(os.fsencode(str(a)) for a in arguments)],
            capture_output=True,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            check=False,
            env={**os.environ, "PYTHONPATH": os.fspath(REPOSITORY / "src")},
        )
    assert b"Traceback" not in done.stdout + done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


# Script, arguments and a word of the one line that says what is wrong.
REFUSED: list[tuple[str, tuple[object, ...], bytes]] = [
    ("run_patchcore.py", (), b"no arguments"),
    ("run_patchcore.py", ("",), b"step patch_core is missing"),
    ("run_patchcore.py", ("out", "\udcff\n<b>"), b"\\udcff"),
    ("run_patchcore.py", ("out", "--sede=1"), b"did you mean"),
    ("run_fastflow.py", ("out", "--log_group", "a", "--log_group", "b", "dataset", "mpdd", "d", "fastflow"), b"once"),
    ("run_fastflow.py", ("out", "fastflow", "--clamp=1e", "dataset", "mpdd", "d"), b"--clamp"),
    ("run_baselines.py", ("out", "resnet_knn", "autoencoder", "dataset", "mpdd", "d"), b"one of them"),
    ("load_and_evaluate_patchcore.py", ("out", "patch_core_loader", "-p", "", "dataset", "mpdd", "d"), b"empty path"),
    ("load_and_evaluate_fastflow.py", ("out", "fastflow_loader", "-p", "/dev/null", "dataset", "mpdd", "d"), b"null"),
    ("load_and_evaluate_baselines.py", ("out", "baseline_loader", "-p", "x" * 300, "dataset", "mpdd", "d"), b"xxx"),
    ("predict.py", ("model", "image.png"), b"--out"),
    ("predict.py", ("/proc/self/mem", "/dev/zero", "--json"), b"/proc/self/mem"),
    ("update_model.py", ("model", "image.png", "--batch_size", "0"), b"--batch_size"),
    ("compare_results.py", (".", "..", "--out", "/dev/null"), b"--out"),
    ("fewshot_curve.py", ("\n", "--out", "out"), b"no run folder"),
    ("explore_dataset.py", ("mpdd", "..", "--out", "out", "--resize", "1e3"), b"--resize"),
    ("make_demo_dataset.py", ("out", "--size", str(10**30)), b"--size"),
    ("serve_demo.py", ("model", "--port", "65536"), b"--port"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "arguments", "word"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_one_line_of_what_is_wrong(tmp_path: Path, script: str, arguments: tuple[object, ...], word: bytes) -> None:
    with nothing_outside(tmp_path):
        code, out, err = call(script, *arguments, cwd=tmp_path)
    *before, last = err.splitlines()
    assert code == 2 and out == b"" and last.startswith(b"error: ") and word in last
    assert err.endswith(b"\n") and all(line.startswith(b"warning: no CUDA device found") for line in before)


def test_images_of_any_name_and_kind(tmp_path: Path) -> None:
    """A training and a prediction with damaged images among whole ones, seen as on a terminal."""
    plain = write_category(tmp_path / "data", "plate", 3, 1)
    out = tmp_path / "out"
    steps = small_run(tmp_path / "data")
    assert call("run_patchcore.py", out, *COMMON, "--save_patchcore_model", *steps, cwd=tmp_path)[0] == 0
    images = tmp_path / "images"
    images.mkdir()
    good = (plain / "test" / "good" / "000.png").read_bytes()
    names = [b"=1+1.png", b"-x.png", b"\xff.png", b"a\nb.png", b"'\"<b>,;.png", b"%s{0}.png", b"x" * 251 + b".png"]
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(images), name))).write_bytes(good)
    os.mkfifo(images / "pipe.png")
    (images / "loop.png").symlink_to(images / "loop.png")
    (images / "all").symlink_to(images, target_is_directory=True)
    (images / "folder.png").mkdir()
    (images / "half.png").write_bytes(good[: len(good) // 2])
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(images / "nan.tif")
    predictions = tmp_path / "predictions"
    model = out / "project" / "group" / "models" / "mpdd_plate"
    with nothing_outside(tmp_path, predictions):
        code, told, err = call("predict.py", model, ".", "--out", predictions, *COMMON, cwd=images)
    assert code == 1 and b"7 images scored" in told and b"4 not scored" in told
    assert (
        len([line for line in err.splitlines() if line.startswith(b"warning: ")]) == 4
    )  # beside a bar where it is slow
    require_no_formula(predictions / "predictions.csv")
    rows = read_csv(predictions / "predictions.csv")
    assert {row["path"] for row in rows if row["score"]} == {os.fsdecode(name) for name in names}
    assert len({row["score"] for row in rows if row["score"]}) == 1, "one image under many names"
    assert len({row["overlay"] for row in rows if row["score"]}) == 7


def test_so_many_cases_ran(request: pytest.FixtureRequest) -> None:
    CASES.require(request)

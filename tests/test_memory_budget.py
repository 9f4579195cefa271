"""`--memory_budget`: what may be typed, where the features lie, and that nothing else changes."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import write_category
from in_process import Finished, invoke

from patchcore.cli import run_patchcore
from patchcore.cli.byte_size import ByteSize
from patchcore.memory import buffers

pytestmark = pytest.mark.usefixtures("one_thread")

SINGLE = ("-b", "resnet18", "-le", "layer2", "-le", "layer3")
ENSEMBLE = ("-b", "resnet18", "-b", "resnet18", "-b", "efficientnet_lite0", "-le", "0.layer2", "-le", "1.layer2",
            "-le", "2.blocks.2")  # fmt: skip
PATCH_VALUES = 6 * 8 * 8  # training images, grid
USAGE = namedtuple("USAGE", "total used free")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("budget")
    write_category(root, "plate")
    write_category(root, "rod", num_train=3)
    return root


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Path]]:
    """Collects size and folder of each file that is mapped."""
    found: list[tuple[int, Path]] = []
    original = buffers._mapped_file

    def record(num_bytes: int, folder: Path) -> Any:
        found.append((num_bytes, folder))
        return original(num_bytes, folder)

    monkeypatch.setattr(buffers, "_mapped_file", record)
    return found


def run(out: Path, data: Path, *options: object, method: tuple[str, ...] = SINGLE, sampler: str = "0.5") -> Finished:
    return invoke(
        run_patchcore, "--device", "cpu", "--threads", 1, "--save_patchcore_model", "--log_group", "run", out,
        "patch_core", *method, "--weights", "random", "--anomaly_scorer_num_nn", 1, "--target_embed_dimension", 200,
        *options, "sampler", "-p", sampler, "approx_greedy_coreset",
        "dataset", "--resize", 64, "--imagesize", 64, "--num_workers", 0, "-d", "plate", "mpdd", data,
    )  # fmt: skip


def outputs(folder: Path) -> dict[str, bytes]:
    """Return what a run has left, without times and without what names the run itself."""
    changing = {"timings.csv", "run.log", "config.json"}
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in changing]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if "record" not in p.parts[-2]}


@pytest.mark.parametrize("method", [SINGLE, ENSEMBLE], ids=["single", "ensemble"])
def test_results_are_the_same_bit_for_bit(
    method: tuple[str, ...], data: Path, tmp_path: Path, files: list[tuple[int, Path]]
) -> None:
    plain = run(tmp_path / "plain", data, method=method)
    assert plain.code == 0, plain.err
    assert not files
    limited = run(tmp_path / "limited", data, "--memory_budget", "1kB", method=method)
    assert limited.code == 0, limited.err
    folder = tmp_path / "limited" / "project" / "run"
    assert {place for _, place in files} == {folder}, "the disk that was chosen for the results holds the files too"
    sizes = [size for size, _ in files]
    features, projection, bank = (4 * PATCH_VALUES * share for share in (200, 128, 100))
    assert sizes[:3] == [projection, features, bank]
    # Leave-one-out: a bank of all and six of folds for each model; two of the ensemble share a backbone.
    assert len(sizes) == (2 + 7 if method == SINGLE else 2 * 2 + 3 * 7)
    expected = outputs(tmp_path / "plain" / "project" / "run")
    found = outputs(folder)
    assert found.keys() == expected.keys() and "results.csv" in found
    for name in expected:
        if name.endswith((".csv", ".safetensors")):
            assert found[name] == expected[name], name


def test_the_budget_goes_to_what_is_read_most_often(data: Path, tmp_path: Path, files: list[tuple[int, Path]]) -> None:
    projection, bank = 4 * PATCH_VALUES * 128, 4 * PATCH_VALUES * 20
    done = run(tmp_path, data, "--memory_budget", projection + 2 * bank, sampler="0.1")
    assert done.code == 0, done.err
    assert [size for size, _ in files] == [4 * PATCH_VALUES * 200], "the embeddings alone are on disk"


def test_a_run_goes_on_with_another_budget(data: Path, tmp_path: Path) -> None:
    assert run(tmp_path, data).code == 0
    again = invoke(
        run_patchcore, "--device", "cpu", "--save_patchcore_model", "--log_group", "run", "--skip_existing", tmp_path,
        "patch_core", *SINGLE, "--weights", "random", "--anomaly_scorer_num_nn", 1, "--target_embed_dimension", 200,
        "--memory_budget", "2GiB", "sampler", "-p", "0.5", "approx_greedy_coreset",
        "dataset", "--resize", 64, "--imagesize", 64, "--num_workers", 0, "-d", "plate", "mpdd", data,
    )  # fmt: skip
    assert again.code == 0, again.err
    assert "finished before" in again.err


def test_a_full_disk_is_one_line_before_the_first_image(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers.shutil, "disk_usage", lambda folder: USAGE(10**9, 10**9 - 10**5, 10**5))
    monkeypatch.setattr("patchcore.methods.training_features.progress", lambda *_, **__: pytest.fail("read an image"))
    done = run(tmp_path, data, "--memory_budget", "1kB")
    assert done.code == 1
    (line,) = [line for line in done.error_lines if "failed" in line]
    assert "need a file of 0 MB, found 0 MB free" in line and "raise the budget" in line


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("1GB", 10**9), ("500MB", 500 * 10**6), ("2GiB", 2 * 2**30), ("123456", 123456), ("1.5 gb", 1500 * 10**6),
        ("0.1TB", 10**11), ("64kib", 65536), ("3kB", 3000), ("7B", 7), (" 1MiB ", 2**20),
    ],
)  # fmt: skip
def test_sizes_that_may_be_typed(typed: str, expected: int) -> None:
    assert ByteSize().convert(typed, None, None) == expected


@pytest.mark.parametrize("typed", ["", "GB", "1G", "-1GB", "1e9", "1,5GB", "1.GB", "1GBps", "٣GB", "1 0GB", "nan"])
def test_sizes_that_may_not(typed: str) -> None:
    with pytest.raises(click.BadParameter, match="expected a size such as 500MB"):
        ByteSize().convert(typed, None, None)


@pytest.mark.parametrize("typed", ["0", "0.4B", "lots"])
def test_a_budget_of_nothing_is_one_line_before_any_work(typed: str, data: Path, tmp_path: Path) -> None:
    done = run(tmp_path / "out", data, "--memory_budget", typed)
    assert done.code == 2
    assert "--memory_budget" in done.error_lines[-1]
    assert not (tmp_path / "out").exists()

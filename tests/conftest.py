"""Fixtures: a small data set made on the spot, the real images where they are, and the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from headless import Browser, why_no_browser
from PIL import Image

if "PYTEST_XDIST_WORKER" in os.environ:  # as many threads as cores in each of the workers would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

REPOSITORY = Path(__file__).parent.parent
IMAGE_PX = 64


def write_texture(path: Path, seed: int, defect: bool = False) -> None:
    """Write a striped image with noise; a defect is a bright square that `write_mask` covers exactly."""
    rng = np.random.default_rng(seed)
    rows = np.arange(IMAGE_PX)[:, None, None]
    pixels = 110 + 40 * np.sin(rows / 4 + rng.uniform(0, 6)) + rng.normal(0, 6, (IMAGE_PX, IMAGE_PX, 3))
    if defect:
        pixels[20:36, 24:40] = (250, 240, 20)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)


def write_mask(path: Path) -> None:
    """Write the mask of the defect that `write_texture` draws."""
    mask = np.zeros((IMAGE_PX, IMAGE_PX), dtype=np.uint8)
    mask[20:36, 24:40] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def write_category(root: Path, category: str, num_train: int = 6, num_test: int = 3) -> Path:
    """Write one class with training images, good test images and one defect type with masks."""
    folder = root / category
    base = sum(map(ord, category)) * 1000
    for i in range(num_train):
        write_texture(folder / "train" / "good" / f"{i:03d}.png", base + i)
    for i in range(num_test):
        write_texture(folder / "test" / "good" / f"{i:03d}.png", base + 100 + i)
        write_texture(folder / "test" / "spot" / f"{i:03d}.png", base + 200 + i, defect=True)
        write_mask(folder / "ground_truth" / "spot" / f"{i:03d}_mask.png")
    return folder


@pytest.fixture
def small_dataset(tmp_path: Path) -> Path:
    """A folder with two small classes, `plate` and `rod`, in the layout of MPDD."""
    root = tmp_path / "data set"  # a space in the path, as users have it
    for category in ("plate", "rod"):
        write_category(root, category)
    return root


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test of real images or of a browser that was skipped where continuous integration has both."""
    report = yield
    needs = {"real_data", "browser"} & set(getattr(item, "fixturenames", ()))
    if report.skipped and needs and "PATCHCORE_TEST_DATA" in os.environ:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped although PATCHCORE_TEST_DATA is set ({report.longrepr})"
    # Parallel workers send reports as UTF-8, and what is captured may hold names of files that are none.
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Many small operations: threads cost more than they gain, far more where other processes are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real images; tests that need it are skipped where PATCHCORE_TEST_DATA is not set."""
    if "PATCHCORE_TEST_DATA" not in os.environ:
        pytest.skip("PATCHCORE_TEST_DATA does not name a folder with real images")
    return Path(os.environ["PATCHCORE_TEST_DATA"])


@pytest.fixture
def browser() -> Iterator[Browser]:
    """A headless Chromium; the test fails if a page wrote an error to the console or asked for an address outside."""
    missing = why_no_browser()
    if missing is not None:
        pytest.skip(missing)
    opened = Browser()
    try:
        yield opened
        opened.require_quiet()
    finally:
        opened.quit()


RunCommand = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_command() -> RunCommand:
    """Run a script of bin/ as a user does; returns the finished process with its text output."""

    def run(
        script: str, *args: object, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(REPOSITORY / "bin" / script), *map(str, args)],
            capture_output=True,
            text=True,
            cwd=cwd,
            timeout=1500,
            check=False,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), **environment},
        )

    return run


SMALL_METHOD = ("patch_core", "-b", "efficientnet_lite0", "--weights", "random", "-le", "blocks.1", "-le", "blocks.2")
SMALL_SAMPLER = ("sampler", "-p", "0.5", "approx_greedy_coreset")
SMALL_READING = ("--resize", "64", "--imagesize", "64", "--num_workers", "0")


def small_run(data: Path, *categories: str, method: tuple[str, ...] = (), reading: tuple[str, ...] = ()) -> list[str]:
    """Return the steps of a run on the small data set that takes a second."""
    chosen = [part for category in categories for part in ("-d", category)]
    neighbours = ("--anomaly_scorer_num_nn", "1")
    return [
        *SMALL_METHOD, *neighbours, *method, *SMALL_SAMPLER,
        "dataset", *SMALL_READING, *reading, *chosen, "mpdd", str(data),
    ]  # fmt: skip

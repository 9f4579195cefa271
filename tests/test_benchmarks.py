"""The two sides of the benchmarks compute the same; what they take is nothing to test."""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MAP_TOLERANCE = 0.03
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("fastflow")


def test_both_sides_of_the_fastflow_benchmark_agree(benchmark: object) -> None:
    toolkit = benchmark.Toolkit(32, 2, 2)  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in toolkit.flows.parameters():  # a new flow is the identity
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    reference = benchmark.straightforward_like(toolkit, 32)  # type: ignore[attr-defined]
    reference.norms = torch.nn.ModuleList(torch.nn.Identity() for _ in reference.norms)  # ours are fixed statistics
    images = torch.randint(256, (3, 3, 32, 32), generator=generator, dtype=torch.uint8)
    features = toolkit.cache(images)
    with torch.no_grad():
        ours, theirs = toolkit.flows(features), reference.transform(reference.features(images))
        bits = toolkit.flows.mean_bits_per_dimension(features)
    losses = []
    for (latent, log_det), (their_latent, their_log_det) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(latent, their_latent, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(log_det.sum(dim=(1, 2)), their_log_det, rtol=1e-3, atol=1e-2)
        nats = 0.5 * their_latent.square().sum(dim=(1, 2, 3)) - their_log_det
        losses.append(nats.mean() / their_latent[0].numel() / math.log(2) + 0.5 * math.log2(2 * math.pi))
    torch.testing.assert_close(torch.stack(losses).mean(), bits, rtol=1e-4, atol=1e-4)
    # The toolkit joins the scales on the finest grid, the loop on the image.
    maps = -torch.exp2(-toolkit.anomaly_maps(images)), reference.anomaly_maps(images)
    assert maps[0].shape == maps[1].shape == (3, 32, 32)
    torch.testing.assert_close(maps[0], maps[1], rtol=0, atol=MAP_TOLERANCE)
    other_images = (maps[0] - maps[1].roll(1, dims=0)).abs().amax(dim=(1, 2))
    assert other_images.min() > 2 * MAP_TOLERANCE, "a tolerance that maps of other images meet would show nothing"


def test_the_fastflow_benchmark_runs() -> None:
    sizes = {"images": 2, "imagesize": 32, "flow_steps": 1, "batch_size": 2, "rounds": 1, "threads": 1}
    arguments = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "fastflow.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent / "src")},
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split()[-3:] for line in done.stdout.splitlines()[3:]]
    assert len(rows) == 3 and all(float(cell) > 0 for row in rows for cell in row)


def test_the_benchmark_of_tiles_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At the size of a thumbnail, and in threads of the test where each way has a process of its own otherwise."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tiles = importlib.import_module("fastflow_tiles")
    monkeypatch.setattr(tiles, "INPUT_PX", 32)
    monkeypatch.setattr(tiles.multiprocessing, "get_context", lambda method: SimpleNamespace(Pool=ThreadPool))
    sizes = {"side": 80, "patch_size": 32, "patch_stride": 16, "threads": 1}
    arguments = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["fastflow_tiles.py", *arguments])
    tiles.main()
    title, usual, frugal, difference = capsys.readouterr().out.splitlines()
    assert title == "resnet18, 80 x 80 px, 16 tiles, 1 threads"
    assert re.fullmatch(r"usual +peak +\d+ MB, of it +\d+ MB for the image; +\d+\.\d s", usual)
    assert re.fullmatch(r"--low_memory +peak +\d+ MB, of it +\d+ MB for the image; +\d+\.\d s", frugal)
    found = re.fullmatch(r"largest difference of the maps: (\S+), maps up to (\S+)", difference)
    assert found is not None and float(found[2]) > 0 and float(found[1]) <= 1e-5 * float(found[2])

"""The benchmarks of memory and growth run, and their arithmetic is right; what they find is nothing to test."""

from __future__ import annotations

import importlib
import mmap
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from patchcore.configs import BackboneConfig

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("memory")


@pytest.fixture
def growth(memory: ModuleType) -> ModuleType:
    return importlib.import_module("growth")


@needs_proc
def test_the_reading_sees_memory_that_came_and_went(memory: ModuleType) -> None:
    # Not memory of torch, which may be what an earlier test has left.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with memory.AnonymousMemory() as reading, mmap.mmap(-1, 40_000_000, flags=private) as pages:
        for start in range(0, len(pages), mmap.PAGESIZE):
            pages[start] = 1
        time.sleep(0.2)  # long enough for a reading
    assert 35e6 < reading.peak_bytes < 80e6


@needs_proc
def test_growth_is_measured_with_and_without_a_budget(growth: ModuleType, memory: ModuleType, tmp_path: Path) -> None:
    data = memory.rendered(tmp_path, 4, image_px=64)
    backbone = BackboneConfig("resnet18", ("layer2",), weights="random")
    found = {
        (size, budget): memory.measure(memory.Case(data, tmp_path, size, 0.1, budget, True, 1, 2, 64, backbone))
        for size in (2, 4)
        for budget in (None, 1000)
    }
    for size in (2, 4):
        plain, limited = found[size, None], found[size, 1000]
        assert plain.digest == limited.digest
        assert plain.num_patches == size * 64
        assert plain.feature_bytes == plain.num_patches * 4 * 1024 == 8 * plain.projection_bytes
        assert plain.bank_bytes == 4 * 1024 * (plain.num_patches // 10)
        assert plain.peak_bytes >= plain.fit_peak_bytes
    assert found[2, None].digest != found[4, None].digest
    measured = {size: found[size, None] for size in (2, 4)}
    lines = growth.table(measured).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 2", "| 4", "| exponent"]
    embeddings = lines[0].split(" | ").index("embeddings, MB")
    assert lines[-1].split(" | ")[embeddings] == "1.00"
    assert growth.plot(measured, "title").width > 1000


def test_the_exponent_is_the_slope_of_the_logarithms(growth: ModuleType) -> None:
    assert growth.exponent([10, 20, 80], [5, 20, 320]) == pytest.approx(2)
    assert growth.exponent([1, 10, 100], [7, 7, 7]) == pytest.approx(0)


def test_one_size_has_no_exponent(
    growth: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["growth.py", "--images", "5", "--images", "5"])
    with pytest.raises(SystemExit):
        growth.main()
    assert "an exponent needs two numbers of images" in capsys.readouterr().err

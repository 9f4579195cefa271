"""Detectors on a stand-in for a GPU: nothing mixes devices, and the host waits where it must and nowhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_images import BACKBONE, PREPROCESSING, Batches, random_images
from stand_in_gpu import GPU, GpuTensor, stand_in_gpu
from test_detectors import EXAMPLES

from patchcore.configs import PatchCoreConfig, RuntimeConfig, SamplerConfig, TrainingSource
from patchcore.detector import DETECTORS
from patchcore.memory import torch_search
from patchcore.memory.nearest_neighbours import build_nearest_neighbours
from patchcore.methods.patchcore import PatchCore
from patchcore.prediction import open_detector

CPU = torch.device("cpu")
INDEXES = ("flat", "projected", "fp16", "sq8")


@pytest.fixture(scope="module")
def train() -> torch.Tensor:
    return random_images(7, seed=0)


@pytest.fixture(scope="module")
def test() -> torch.Tensor:
    return random_images(2, seed=1)


def patchcore(device: torch.device, **changes: object) -> PatchCore:
    config = PatchCoreConfig(BACKBONE, SamplerConfig("approx_greedy_coreset", 0.5), num_nn=2, **changes)  # type: ignore[arg-type]
    found = PatchCore.prepare(config, PREPROCESSING, RuntimeConfig())(TrainingSource(), device)
    assert isinstance(found, PatchCore)
    return found


@pytest.mark.parametrize(
    "index", ["flat", "projected", *(pytest.param(i, marks=pytest.mark.slow) for i in INDEXES[2:])]
)
def test_a_gpu_gives_what_the_cpu_gives(
    index: str, train: torch.Tensor, test: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_search, "PROJECTED_ROWS_AT_LEAST", 16)
    inside = torch.ones(2, 64, 64, dtype=torch.bool)
    inside[:, 40:] = False
    plain = patchcore(CPU, index=index, score_reweighting=3).fit(Batches(train))
    expected, expected_inside = plain.predict(test), plain.predict_inside(test, inside)
    expected_folds = plain.out_of_fold_scores("")
    with stand_in_gpu(monkeypatch):
        model = patchcore(GPU, index=index, score_reweighting=3).fit(Batches(train))
        bank, found, found_inside = model.memory_bank_.cpu(), model.predict(test), model.predict_inside(test, inside)
        folds = model.out_of_fold_scores("")
    torch.testing.assert_close(bank, plain.memory_bank_)
    assert expected_folds is not None and folds is not None and not isinstance(folds.images, GpuTensor)
    torch.testing.assert_close(folds.images, expected_folds.images, rtol=1e-4, atol=1e-4)
    for one, other in ((found, expected), (found_inside, expected_inside)):
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.maps, other.maps, rtol=1e-4, atol=1e-4)


def test_reading_the_training_images_waits_for_nothing(train: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in_gpu(monkeypatch) as gpu:
        model = patchcore(GPU)
        gpu.waits.clear()
        seen: list[int] = []

        class Counting(Batches):
            def __iter__(self):  # type: ignore[no-untyped-def]
                for batch in super().__iter__():
                    yield batch
                    seen.append(len(gpu.waits))

        model.fit(Counting(train))
    assert seen == [0, 0, 0]


def test_a_prediction_waits_for_its_scores_alone(
    train: torch.Tensor, test: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in_gpu(monkeypatch) as gpu:
        model = patchcore(GPU).fit(Batches(train))
        gpu.waits.clear()
        model.predict(test)
        assert gpu.waits == 2 * ["_to_copy to the host"]
        gpu.waits.clear()
        model.out_of_fold_scores("")
    assert gpu.waits == 7 * 2 * ["_to_copy to the host"], "seven folds of one image each"


@pytest.mark.parametrize("index", INDEXES)
def test_queries_of_the_host_come_back_at_once(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.rand(size, 24, generator=generator) for size in (300, 2500))
    expected, _ = build_nearest_neighbours(False, None, CPU, index).fit(bank).search(queries, 2)
    with stand_in_gpu(monkeypatch) as gpu:
        search = build_nearest_neighbours(False, None, GPU, index).fit(bank)
        gpu.waits.clear()
        distances, rows = search.search(queries, 2)
    assert gpu.waits == 2 * ["_to_copy to the host"], "not for each chunk of the queries"
    assert not isinstance(distances, GpuTensor) and not isinstance(rows, GpuTensor)
    torch.testing.assert_close(distances, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", sorted(EXAMPLES))
def test_a_stored_model_of_any_method_scores_on_a_gpu(
    method: str, train: torch.Tensor, test: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = DETECTORS[method].prepare(EXAMPLES[method], PREPROCESSING, RuntimeConfig())
    plain = build(TrainingSource(), CPU).fit(Batches(train))
    expected = plain.predict(test)
    plain.save(tmp_path / "model")
    with stand_in_gpu(monkeypatch) as gpu:
        loaded = open_detector(tmp_path / "model", GPU)
        gpu.waits.clear()
        found = loaded.predict(test)
    assert set(gpu.waits) == {"_to_copy to the host"}, "for the results"
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4, atol=1e-4)
    if expected.maps is not None:
        np.testing.assert_allclose(found.maps, expected.maps, rtol=1e-4, atol=1e-4)


def test_the_stand_in_refuses_what_a_gpu_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in_gpu(monkeypatch) as gpu:
        there, here = torch.arange(4.0, device=GPU), torch.arange(4.0)
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(RuntimeError, match="same device"):
            there.gather(0, torch.tensor([1]))
        assert not gpu.waits
        assert float((there + 1).sum()) == 10 and len(there[there > 1]) == 2 and int(there.nonzero().sum()) == 6
        assert gpu.waits == ["_local_scalar_dense", "index", "nonzero", "_local_scalar_dense"]
        gpu.waits.clear()
        here.copy_(there, non_blocking=True)
        assert not gpu.waits
        assert there.cpu().tolist() == [0, 1, 2, 3] and gpu.waits == ["_to_copy to the host"]

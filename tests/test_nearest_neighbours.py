"""Tests of the nearest-neighbour searches against brute force in float64."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from patchcore.errors import ConfigurationError, DataError
from patchcore.memory import faiss_search, search, torch_search
from patchcore.memory.faiss_search import FaissNN
from patchcore.memory.flat_search import FlatNN
from patchcore.memory.nearest_neighbours import NearestNeighbourScorer, build_nearest_neighbours
from patchcore.memory.search import NearestNeighbours
from patchcore.memory.torch_search import TorchNN

CPU = torch.device("cpu")


def make_torch() -> NearestNeighbours:
    return TorchNN(CPU)


def make_flat() -> NearestNeighbours:
    return FlatNN(CPU)


def make_faiss() -> NearestNeighbours:
    pytest.importorskip("faiss")
    return FaissNN(num_workers=1)


@pytest.fixture(params=[make_torch, make_flat, make_faiss])
def make_search(request: pytest.FixtureRequest) -> Callable[[], NearestNeighbours]:
    return request.param


@pytest.fixture(autouse=True)
def forget_process_state() -> Iterator[None]:
    """Warnings are given, and installed packages looked up, once per process; here once per test."""
    caches = (faiss_search.warn_once, faiss_search._installed_faiss_distributions)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def random_features(num: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def brute_force(bank: torch.Tensor, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances [Q, k] and rows [Q, k] from all differences in float64."""
    difference = queries.double()[:, None] - bank.double()[None]  # [Q, M, D]
    distances, indices = difference.square().sum(dim=2).sqrt().sort(dim=1)
    return distances[:, :k], indices[:, :k]


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize(("num_bank", "num_queries", "dim"), [(300, 90, 33), (40, 5, 1), (700, 21, 256)])
def test_search_equals_brute_force(
    make_search: Callable[[], NearestNeighbours], num_bank: int, num_queries: int, dim: int, k: int
) -> None:
    bank, queries = random_features(num_bank, dim, 0), random_features(num_queries, dim, 1)
    distances, indices = make_search().fit(bank).search(queries, k)
    expected_distances, expected_indices = brute_force(bank, queries, k)
    assert distances.dtype == torch.float32
    assert indices.dtype == torch.int64
    torch.testing.assert_close(distances.double(), expected_distances, rtol=1e-6, atol=1e-7)
    assert torch.equal(indices, expected_indices)


def test_case_by_hand(make_search: Callable[[], NearestNeighbours]) -> None:
    bank = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    distances, indices = make_search().fit(bank).search(torch.tensor([[0.0, 0.0], [6.0, 7.0]]), 2)
    assert indices.tolist() == [[0, 1], [2, 1]]
    torch.testing.assert_close(distances, torch.tensor([[0.0, 5.0], [1.0, 18.0**0.5]]))


@pytest.mark.parametrize("offset", [0.0, 5.0, 1000.0])
def test_a_query_in_the_bank_is_at_distance_zero(make_search: Callable[[], NearestNeighbours], offset: float) -> None:
    bank = random_features(500, 300, 2) + offset
    distances, indices = make_search().fit(bank).search(bank[100:160], 1)
    assert distances.flatten().tolist() == [0.0] * 60
    assert indices.flatten().tolist() == list(range(100, 160))


@pytest.mark.parametrize("k", [1, 3])
def test_an_offset_costs_no_accuracy(make_search: Callable[[], NearestNeighbours], k: int) -> None:
    """The product form without centring is off by several per cent here."""
    bank, queries = random_features(600, 1024, 3) * 0.1 + 1000, random_features(50, 1024, 4) * 0.1 + 1000
    distances, _ = make_search().fit(bank).search(queries, k)
    torch.testing.assert_close(distances.double(), brute_force(bank, queries, k)[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_chunk_borders_change_nothing(
    make_search: Callable[[], NearestNeighbours], monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    bank, queries = random_features(205, 20, 5), random_features(53, 20, 6)
    expected_distances, expected_indices = brute_force(bank, queries, k)
    for query_chunk, bank_chunk in [(1, 1), (7, 10), (53, 205), (52, 204), (1000, 17)]:
        monkeypatch.setattr(search, "QUERY_CHUNK", query_chunk)
        monkeypatch.setattr(torch_search, "BANK_CHUNK", bank_chunk)
        distances, indices = make_search().fit(bank).search(queries, k)
        torch.testing.assert_close(distances.double(), expected_distances, rtol=1e-6, atol=1e-7)
        assert torch.equal(indices, expected_indices)


def test_a_query_is_answered_alike_alone_and_among_others(
    make_search: Callable[[], NearestNeighbours],
) -> None:
    bank, queries = random_features(400, 64, 7), random_features(30, 64, 8)
    search = make_search().fit(bank)
    together, rows = search.search(queries, 3)
    for number in range(30):
        alone, rows_alone = search.search(queries[number : number + 1], 3)
        torch.testing.assert_close(alone[0], together[number], rtol=1e-6, atol=0)
        assert torch.equal(rows_alone[0], rows[number])


def test_neighbours_come_in_ascending_order_and_once(make_search: Callable[[], NearestNeighbours]) -> None:
    bank = random_features(30, 4, 9).repeat(3, 1)  # every row three times
    distances, indices = make_search().fit(bank).search(random_features(40, 4, 10), 90)
    assert bool((distances.diff(dim=1) >= 0).all())
    assert all(sorted(row) == list(range(90)) for row in indices.tolist())


def test_faiss_and_torch_agree() -> None:
    bank, queries = random_features(1000, 100, 11).relu(), random_features(300, 100, 12).relu()
    torch_distances, torch_rows = make_torch().fit(bank).search(queries, 5)
    faiss_distances, faiss_rows = make_faiss().fit(bank).search(queries, 5)
    torch.testing.assert_close(faiss_distances, torch_distances, rtol=1e-4, atol=0)
    assert float((faiss_rows == torch_rows).float().mean()) > 0.999


def test_no_queries_give_no_neighbours(make_search: Callable[[], NearestNeighbours]) -> None:
    distances, indices = make_search().fit(random_features(10, 4, 0)).search(torch.empty(0, 4), 2)
    assert distances.shape == indices.shape == (0, 2)


def test_a_query_that_is_not_finite_spoils_no_other(make_search: Callable[[], NearestNeighbours]) -> None:
    bank, queries = random_features(50, 6, 0), random_features(4, 6, 1)
    expected, _ = make_search().fit(bank).search(queries, 2)
    queries[1, 2] = torch.nan
    distances, _ = make_search().fit(bank).search(queries, 2)
    assert bool(distances[1].isnan().all())
    torch.testing.assert_close(distances[[0, 2, 3]], expected[[0, 2, 3]])


def test_inputs_are_left_as_they_are_and_may_be_views(make_search: Callable[[], NearestNeighbours]) -> None:
    bank, queries = random_features(12, 80, 0).T, random_features(12, 20, 1).T.requires_grad_()
    before = bank.clone(), queries.detach().clone()
    distances, _ = make_search().fit(bank).search(queries, 2)
    torch.testing.assert_close(distances.double(), brute_force(bank, queries.detach(), 2)[0], rtol=1e-6, atol=0)
    assert not distances.requires_grad
    assert torch.equal(bank, before[0])
    assert torch.equal(queries, before[1])


def test_fit_replaces_the_bank(make_search: Callable[[], NearestNeighbours]) -> None:
    first, second, queries = random_features(60, 8, 0), random_features(20, 5, 1), random_features(9, 5, 2)
    distances, _ = make_search().fit(first).fit(second).search(queries, 1)
    torch.testing.assert_close(distances.double(), brute_force(second, queries, 1)[0], rtol=1e-6, atol=1e-7)


def test_torch_keeps_the_bank_without_a_copy() -> None:
    bank = random_features(10, 3, 0)
    search = TorchNN(CPU).fit(bank)
    assert search.bank_.data_ptr() == bank.data_ptr()


def test_search_before_fit_names_fit(make_search: Callable[[], NearestNeighbours]) -> None:
    with pytest.raises(RuntimeError, match="call fit before search"):
        make_search().search(torch.zeros(1, 2), 1)


@pytest.mark.parametrize("k", [0, 5, 11])
def test_k_outside_the_bank_is_refused(make_search: Callable[[], NearestNeighbours], k: int) -> None:
    search = make_search().fit(random_features(4, 3, 0))
    with pytest.raises(ConfigurationError, match=f"found k={k} .* bank of 4 rows, expected k from 1 to 4: lower"):
        search.search(torch.zeros(1, 3), k)


def test_banks_and_queries_of_a_wrong_shape_are_refused(make_search: Callable[[], NearestNeighbours]) -> None:
    for shape in [(0, 3), (3, 0), (3,)]:
        with pytest.raises(DataError, match="memory bank of shape"):
            make_search().fit(torch.zeros(shape))
    for shape in [(2, 4), (3,)]:
        with pytest.raises(ValueError, match=r"expected \[Q, 3\]"):
            make_search().fit(random_features(4, 3, 0)).search(torch.zeros(shape), 1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bank_that_is_not_finite_is_refused(make_search: Callable[[], NearestNeighbours], value: float) -> None:
    bank = random_features(5, 3, 0)
    bank[2, 1] = value
    with pytest.raises(DataError, match="infinite or NaN"):
        make_search().fit(bank)


def test_scorer_averages_the_distances_of_k_neighbours() -> None:
    bank = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    queries = torch.tensor([[0.0], [4.0]])
    for k, expected in [(1, [0.0, 1.0]), (2, [0.5, 2.0]), (3, [4 / 3, 8 / 3])]:
        scores = NearestNeighbourScorer(k, TorchNN(CPU)).fit(bank).score(queries)[0]
        torch.testing.assert_close(scores, torch.tensor(expected))


def test_scorer_names_the_nearest_row() -> None:
    bank = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    _, rows = NearestNeighbourScorer(3, TorchNN(CPU)).fit(bank).score(torch.tensor([[0.2], [4.0], [9.0]]))
    assert rows.tolist() == [0, 2, 3]


def test_neighbourhood_weight_by_hand() -> None:
    """The nearest member of (0, 1) is (0, 0), whose own neighbourhood of two is itself and (3, 4)."""
    bank = torch.tensor([[0.0, 0.0], [3.0, 4.0], [30.0, 40.0]])
    scorer = NearestNeighbourScorer(1, TorchNN(CPU)).fit(bank)
    query = torch.tensor([[0.0, 1.0]])
    weight = scorer.neighbourhood_weights(query, torch.tensor([0]), 2)
    expected = 1 - math.exp(1) / (math.exp(1) + math.exp(math.sqrt(18)))
    assert weight.tolist() == pytest.approx([expected], rel=1e-6)


def test_neighbourhood_weights_lie_between_0_and_1_even_where_exp_overflows() -> None:
    bank = torch.tensor([[0.0], [1.0], [2.0], [5000.0]])
    scorer = NearestNeighbourScorer(1, TorchNN(CPU)).fit(bank)
    queries = torch.tensor([[-900.0], [5100.0], [1.0]])
    weights = scorer.neighbourhood_weights(queries, torch.tensor([0, 3, 1]), 3)
    assert bool(((weights > 0) & (weights <= 1)).all())
    assert float(weights[1]) == pytest.approx(1)  # alone: its neighbours are 5000 away


@pytest.mark.parametrize("k", [0, 3])
def test_scorer_refuses_k_outside_the_bank_when_fitted(k: int) -> None:
    with pytest.raises(ConfigurationError, match="bank of 2 rows"):
        NearestNeighbourScorer(k, TorchNN(CPU)).fit(torch.zeros(2, 3))


# faiss: choice of the search, GPU, installation


class FakeIndex:
    """A flat index by brute force that records where it was put."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.gpu: int | None = None
        self.resources: object | None = None

    def add(self, rows: np.ndarray) -> None:
        assert rows.dtype == np.float32
        assert rows.flags.c_contiguous
        self.rows = rows

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        assert queries.dtype == np.float32
        assert queries.flags.c_contiguous
        squared = ((queries[:, None] - self.rows[None]) ** 2).sum(axis=2)
        indices = np.argsort(squared, axis=1)[:, :k]
        return np.take_along_axis(squared, indices, axis=1), indices.astype(np.int64)


def fake_faiss(monkeypatch: pytest.MonkeyPatch, num_gpus: int | None) -> Any:
    """Put a module in faiss's place: a CPU build (None), or a GPU build that finds `num_gpus` devices."""
    fake: Any = ModuleType("faiss")
    fake.threads = []
    fake.IndexFlatL2 = FakeIndex
    fake.omp_set_num_threads = fake.threads.append
    fake.get_num_gpus = lambda: num_gpus or 0
    if num_gpus is not None:

        def index_cpu_to_gpu(resources: object, gpu: int, index: FakeIndex) -> FakeIndex:
            index.resources, index.gpu = resources, gpu
            return index

        fake.StandardGpuResources = SimpleNamespace
        fake.index_cpu_to_gpu = index_cpu_to_gpu
    monkeypatch.setitem(sys.modules, "faiss", fake)
    return fake


def install(monkeypatch: pytest.MonkeyPatch, *distributions: str) -> None:
    """Let exactly these distributions be installed."""

    def version(name: str) -> str:
        if name not in distributions:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)


def uninstall_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)  # makes `import faiss` raise ModuleNotFoundError
    install(monkeypatch)


def test_gpu_search_moves_the_index_and_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_faiss(monkeypatch, num_gpus=2)
    bank, queries = random_features(60, 9, 0), random_features(17, 9, 1)
    search = FaissNN(on_gpu=True, num_workers=1, gpu_index=1).fit(bank)
    distances, indices = search.search(queries, 3)
    expected_distances, expected_indices = brute_force(bank, queries, 3)
    assert search._index.gpu == 1
    assert isinstance(search._index.resources, SimpleNamespace)
    torch.testing.assert_close(distances.double(), expected_distances, rtol=1e-6, atol=1e-7)
    assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize("num_gpus", [None, 0])
def test_gpu_search_without_gpu_warns_once_and_uses_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, num_gpus: int | None
) -> None:
    fake_faiss(monkeypatch, num_gpus)
    with caplog.at_level(logging.WARNING):
        searches = [FaissNN(on_gpu=True, num_workers=1).fit(random_features(5, 3, 0)) for _ in range(3)]
    assert [search._index.gpu for search in searches] == [None] * 3
    assert len(caplog.records) == 1
    assert "on the CPU" in caplog.text


def test_cpu_search_leaves_an_available_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_faiss(monkeypatch, num_gpus=1)
    assert FaissNN(on_gpu=False, num_workers=1).fit(random_features(5, 3, 0))._index.gpu is None


def test_threads_are_cut_to_the_available_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_faiss(monkeypatch, None)
    monkeypatch.setattr(faiss_search, "available_cpus", lambda: 4)
    for num_workers in (1, 4, 8):
        FaissNN(num_workers=num_workers)
    assert fake.threads == [1, 4, 4]
    with pytest.raises(ConfigurationError, match="faiss_num_workers=0"):
        FaissNN(num_workers=0)


@pytest.mark.parametrize(
    ("num_gpus", "faiss_on_gpu", "workers", "device", "expected", "warnings"),
    [
        (None, False, None, "cpu", FlatNN, 0),
        (None, False, 2, "cpu", FaissNN, 0),
        (None, True, None, "cpu", FlatNN, 1),
        (None, True, 2, "cpu", FaissNN, 1),
        (None, False, None, "cuda:1", FlatNN, 0),
        (None, False, 2, "cuda:1", FlatNN, 1),
        (None, True, None, "cuda:1", FlatNN, 1),
        (2, False, 2, "cpu", FaissNN, 0),
        (2, True, None, "cpu", FaissNN, 0),
        (2, False, None, "cuda:1", FlatNN, 0),
        (2, True, None, "cuda:1", FaissNN, 0),
        (0, True, None, "cuda:1", FlatNN, 1),
    ],
)
def test_choice_of_search_with_faiss(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num_gpus: int | None,
    faiss_on_gpu: bool,
    workers: int | None,
    device: str,
    expected: type[NearestNeighbours],
    warnings: int,
) -> None:
    fake_faiss(monkeypatch, num_gpus)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            search = build_nearest_neighbours(faiss_on_gpu, workers, torch.device(device))
    assert type(search) is expected
    assert len(caplog.records) == warnings
    if isinstance(search, FaissNN):
        assert search.on_gpu == (faiss_on_gpu and bool(num_gpus))
        assert search.gpu_index == (1 if device == "cuda:1" else 0)
    else:
        assert search.device == torch.device(device)


@pytest.mark.parametrize("faiss_on_gpu", [False, True])
def test_without_faiss_torch_searches(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, faiss_on_gpu: bool
) -> None:
    uninstall_faiss(monkeypatch)
    with caplog.at_level(logging.WARNING):
        searches = [build_nearest_neighbours(faiss_on_gpu, 4, CPU) for _ in range(2)]
    assert [type(search) for search in searches] == [FlatNN, FlatNN]
    assert len(caplog.records) == 1
    distances, _ = searches[0].fit(random_features(8, 3, 0)).search(random_features(2, 3, 1), 1)
    assert distances.shape == (2, 1)
    with pytest.raises(ConfigurationError, match="found no faiss"):
        FaissNN()


def test_faiss_that_cannot_be_imported_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    install(monkeypatch, "faiss-gpu-cu12")
    with caplog.at_level(logging.WARNING):
        searches = [build_nearest_neighbours(False, 4, CPU) for _ in range(2)]
    assert [type(search) for search in searches] == [FlatNN, FlatNN]
    assert [record.getMessage() for record in caplog.records] == [
        "--faiss_num_workers: faiss-gpu-cu12 cannot be imported, searching with torch on cpu"
    ]


@pytest.mark.parametrize("gpu", ["faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs"])
def test_two_distributions_of_faiss_are_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch, gpu: str) -> None:
    fake_faiss(monkeypatch, num_gpus=1)
    install(monkeypatch, "faiss-cpu", gpu)
    for build in (lambda: build_nearest_neighbours(False, 4, CPU), lambda: FaissNN(num_workers=1)):
        with pytest.raises(ConfigurationError) as error:
            build()
        message = str(error.value)
        assert f"found faiss-cpu and {gpu} installed together" in message
        assert f"pip uninstall -y faiss-cpu {gpu}, then pip install -r requirements.txt" in message
        assert "\n" not in message
    install(monkeypatch, gpu)
    faiss_search._installed_faiss_distributions.cache_clear()
    assert isinstance(build_nearest_neighbours(True, 4, CPU), FaissNN)


def test_importing_the_module_does_not_import_faiss() -> None:
    code = "import sys, patchcore.memory.nearest_neighbours; sys.exit('faiss' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)

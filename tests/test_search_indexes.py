"""Searches that project or compress the bank: what they find, what they keep, how they are stored."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from patchcore.errors import ConfigurationError, DataError
from patchcore.memory import faiss_search, torch_search
from patchcore.memory.faiss_search import (
    FAISS_INDEX,
    InvertedListsNN,
    float32_rows,
    import_faiss,
    require_trainable,
)
from patchcore.memory.nearest_neighbours import NearestNeighbourScorer, build_nearest_neighbours, restore_search
from patchcore.memory.search import NearestNeighbours
from patchcore.memory.torch_search import SQ8_BANK, SQ8_SCALE, EightBitNN, ProjectedNN, TorchNN, smallest_of_rows

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
COMPRESSED = ("fp16", "sq8", "ivf", "ivfpq")


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let small banks be projected and trained on; warnings are given once per test."""
    monkeypatch.setattr(torch_search, "PROJECTED_ROWS_AT_LEAST", 100)
    monkeypatch.setattr(faiss_search, "PQ_LISTS", 8)
    monkeypatch.setattr(faiss_search, "ROWS_PER_CENTROID", 32)
    monkeypatch.setattr(faiss_search, "PQ_BITS", 4)
    faiss_search.warn_once.cache_clear()
    yield
    faiss_search.warn_once.cache_clear()


def features(num: int, dim: int = 64, seed: int = 0, spread: float = 0.15) -> torch.Tensor:
    """Features as banks have them: most of the variance in few directions, some in all, an offset."""
    mixing = torch.randn(8, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(num, 8, generator=generator) @ mixing
    return wide + spread * torch.randn(num, dim, generator=generator) + 3


def build(index: str) -> NearestNeighbours:
    if index.startswith("ivf"):
        pytest.importorskip("faiss")
    return build_nearest_neighbours(False, None, CPU, index)


def distances_to(search: NearestNeighbours, queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Distances [Q, k] in float64 to rows [Q, k] of what the search holds."""
    held = search.whole_bank().double()[rows]
    return torch.linalg.vector_norm(queries.double()[:, None] - held, dim=2)


@pytest.mark.parametrize("num_columns", [1, 31, 65, 200, 333])
@pytest.mark.parametrize("k", [1, 2, 9])
def test_the_smallest_of_rows_are_those_of_topk(num_columns: int, k: int) -> None:
    k = min(k, num_columns)
    values = torch.randint(40, (50, num_columns), generator=torch.Generator().manual_seed(1)).float()  # with ties
    smallest, columns = smallest_of_rows(values, k)
    assert torch.equal(smallest.sort(dim=1).values, values.sort(dim=1).values[:, :k])
    assert torch.equal(values.gather(1, columns), smallest)
    assert all(len(set(row)) == k for row in columns.tolist())


@pytest.mark.parametrize("k", [1, 3, 700])
def test_projected_finds_the_nearest_and_returns_exact_distances(k: int) -> None:
    bank, queries = features(700), features(300, seed=1)
    search = ProjectedNN(CPU).fit(bank)
    assert isinstance(search, ProjectedNN) and search.directions_ is not None
    assert search.keys_.shape == (700, 16)
    expected, rows = TorchNN(CPU).fit(bank).search(queries, k)
    distances, found = search.search(queries, k)
    assert float((found == rows).float().mean()) >= 0.99
    torch.testing.assert_close(distances.double(), distances_to(search, queries, found), rtol=1e-5, atol=0)
    assert bool((distances >= expected * (1 - 1e-6)).all())


def test_the_residual_tells_rows_apart_that_the_directions_do_not() -> None:
    """All rows have the same coordinates in the directions; one lies far off them, as the query does."""
    bank = features(400, spread=0.01)
    directions = torch_search.principal_directions(bank, bank.mean(dim=0))
    assert directions is not None
    off = torch.randn(64, generator=torch.Generator().manual_seed(5))
    off -= directions @ (directions.T @ off)
    bank[100:300] = bank[100]
    bank[222] += 2 * off / off.norm()
    query = (bank[100] + 1.9 * off / off.norm())[None]
    distances, found = ProjectedNN(CPU).fit(bank).search(query, 1)
    assert found.item() == 222
    assert distances.item() == pytest.approx(0.1, rel=1e-3)


def test_keys_keep_every_norm() -> None:
    search = ProjectedNN(CPU).fit(features(400))
    assert isinstance(search, ProjectedNN)
    residual = search.keys_[:, -1] / torch_search.RESIDUAL_COSINE
    total = search.keys_[:, :-1].square().sum(dim=1) + residual.square()
    torch.testing.assert_close(total, search.squared_norms_, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "bank", [features(99), torch.randn(300, 64, generator=torch.Generator().manual_seed(0)), torch.ones(200, 64)]
)
def test_projected_equals_flat_where_projection_saves_nothing(bank: torch.Tensor) -> None:
    """Too few rows; as much variance in every direction; none at all."""
    queries = features(40, seed=1)
    search = ProjectedNN(CPU).fit(bank)
    assert isinstance(search, ProjectedNN)
    assert search.directions_ is None or not bank.std(dim=0).any()
    expected, _ = TorchNN(CPU).fit(bank).search(queries, 2)
    torch.testing.assert_close(search.search(queries, 2)[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("index", COMPRESSED)
@pytest.mark.parametrize("k", [1, 3])
def test_compressed_banks_find_what_they_hold_at_its_distance(index: str, k: int) -> None:
    bank, queries = features(700), features(200, seed=1)
    search = build(index).fit(bank)
    distances, found = search.search(queries, k)
    assert bool((distances.diff(dim=1) >= 0).all())
    torch.testing.assert_close(distances.double(), distances_to(search, queries, found), rtol=1e-4, atol=1e-4)
    exact, rows = TorchNN(CPU).fit(bank).search(queries, k)
    recall = {"fp16": 0.99, "sq8": 0.95, "ivf": 0.9, "ivfpq": 0.5}[index]
    assert float((found[:, :, None] == rows[:, None]).any(dim=2).float().mean()) >= recall
    if index != "ivfpq":
        assert float((distances / exact - 1).abs().mean()) < 0.03


@pytest.mark.parametrize(("index", "bytes_per_value"), [("fp16", 2), ("sq8", 1), ("ivfpq", 1)])
def test_compressed_banks_hold_and_store_no_float32_bank(index: str, bytes_per_value: int) -> None:
    search = build(index).fit(features(2000))
    allowance = 2000 * 16 + 64 * 64 * 4 * 3  # norms, numbers and places of rows; centroids and scales
    stored = sum(t.nbytes for t in search.tensors().values())
    held = sum(v.nbytes for v in vars(search).values() if isinstance(v, torch.Tensor))
    for total in (stored, held):
        assert total <= 2000 * 64 * bytes_per_value + allowance < 2000 * 64 * 4


def test_eight_bits_by_hand() -> None:
    bank = torch.stack([torch.arange(256.0), torch.full((256,), 7.0), torch.linspace(-1, 1, 256)], dim=1)
    search = EightBitNN(CPU).fit(bank)
    assert isinstance(search, EightBitNN)
    assert search.bank_[:, 0].tolist() == list(range(256))
    assert search.bank_[:, 1].unique().tolist() == [0]
    torch.testing.assert_close(search.whole_bank(), bank, rtol=0, atol=1e-6)
    coarse = EightBitNN(CPU).fit(features(500))
    assert isinstance(coarse, EightBitNN)
    error = (coarse.whole_bank() - features(500)).abs().amax(dim=0)
    assert bool((error <= coarse.scale_[1] * 0.501).all())


def test_values_that_half_precision_cannot_hold_are_refused() -> None:
    bank = features(50)
    bank[3, 4] = 70000
    with pytest.raises(DataError, match=r"up to 70000 .* float16 ends at 65504: use another --index"):
        build("fp16").fit(bank)


@pytest.mark.parametrize("index", ["projected", *COMPRESSED])
def test_a_query_is_answered_alike_alone_and_among_others(index: str) -> None:
    search, queries = build(index).fit(features(700)), features(30, seed=1)
    together, rows = search.search(queries, 3)
    for number in range(0, 30, 7):
        alone, rows_alone = search.search(queries[number : number + 1], 3)
        torch.testing.assert_close(alone[0], together[number], rtol=1e-5, atol=1e-6)
        assert torch.equal(rows_alone[0], rows[number])


@pytest.mark.parametrize("index", ["projected", *COMPRESSED])
def test_a_query_that_is_not_finite_spoils_no_other(index: str) -> None:
    search, queries = build(index).fit(features(700)), features(4, seed=1)
    expected, _ = search.search(queries, 2)
    queries[1, 2] = torch.nan
    distances, _ = search.search(queries, 2)
    assert bool(distances[1].isnan().all())
    torch.testing.assert_close(distances[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize("index", ["flat", "projected", *COMPRESSED])
def test_reweighting_works_with_every_index(index: str) -> None:
    scorer = NearestNeighbourScorer(1, build(index)).fit(features(700))
    queries = features(20, seed=1)
    scores, rows = scorer.score(queries)
    weights = scorer.neighbourhood_weights(queries, rows, 5)
    assert bool(((weights > 0) & (weights < 1)).all())
    assert bool(scores.isfinite().all())


@pytest.mark.parametrize("index", ["ivf", "ivfpq"])
def test_more_neighbours_than_the_probed_lists_hold(index: str) -> None:
    search = build(index).fit(features(400))
    _, found = search.search(features(5, seed=1), 400)
    assert all(sorted(row) == list(range(400)) for row in found.tolist())


@pytest.mark.parametrize("index", ["flat", "projected", *COMPRESSED])
def test_a_stored_bank_gives_the_same_search(index: str) -> None:
    search, queries = build(index).fit(features(700)), features(50, seed=1)
    tensors = search.tensors()
    again = restore_search(build(index), index, tensors, 64)
    assert all(torch.equal(a, b) for a, b in zip(again.search(queries, 3), search.search(queries, 3), strict=True))
    assert {n: t.dtype for n, t in again.tensors().items()} == {n: t.dtype for n, t in tensors.items()}
    with pytest.raises(ConfigurationError, match=r"64 columns, .* 63 values: the files belong to different models"):
        restore_search(build(index), index, tensors, 63)


@pytest.mark.parametrize("index", ["ivf", "ivfpq"])
def test_training_is_the_same_each_time(index: str) -> None:
    first, second = (build(index).fit(features(700)).tensors()[FAISS_INDEX] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("stored", ["flat", "projected", "ivf"])
@pytest.mark.parametrize("index", ["flat", "projected", *COMPRESSED])
def test_a_float32_bank_can_be_searched_by_any_index(stored: str, index: str, caplog: pytest.LogCaptureFixture) -> None:
    bank, queries = features(700), features(20, seed=1)
    search = restore_search(build(index), index, build(stored).fit(bank).tensors(), 64)
    expected, _ = build(index).fit(bank).search(queries, 2)
    torch.testing.assert_close(search.search(queries, 2)[0], expected, rtol=1e-6, atol=1e-6)
    moves = index in COMPRESSED and index != stored
    assert [r.getMessage().partition(" ")[0] for r in caplog.records] == ["--index"] * moves


@pytest.mark.parametrize("stored", ["fp16", "sq8", "ivfpq"])
@pytest.mark.parametrize("index", ["flat", "projected", *COMPRESSED])
def test_a_compressed_bank_stays_what_it_is(stored: str, index: str) -> None:
    tensors = build(stored).fit(features(700)).tensors()
    if index == stored:
        return
    with pytest.raises(
        ConfigurationError,
        match=f"the model keeps its memory bank as {stored}, --index {index} needs float32 values: leave",
    ):
        restore_search(build(index), index, tensors, 64)


def test_too_few_rows_and_dimensions_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(DataError, match=r"memory bank has 255 patches, --index ivfpq needs 256 .* \(sampler -p\)"):
        build("ivfpq").fit(features(255))
    with pytest.raises(DataError, match="31 patches, --index ivf needs 32"):
        build("ivf").fit(features(31))
    with pytest.raises(ConfigurationError, match=r"into 64 parts, .* 200 values: choose --target_embed_dimension 192"):
        require_trainable("ivfpq", None, 200, "memory bank")
    for index in ("flat", "projected", "fp16", "sq8"):
        require_trainable(index, 1, 3, "memory bank")


def test_the_published_sizes() -> None:
    names = ("PQ_LISTS", "PQ_SUBQUANTISERS", "PQ_BITS", "ROWS_PER_CENTROID")
    source = (faiss_search.__file__, {})
    with open(source[0], encoding="utf-8") as file:
        values = dict(line.split("#")[0].strip().split(" = ") for line in file if line.startswith(names))
    assert [values[name] for name in names] == ["512", "64", "8", "39"]


def test_damaged_indexes_are_refused() -> None:
    blob = build("ivfpq").fit(features(400)).tensors()[FAISS_INDEX]
    damaged = {
        "empty": blob[:0],
        "short": blob[:30],
        "truncated": blob[: len(blob) // 2],
        "one byte short": blob[:-1],
        "another kind": torch.cat([torch.tensor(list(b"IxF2"), dtype=torch.uint8), blob[4:]]),
        "no bytes": blob.float(),
    }
    for place, name in {8: "rows", 32: "trained", 33: "metric"}.items():
        damaged[name] = blob.clone()
        damaged[name][place] ^= 0xFF
    for name, content in damaged.items():
        with pytest.raises(ConfigurationError) as error:
            restore_search(build("ivfpq"), "ivfpq", {FAISS_INDEX: content}, 64)
        assert "\n" not in str(error.value), name


@pytest.mark.slow
def test_no_byte_that_is_changed_stops_the_process() -> None:
    """Every damaged index is read or refused; what describes its parts is at the beginning."""
    blob = build("ivfpq").fit(features(400)).tensors()[FAISS_INDEX]
    rng = np.random.default_rng(0)
    for _ in range(400):
        content = blob.clone()
        content[int(rng.integers(min(len(blob), 400)))] = int(rng.integers(256))
        try:
            search = restore_search(build("ivfpq"), "ivfpq", {FAISS_INDEX: content}, 64)
        except ConfigurationError:
            continue
        assert search.num_rows_ == 400


@pytest.mark.parametrize("index", ["ivf", "ivfpq"])
def test_without_faiss_the_message_names_the_remedy(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigurationError, match=r"pip install -r requirements.txt .*--index flat, projected"):
        build_nearest_neighbours(False, None, CPU, index)


@pytest.mark.parametrize("index", ["projected", "fp16", "sq8"])
def test_options_of_faiss_do_not_move_a_search_of_torch(index: str, caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(build_nearest_neighbours(True, 4, CPU, index), TorchNN)
    assert [r.getMessage() for r in caplog.records] == [f"--faiss_on_gpu: --index {index} searches with torch on cpu"]


@pytest.mark.parametrize("kind", ["ivf", "ivfpq"])
def test_inverted_lists_go_to_the_gpu_and_rows_come_from_the_cpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    faiss: Any = pytest.importorskip("faiss")
    moved = []

    class Options:
        useFloat16 = False

    def index_cpu_to_gpu(resources: object, gpu: int, index: Any, options: Options) -> Any:
        moved.append((gpu, options.useFloat16, index.nprobe))
        return faiss.clone_index(index)

    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "GpuClonerOptions", Options, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", index_cpu_to_gpu, raising=False)
    search = InvertedListsNN(kind, on_gpu=True, num_workers=1, gpu_index=1).fit(features(700))
    expected = InvertedListsNN(kind, num_workers=1).fit(features(700))
    queries = features(20, seed=1)
    torch.testing.assert_close(search.search(queries, 2)[0], expected.search(queries, 2)[0])
    assert moved == [(1, kind == "ivfpq", 8)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({SQ8_SCALE: torch.zeros(2, 63)}, "finite values and steps"),
        ({SQ8_SCALE: torch.full((2, 64), -1.0)}, "finite values and steps"),
        ({SQ8_SCALE: torch.full((2, 64), torch.nan)}, "finite values and steps"),
        ({SQ8_SCALE: torch.zeros(64)}, "of rank 2 expected"),
        ({SQ8_BANK: torch.zeros(700, 64)}, r"expected rows of torch.uint8"),
        ({SQ8_BANK: torch.zeros(0, 64, dtype=torch.uint8)}, r"shape \[0, 64\]"),
    ],
)
def test_damaged_scales_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    tensors = {**build("sq8").fit(features(700)).tensors(), **change}
    with pytest.raises(ConfigurationError, match=message):
        restore_search(build("sq8"), "sq8", tensors, 64)


@pytest.mark.skipif(import_faiss() is None, reason="faiss is not installed")
def test_reading_an_index_leaves_the_threads_of_torch_alone() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        bank = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
        search = InvertedListsNN("ivf", num_workers=2).fit(bank)
        torch.testing.assert_close(float32_rows(search.tensors()[FAISS_INDEX], 16), bank)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)

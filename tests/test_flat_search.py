"""Exact search by 8-bit bounds, against brute force in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from patchcore.memory import flat_search, int8_products, torch_search
from patchcore.memory.flat_search import FlatNN, even_chunks
from patchcore.memory.int8_products import encoded, int8_products_are_fast_and_exact
from patchcore.memory.nearest_neighbours import build_nearest_neighbours
from patchcore.memory.torch_search import TorchNN

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def coded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let banks of hundreds of rows be encoded, and processors without 8-bit products compute them otherwise."""
    monkeypatch.setattr(flat_search, "CODED_ROWS_PER_NEIGHBOUR", 64)
    if not int8_products_are_fast_and_exact():
        monkeypatch.setattr(flat_search, "int8_products_are_fast_and_exact", lambda: True)
        monkeypatch.setattr(flat_search, "int8_products", lambda left, right: left.int() @ right.int().T)


def gaussian(num: int, seed: int, dim: int = 40) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(num: int, seed: int) -> torch.Tensor:
    """A few values of each row are a hundred times as large as most."""
    return gaussian(num, seed) ** 5


def clustered(num: int, seed: int) -> torch.Tensor:
    """Rows about ten centres, far from the origin."""
    return 30 * gaussian(10, 7)[torch.arange(num) % 10] + gaussian(num, seed) + 500


def of_several_lengths(num: int, seed: int) -> torch.Tensor:
    return gaussian(num, seed) * torch.logspace(-6, 6, num)[:, None]


def repeated(num: int, seed: int) -> torch.Tensor:
    """Every row three times."""
    return gaussian(-(-num // 3), seed).repeat_interleave(3, dim=0)[:num]


def all_distances(bank: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Return float64 [Q, M]."""
    return torch.cdist(queries.double(), bank.double(), compute_mode="donot_use_mm_for_euclid_dist")


@pytest.mark.parametrize("make", [gaussian, heavy_tailed, clustered, of_several_lengths, repeated])
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("num_rows", [576, 601, 1337])
def test_the_nearest_are_those_of_brute_force(
    make: Callable[[int, int], torch.Tensor], k: int, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_search, "BANK_CHUNK", 600)
    monkeypatch.setattr(flat_search, "CODED_BLOCK", 250)
    bank, queries = make(num_rows, 0), torch.cat([make(150, 1), make(num_rows, 0)[::9]])
    search = FlatNN(CPU).fit(bank)
    assert isinstance(search, FlatNN) and search.codes_ is not None
    distances, rows = search.search(queries, k)
    exact = all_distances(bank, queries)
    expected = exact.sort(dim=1).values[:, :k]
    torch.testing.assert_close(distances.double(), expected, rtol=2e-5, atol=1e-5 * float(bank.abs().max()))
    torch.testing.assert_close(exact.gather(1, rows), distances.double(), rtol=1e-5, atol=1e-30)
    assert all(len(set(of_query)) == k for of_query in rows.tolist())


def test_bounds_leave_few_distances_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where they do not, the search says so."""
    bank, queries = gaussian(2000, 0), gaussian(100, 1)
    computed: list[int] = []
    pair_distances = FlatNN.pair_distances

    def counted(self: FlatNN, queries: torch.Tensor, of_query: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
        computed.append(len(members))
        return pair_distances(self, queries, of_query, members)

    monkeypatch.setattr(FlatNN, "pair_distances", counted)
    search = FlatNN(CPU).fit(bank)
    assert isinstance(search, FlatNN) and search.codes_ is not None
    search.search(queries, 1)
    assert 0 < sum(computed) < 5 * len(queries)


def test_queries_that_bounds_do_not_tell_apart_are_searched_in_float32() -> None:
    """One direction in which rows differ by less than a step of their codes."""
    bank, queries = gaussian(1, 0).repeat(800, 1), gaussian(1, 0).repeat(20, 1)
    bank[:, 0] += 1e-3 * torch.arange(800) / 800
    bank[0, 1:] *= -1  # so that the mean is elsewhere
    queries[:, 0] += 1e-3 * torch.arange(20) / 20
    search = FlatNN(CPU).fit(bank)
    assert isinstance(search, FlatNN) and search.codes_ is not None
    assert search._nearest_by_bounds(queries, 1, search.codes_) is None
    found, expected = search.search(queries, 1), TorchNN(CPU).fit(bank).search(queries, 1)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_codes_are_as_far_from_their_rows_as_they_say() -> None:
    rows = torch.cat([heavy_tailed(50, 3), torch.zeros(1, 40), gaussian(5, 2) * 1e-42])
    codes = encoded(rows)
    decoded = codes.values.double() * codes.steps.double()[:, None]
    assert codes.values[:50].abs().amax(dim=1).tolist() == [127] * 50
    error = torch.linalg.vector_norm(rows.double() - decoded, dim=1)
    torch.testing.assert_close(codes.errors.double(), error, rtol=1e-5, atol=1e-6 * float(codes.steps.max()))
    torch.testing.assert_close(codes.squared_norms.double(), decoded.square().sum(dim=1), rtol=1e-5, atol=1e-30)


@pytest.mark.skipif(not int8_products_are_fast_and_exact(), reason="this processor has no 8-bit products")
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (784, 100, 33), (70, 1025, 1024)])
def test_int8_products_are_exact(shape: tuple[int, int, int]) -> None:
    """Of the largest codes too, whose sums leave 16 bits at once."""
    n, m, dim = shape
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(-127, 128, (n, dim), generator=generator).to(torch.int8)
    right = torch.randint(-127, 128, (m, dim), generator=generator).to(torch.int8)
    left[0], right[-1] = 127, -127
    assert torch.equal(int8_products.int8_products(left, right), left.int() @ right.int().T)


def test_queries_that_are_not_finite_spoil_no_other() -> None:
    bank, queries = gaussian(700, 0), gaussian(30, 1)
    queries[4, 3], queries[9] = torch.nan, torch.inf
    search = FlatNN(CPU).fit(bank)
    distances, _ = search.search(queries, 2)
    fine = [i for i in range(30) if i not in (4, 9)]
    assert not distances[[4, 9]].isfinite().any()
    expected = all_distances(bank, queries[fine]).sort(dim=1).values[:, :2]
    torch.testing.assert_close(distances[fine].double(), expected, rtol=1e-5, atol=0)


def test_threads_share_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_search, "QUERIES_IN_PARTS_FROM", 10)
    bank, queries = gaussian(700, 0), gaussian(101, 1)
    alone = TorchNN(CPU).fit(bank).search(queries[:9], 3)
    with torch.inference_mode():
        distances, rows = FlatNN(CPU).fit(bank).search(queries, 3)
    assert torch.equal(distances[:9], alone[0]) and torch.equal(rows[:9], alone[1])
    assert distances.shape == rows.shape == (101, 3)


def test_what_is_small_or_elsewhere_is_not_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    search = build_nearest_neighbours(False, None, CPU)
    assert isinstance(search, FlatNN)
    search.fit(gaussian(127, 0))
    assert search.codes_ is None
    search.fit(gaussian(128, 0))
    assert search.codes_ is not None
    monkeypatch.setattr(flat_search, "MAX_DIMENSION", 39)
    search.fit(gaussian(128, 0))
    assert search.codes_ is None
    assert len(search.search(gaussian(3, 1), 40)[1][0]) == 40


@pytest.mark.parametrize(("num_rows", "at_most"), [(1, 5), (5, 5), (6, 5), (17, 5), (16000, 8192)])
def test_even_chunks_cover_all_rows_once(num_rows: int, at_most: int) -> None:
    chunks = list(even_chunks(num_rows, at_most))
    lengths = [chunk.stop - chunk.start for chunk in chunks]
    assert [number for chunk in chunks for number in range(chunk.start, chunk.stop)] == list(range(num_rows))
    assert max(lengths) <= at_most and max(lengths) - min(lengths) <= 1

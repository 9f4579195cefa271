"""Tests of the coreset samplers against plain loops in float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from patchcore.errors import ConfigurationError, DataError
from patchcore.memory import greedy_selection as greedy_module
from patchcore.memory import points as points_module
from patchcore.memory import sampler as sampler_module
from patchcore.memory.greedy_selection import greedy_selection
from patchcore.memory.points import Points, project_features
from patchcore.memory.sampler import (
    SAMPLERS,
    ApproximateGreedyCoresetSampler,
    GreedyCoresetSampler,
    IdentitySampler,
    RandomSampler,
    Sampler,
    build_sampler,
    num_selected,
)

CORESETS = {"greedy_coreset": GreedyCoresetSampler, "approx_greedy_coreset": ApproximateGreedyCoresetSampler}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(num_points: int, dim: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(num_points, dim, generator=seeded(seed))


def clustered(num_points: int, dim: int, num_clusters: int = 30) -> torch.Tensor:
    """Clusters of different spread far from the origin, as rectified features are."""
    generator = seeded(2)
    centres = torch.rand(num_clusters, dim, generator=generator) * 10 + 20
    spread = torch.rand(num_points, 1, generator=generator)
    members = torch.randint(num_clusters, (num_points,), generator=generator)
    return centres[members] + spread * torch.randn(num_points, dim, generator=generator)


def oracle_start(name: str, points: torch.Tensor, starting_points: torch.Tensor) -> torch.Tensor:
    """The squared distance [N] that each point starts with, from the full distance matrix in float64."""
    if name == "greedy_coreset":
        return torch.cdist(points, points).square().sum(dim=1)
    return torch.cdist(points, points[starting_points]).mean(dim=1).square()


def oracle_greedy(points: torch.Tensor, start: torch.Tensor, num_select: int) -> list[int]:
    """The textbook loop: pick the farthest point, update every distance, repeat; in float64."""
    positions = points.double().numpy()
    distances = start.double().numpy().copy()
    picks: list[int] = []
    for _ in range(num_select):
        picks.append(int(distances.argmax()))  # the lowest index among equals
        difference = positions - positions[picks[-1]]
        np.minimum(distances, np.einsum("nd,nd->n", difference, difference), out=distances)
        distances[picks[-1]] = -1
    return picks


def oracle_select(name: str, features: torch.Tensor, num_select: int, seed: int = 0) -> list[int]:
    """Select with the oracle, with the random draws of the sampler in their documented order."""
    generator = seeded(seed)
    dim = features.shape[1]
    points = features.double() - features.double().mean(dim=0)
    if dim > 128:
        bound = dim**-0.5
        projection = torch.empty(128, dim).uniform_(-bound, bound, generator=generator)
        points = points @ projection.double().T
    starting_points = torch.randperm(len(points), generator=generator)[:10]
    return oracle_greedy(points, oracle_start(name, points, starting_points), num_select)


@pytest.mark.parametrize("name", CORESETS)
@pytest.mark.parametrize(("num_points", "dim"), [(2500, 128), (2500, 32), (1500, 300), (1500, 8)])
def test_coreset_equals_float64_loop_on_gaussian_points(name: str, num_points: int, dim: int) -> None:
    features = gaussian(num_points, dim)
    selected = CORESETS[name](0.2).select(features, seeded())
    assert selected.tolist() == oracle_select(name, features, len(selected))


@pytest.mark.parametrize("name", CORESETS)
@pytest.mark.parametrize("dim", [60, 256])
def test_coreset_equals_float64_loop_on_clusters(name: str, dim: int) -> None:
    features = clustered(3000, dim)
    selected = CORESETS[name](0.15).select(features, seeded()).tolist()
    expected = oracle_select(name, features, len(selected))
    assert len(set(selected) & set(expected)) >= 0.999 * len(expected)


@pytest.mark.parametrize("name", CORESETS)
@pytest.mark.parametrize("num_points", [1, 2, 3, 9, 10, 11])
def test_coreset_of_very_few_points(name: str, num_points: int) -> None:
    features = gaussian(num_points, 7)
    for percentage in (1.0, 0.5, 0.01):
        selected = CORESETS[name](percentage).select(features, seeded())
        assert len(selected) == max(1, int(num_points * percentage))
        assert selected.tolist() == oracle_select(name, features, len(selected))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_keeps_everything_at_one(name: str) -> None:
    selected = build_sampler(name, 1.0).select(gaussian(1300, 20), seeded())
    assert selected.dtype == torch.int64
    assert sorted(selected.tolist()) == list(range(1300))


@pytest.mark.parametrize("name", ["random", *CORESETS])
def test_a_seed_fixes_the_selection(name: str) -> None:
    features = gaussian(400, 200)
    first, again, other = (build_sampler(name, 0.1).select(features, seeded(seed)) for seed in (3, 3, 4))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()
    assert len(set(first.tolist())) == len(first) == 40


@pytest.mark.parametrize("name", CORESETS)
def test_a_smaller_coreset_is_the_beginning_of_a_larger_one(name: str) -> None:
    features = gaussian(1500, 16)
    small, large = (CORESETS[name](share).select(features, seeded()).tolist() for share in (0.05, 0.6))
    assert large[: len(small)] == small


def test_coreset_of_points_on_a_line_by_hand() -> None:
    # All ten points are starting points, so the start is the mean distance to all: the largest is that of 100.
    features = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 100])[:, None]
    # Then 0 (100 away), then 8 (8 away from 0), then 4 (4 away from both); 2 and 6 tie at 2, the lower wins.
    for name in CORESETS:
        assert build_sampler(name, 0.6).select(features, seeded()).tolist() == [9, 0, 8, 4, 2, 6]


@pytest.mark.parametrize("name", CORESETS)
def test_no_point_is_farther_from_the_picks_than_these_from_each_other(name: str) -> None:
    """The property from which greedy k-center's guarantee follows: at most twice the optimal radius."""
    features = gaussian(900, 12)
    picked = features[CORESETS[name](0.1).select(features, seeded())].double()
    radius = torch.cdist(features.double(), picked).min(dim=1).values.max()
    separation = torch.pdist(picked).min()
    assert radius <= separation


@pytest.mark.parametrize("name", CORESETS)
def test_identical_points_are_still_picked_once_each(name: str) -> None:
    selected = CORESETS[name](0.9).select(torch.full((1500, 40), 3.5), seeded())
    assert selected.tolist() == list(range(1350))  # all distances are 0: lowest index first


@pytest.mark.parametrize("name", CORESETS)
def test_every_distinct_point_is_picked_before_a_duplicate(name: str) -> None:
    distinct = gaussian(200, 24)
    features = distinct.repeat(6, 1)[torch.randperm(1200, generator=seeded(5))]
    selected = CORESETS[name](0.5).select(features, seeded())
    assert len(set(selected.tolist())) == 600
    assert len(features[selected[:200]].unique(dim=0)) == 200


def test_block_size_does_not_change_the_picks() -> None:
    points = gaussian(2000, 8)
    start = points.square().sum(dim=1)
    expected = greedy_selection(points, start, 500, block_size=1)
    for block_size in (2, 7, 256, 1999, 2000, 5000):
        assert torch.equal(greedy_selection(points, start, 500, block_size), expected)


@pytest.mark.parametrize("block_size", [1, 3, 16, 1000])
def test_ties_go_to_the_lowest_index_inside_blocks_and_across_their_borders(block_size: int) -> None:
    # Integer coordinates: float32 holds all squared distances exactly, and a small lattice is full of ties.
    points = torch.randint(-3, 4, (600, 3), generator=seeded(6)).float()
    start = points.square().sum(dim=1)
    selected = greedy_selection(points, start, 400, block_size)
    assert selected.tolist() == oracle_greedy(points, start, 400)


@pytest.mark.parametrize("block_size", [16, 100])
def test_duplicates_on_a_lattice_are_picked_in_order_however_late_they_are_updated(block_size: int) -> None:
    # Many points at few places: most distances are 0 early, and are needed again once every place is taken.
    points = torch.randint(-2, 3, (900, 3), generator=seeded(7)).float()
    start = points.square().sum(dim=1)
    assert greedy_selection(points, start, 700, block_size).tolist() == oracle_greedy(points, start, 700)


def test_points_close_to_the_selection_are_not_updated_with_every_pick(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.cat([gaussian(500, 16), 0.01 * gaussian(4500, 16, seed=2)])  # 500 scattered, the rest in one spot
    start = points.square().sum(dim=1) + 1
    num_pairs = []
    shrink = greedy_module._LazyDistances._shrink

    def counted(self: Any, numbers: torch.Tensor, picked: torch.Tensor) -> None:
        num_pairs.append(len(numbers) * len(picked))
        shrink(self, numbers, picked)

    monkeypatch.setattr(greedy_module._LazyDistances, "_shrink", counted)
    selected = greedy_selection(points, start, 400, block_size=64)
    assert selected.tolist() == oracle_greedy(points, start, 400)
    assert sum(num_pairs) < 0.2 * len(points) * 400


def test_selection_can_be_continued() -> None:
    points = gaussian(1200, 10)
    start = points.square().sum(dim=1)
    whole = greedy_selection(points, start, 300)
    first = greedy_selection(points, start, 120)
    distances = torch.minimum(start, torch.cdist(points, points[first]).square().min(dim=1).values)
    distances[first] = -math.inf
    before = distances.clone()
    rest = greedy_selection(points, distances, 180)
    assert torch.cat([first, rest]).tolist() == whole.tolist()
    assert torch.equal(distances, before), "the caller's distances must stay as they are"
    with pytest.raises(ValueError, match="cannot pick 1081 of 1080"):
        greedy_selection(points, distances, 1081)


def test_chunk_borders_do_not_change_the_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    features = gaussian(1000, 150)
    expected = {name: oracle_select(name, features, 200) for name in CORESETS}
    monkeypatch.setattr(points_module, "CHUNK_ELEMENTS", 150 * 37)
    for name, sampler in CORESETS.items():
        assert sampler(0.2).select(features, seeded()).tolist() == expected[name]


def test_an_offset_of_all_features_does_not_change_the_selection() -> None:
    features = (gaussian(1500, 64) * 1024).round() / 1024  # so that the offset itself rounds nothing away
    sampler = ApproximateGreedyCoresetSampler(0.2)
    assert torch.equal(sampler.select(features + 1000, seeded()), sampler.select(features, seeded()))


def test_start_distances_equal_those_of_the_full_matrix() -> None:
    points = gaussian(500, 30) + 5
    matrix = torch.cdist(points.double(), points.double())
    sums = sampler_module._sums_of_squared_distances(Points(points))
    torch.testing.assert_close(sums, matrix.square().sum(dim=1), rtol=1e-12, atol=0)
    means = sampler_module._mean_distances(Points(points), points[:10])
    torch.testing.assert_close(means.double(), matrix[:, :10].mean(dim=1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SAMPLERS)
def test_several_selections_share_one_reduction(name: str) -> None:
    features = gaussian(300, 200)
    sampler, generator = build_sampler(name), seeded()
    points = sampler.reduce(features, generator)
    assert len(points) == 300
    assert torch.equal(sampler.select_reduced(points, generator), sampler.select(features, seeded()))
    subset = torch.arange(20, 299)[torch.arange(279) % 7 != 3]  # as a fold leaves out some images
    part = sampler.select_reduced(points.subset(subset), seeded(1))
    assert len(part) == (len(subset) if name == "identity" else len(subset) // 10)
    assert torch.equal(part, sampler.select_reduced(Points(points[subset]), seeded(1))), "as of a copy of the subset"
    nested = points.subset(subset).subset(torch.arange(0, 200, 3))
    assert torch.equal(nested[torch.tensor([1, 5])], points[subset[[3, 15]]])


def test_projection_keeps_small_features_and_preserves_distances_of_large_ones() -> None:
    small = gaussian(50, 128)
    generator = seeded()
    torch.testing.assert_close(project_features(small, generator)[:], small - small.mean(dim=0))
    assert torch.equal(generator.get_state(), seeded().get_state()), "no projection, nothing drawn"

    large = gaussian(60, 1024)
    projected = project_features(large, seeded())[:]
    assert projected.shape == (60, 128)
    target = torch.empty(60, 128)
    assert project_features(large, seeded(), target).matrix is target
    assert torch.equal(target, projected)
    # Entries uniform in +-1/sqrt(D) have variance 1/(3D): squared distances shrink by 128/(3D) on average.
    ratio = torch.pdist(projected).square() / torch.pdist(large).square() / (128 / (3 * 1024))
    assert abs(ratio.mean() - 1) < 0.05
    assert ratio.std() < 0.2  # sqrt(2/128) = 0.125 for a Gaussian projection


def test_features_are_left_as_they_are() -> None:
    features = gaussian(300, 20)
    before = features.clone()
    for name in SAMPLERS:
        build_sampler(name).select(features, seeded())
    assert torch.equal(features, before)


def test_selection_carries_no_gradient() -> None:
    features = gaussian(50, 8).requires_grad_()
    assert not ApproximateGreedyCoresetSampler(0.2).select(features, seeded()).requires_grad
    assert not project_features(features, seeded())[:].requires_grad


@pytest.mark.parametrize(
    ("num_points", "percentage", "expected"),
    [
        (100, 0.29, 29),  # int(100 * 0.29) is 28
        (1000, 0.001, 1),
        (10, 0.19, 1),
        (7, 0.01, 1),
        (1, 1.0, 1),
        (3, 1 / 3, 1),
        (42336, 0.1, 4233),
        (163856, 0.01, 1638),
        (99, 0.99999, 98),
    ],
)
def test_number_of_selected_points(num_points: int, percentage: float, expected: int) -> None:
    assert num_selected(num_points, percentage) == expected


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("percentage", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_percentage_outside_its_range_is_refused(name: str, percentage: float) -> None:
    with pytest.raises(ConfigurationError, match=r"outside \(0, 1\]"):
        build_sampler(name, percentage)


def test_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigurationError, match="did you mean approx_greedy_coreset"):
        build_sampler("aprox_greedy_coreset", 0.1)
    with pytest.raises(ConfigurationError, match="identity, random, greedy_coreset, approx_greedy_coreset"):
        build_sampler("xyz", 0.1)


def test_identity_refuses_a_share_it_would_ignore() -> None:
    for accepted in (1.0, 0.1):
        assert isinstance(build_sampler("identity", accepted), IdentitySampler)
    with pytest.raises(ConfigurationError, match="has no effect on the identity sampler"):
        build_sampler("identity", 0.25)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_refused(name: str, value: float) -> None:
    features = gaussian(200, 16)
    features[137, 3] = value
    with pytest.raises(DataError, match="infinite or NaN features") as error:
        build_sampler(name).select(features, seeded())
    assert "\n" not in str(error.value)


def test_features_too_large_to_square_are_refused() -> None:
    with pytest.raises(DataError, match="overflow float32"):
        ApproximateGreedyCoresetSampler(0.5).select(gaussian(20, 4) * 1e30, seeded())


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (8,), (2, 3, 4)])
def test_features_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="expected \\[N, D\\]"):
        RandomSampler(0.5).select(torch.zeros(shape), seeded())


def test_registry_builds_samplers() -> None:
    assert list(SAMPLERS) == ["identity", "random", "greedy_coreset", "approx_greedy_coreset"]
    assert all(isinstance(build(0.1), Sampler) for build in SAMPLERS.values())


MEMORY_SCRIPT = """
import resource, sys, torch
from patchcore.memory.sampler import build_sampler
torch.set_num_threads(1)
name, num_points, dim = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
features = torch.rand(num_points, dim, generator=torch.Generator().manual_seed(0))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
select = build_sampler(name, 0.01).select
select(features[:3000], torch.Generator().manual_seed(0))  # loads the libraries that are going to be loaded
before = peak()
select(features, torch.Generator().manual_seed(0))
print((peak() - before) / features.nbytes)
"""


@pytest.mark.parametrize(
    ("name", "num_points", "dim", "share"),
    [
        ("approx_greedy_coreset", 40000, 1024, 0.25),  # 128 of 1024 columns are 12.5 %
        ("greedy_coreset", 40000, 1024, 0.25),
        ("approx_greedy_coreset", 163856, 128, 0.15),  # no projection, and no centred copy either
    ],
)
def test_extra_memory_is_the_projection_and_little_more(name: str, num_points: int, dim: int, share: float) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, name, str(num_points), str(dim)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert float(result.stdout) < share

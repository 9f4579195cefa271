"""Choice of the patch embeddings that enter the memory bank.

The two coreset samplers solve the k-center problem greedily: always take the point that is farthest from
everything taken so far. `greedy_selection` does this exactly, but pays one matrix product per block of picks
where the textbook loop pays one matrix-vector product per pick.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import numpy as np
import torch

from patchcore.errors import ConfigurationError, DataError
from patchcore.runtime import progress

PROJECTION_DIM = 128  # as in the original repository
NUM_STARTING_POINTS = 10  # as in the original repository
BLOCK_SIZE = 512  # candidates per pass: with fewer there are more passes, with more each pick costs more
CHUNK_ELEMENTS = 2**19  # numbers worked on at once: temporaries of a few MB for any number of points
DEFAULT_PERCENTAGE = 0.1


class Sampler(ABC):
    """A rule that picks the rows of a feature matrix that are kept."""

    @torch.no_grad()
    def select(self, features: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Pick rows of the feature matrix.

        Args:
            features: Patch embeddings [N, D] float32, finite, on any device, N >= 1.
            generator: Source of all randomness, on the CPU, so that a seed means the same on every device.

        Returns:
            Distinct row numbers [M] int64 on the device of `features`, in order of selection.

        Raises:
            DataError: There are no features, or some are not finite.
        """
        return self.select_reduced(self.reduce(features, generator), generator)

    @torch.no_grad()
    def reduce(self, features: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return the points that `select_reduced` chooses from, so that several selections share this work.

        Args:
            features: Patch embeddings [N, D] float32, finite, on any device, N >= 1.
            generator: Source of all randomness, on the CPU.

        Returns:
            Points [N, R] float32 on the device of `features`; the features themselves unless the sampler needs less.

        Raises:
            DataError: There are no features, or some are not finite.
        """
        if features.ndim != 2 or 0 in features.shape:
            raise DataError(
                f"found features of shape {list(features.shape)}, expected [N, D] with at least one row: "
                "check that the class has training images"
            )
        _check_finite(features)
        return self._reduce(features, generator)

    def _reduce(self, features: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return the points to choose from: the features themselves unless a sampler needs less."""
        return features

    @torch.no_grad()
    def select_reduced(self, points: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Pick rows of what `reduce` returned, or of a subset of its rows.

        Args:
            points: [N, R] float32, on any device, N >= 1.
            generator: Source of all randomness, on the CPU.

        Returns:
            Distinct row numbers [M] int64 on the device of `points`, in order of selection.
        """
        return self._select(points, generator).to(points.device)

    @abstractmethod
    def _select(self, points: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Pick rows of points that are known to be valid."""


class IdentitySampler(Sampler):
    """Keeps every row."""

    def _select(self, points: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.arange(len(points))


class SubsetSampler(Sampler):
    """A sampler that keeps a given share of the rows."""

    def __init__(self, percentage: float) -> None:
        """Store the share.

        Args:
            percentage: Share of rows to keep, in (0, 1].

        Raises:
            ConfigurationError: The share is outside (0, 1].
        """
        self.percentage = _checked_percentage(percentage)


class RandomSampler(SubsetSampler):
    """Keeps a uniformly drawn share of the rows."""

    def _select(self, points: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        num_select = num_selected(len(points), self.percentage)
        return torch.randperm(len(points), generator=generator)[:num_select]


class GreedyCoresetSampler(SubsetSampler):
    """Keeps a greedy k-center coreset that starts at the point farthest from all others.

    Source: PatchCore, Algorithm 1 and Eq. 5. As in the original repository, the first point is the one whose
    row of the full distance matrix has the largest norm; here that norm is computed without the matrix.
    """

    def _reduce(self, features: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return project_features(features, generator)

    def _select(self, points: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return greedy_selection(
            points,
            self._initial_squared_distances(points, generator),
            num_selected(len(points), self.percentage),
        )

    def _initial_squared_distances(self, points: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return [N]: how far each point counts as being from the selection before the first pick."""
        return _sums_of_squared_distances(points)


class ApproximateGreedyCoresetSampler(GreedyCoresetSampler):
    """Keeps a greedy k-center coreset that starts at the point farthest from ten random ones.

    Source: the original repository's sampler of the same name. A point's distance to the selection starts as
    its mean distance to the random points; these are not in the selection themselves.
    """

    def _initial_squared_distances(self, points: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return [N]: the squared mean Euclidean distance to the random points."""
        starts = torch.randperm(len(points), generator=generator)[:NUM_STARTING_POINTS]
        return _mean_distances(points, points[starts.to(points.device)]).square()


@torch.no_grad()
def project_features(features: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Centre the features and project them at random to at most 128 dimensions.

    Source: the original repository, a bias-free linear layer as torch initialises it, uniform in
    +-1/sqrt(D). Two departures. It projects whenever D is not 128; we do so only where that reduces the
    dimension, since a projection upwards costs time and distorts distances. And it does not centre; distances
    do not change by it, but float32 keeps more of their digits.

    Args:
        features: [N, D] float32, finite.
        generator: Draws the projection, on the CPU.

    Returns:
        Points [N, min(D, 128)] float32 on the device of `features`.
    """
    num_points, dim = features.shape
    centre = _column_means(features)
    points = features.new_empty((num_points, min(dim, PROJECTION_DIM)), dtype=torch.float32)
    if dim <= PROJECTION_DIM:
        return torch.sub(features, centre, out=points)
    bound = 1 / math.sqrt(dim)
    projection = torch.empty(PROJECTION_DIM, dim).uniform_(-bound, bound, generator=generator)
    projection = projection.T.to(features.device)  # [D, 128]
    for rows in _row_chunks(num_points, dim):
        torch.mm(features[rows].float() - centre, projection, out=points[rows])  # [rows, 128]
    return points


@torch.no_grad()
def greedy_selection(
    points: torch.Tensor,
    initial_squared_distances: torch.Tensor,
    num_select: int,
    block_size: int = BLOCK_SIZE,
) -> torch.Tensor:
    """Pick, again and again, the point farthest from everything picked so far.

    Each pass takes the `block_size` points of largest current distance as candidates and picks among them for
    as long as the best one beats the best point outside. Distances only shrink, so a point outside cannot
    overtake: the picks are those of the loop that updates all distances after each one. Then all distances
    are updated with the new picks by one matrix product.

    Of points at the same distance, the one with the lowest index is picked, inside a block and across its
    border. "Same" refers to the computed squared distances. Their error is about 1e-7 of the squared norm of
    the points, and differs between two identical points, because what a matrix product gives for a row
    depends on where in the matrix the row stands. Points closer to a tie than that may come in either order.

    Args:
        points: [N, D] float32, finite, centred near the origin.
        initial_squared_distances: [N], squared distance of each point to the selection so far, >= 0;
            minus infinity for a point that must not be picked, such as one that is in the selection.
        num_select: How many points to pick, at most the number of points that may be picked.
        block_size: Candidates per pass; changes the time, not the picks.

    Returns:
        Distinct indices [num_select] int64 on the device of `points`, in order of selection.

    Raises:
        ValueError: More points are asked for than may be picked.
        DataError: The points are so large that their squares overflow float32.
    """
    distances = initial_squared_distances.to(points.device, torch.float32, copy=True)
    num_pickable = int((distances >= 0).sum())
    if num_select > num_pickable:
        raise ValueError(f"cannot pick {num_select} of {num_pickable} points")
    squared_norms = _squared_norms(points)
    picks = torch.empty(num_select, dtype=torch.int64, device=points.device)
    num_picked = 0
    with progress(None, "coreset", total=num_select) as bar:
        while num_picked < num_select:
            block = min(block_size, num_pickable - num_picked)
            candidates, bound, first_outside = _farthest(distances, block)
            order = _select_within_block(
                distances[candidates].cpu().numpy(),
                _pairwise_squared_distances(points[candidates]).cpu().numpy(),
                bound,
                int(torch.searchsorted(candidates, first_outside)),
                min(block, num_select - num_picked),
            )
            picked = candidates[torch.from_numpy(order).to(candidates.device)]
            _shrink_distances(distances, points, squared_norms, picked)
            picks[num_picked : num_picked + len(picked)] = picked
            num_picked += len(picked)
            bar.update(len(picked))
    return picks


def _farthest(distances: torch.Tensor, num_candidates: int) -> tuple[torch.Tensor, float, int]:
    """Return the points of largest distance, the lowest index first among equals.

    Args:
        distances: [N], minus infinity for points that may not be picked.
        num_candidates: How many to return, at most the number of points that may be picked.

    Returns:
        Indices [num_candidates] in ascending order; the largest distance among the points left outside; the
        lowest index among the points outside that have this distance.
    """
    if num_candidates == len(distances):
        return torch.arange(num_candidates, device=distances.device), -math.inf, num_candidates
    bound = distances.topk(num_candidates + 1).values[-1]
    above = torch.nonzero(distances > bound).flatten()
    tied = torch.nonzero(distances == bound).flatten()
    num_tied_inside = num_candidates - len(above)  # less than len(tied), as topk saw one point more
    candidates = torch.cat([above, tied[:num_tied_inside]]).sort().values
    return candidates, float(bound), int(tied[num_tied_inside])


def _select_within_block(
    distances: np.ndarray, pairwise: np.ndarray, bound: float, num_before_outside: int, max_picks: int
) -> np.ndarray:
    """Pick greedily among candidates for as long as the best one is provably the best of all points.

    In numpy, because one step on a few hundred numbers takes less time than starting a torch kernel.

    Args:
        distances: [B] float32, squared distances of the candidates; overwritten.
        pairwise: [B, B] float32, squared distances between candidates.
        bound: Largest squared distance among all points that are not candidates.
        num_before_outside: How many candidates have a lower index than the first point that attains `bound`;
            these win a tie against it.
        max_picks: Where to stop, in [1, B].

    Returns:
        Positions [P] int64 in the block in order of selection, 1 <= P <= max_picks.
    """
    order: list[int] = []
    while len(order) < max_picks:
        best = int(distances.argmax())  # the first of equals
        wins = distances[best] > bound or (distances[best] == bound and best < num_before_outside)
        if not wins:
            break
        order.append(best)
        np.minimum(distances, pairwise[best], out=distances)
        distances[best] = -np.inf
    return np.asarray(order, dtype=np.int64)


def _shrink_distances(
    distances: torch.Tensor, points: torch.Tensor, squared_norms: torch.Tensor, picked: torch.Tensor
) -> None:
    """Lower each point's squared distance to that of the nearest newly picked point, in place."""
    centres = points[picked]  # [P, D]
    for rows in _row_chunks(len(points), len(picked)):
        # |x|^2 is the same for all centres, so it is added after the minimum, to P times fewer numbers.
        partial = torch.addmm(squared_norms[picked], points[rows], centres.T, alpha=-2)  # [rows, P]
        nearest = partial.amin(dim=1).add_(squared_norms[rows]).clamp_(min=0)  # [rows]
        torch.minimum(distances[rows], nearest, out=distances[rows])
    distances[picked] = -math.inf


def _pairwise_squared_distances(points: torch.Tensor) -> torch.Tensor:
    """Return squared Euclidean distances [B, B] between points [B, D]."""
    squared_norms = points.square().sum(dim=1)
    products = torch.addmm(squared_norms, points, points.T, alpha=-2)
    return products.add_(squared_norms[:, None]).clamp_(min=0)


def _mean_distances(points: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Return the mean Euclidean distance [N] of points [N, D] to references [R, D]."""
    means = points.new_empty(len(points))
    for rows in _row_chunks(*points.shape):
        # The exact mode: the start decides the first pick, and there are few references.
        distances = torch.cdist(points[rows], references, compute_mode="donot_use_mm_for_euclid_dist")
        means[rows] = distances.mean(dim=1)
    return means


def _sums_of_squared_distances(points: torch.Tensor) -> torch.Tensor:
    """Return the sum of squared distances [N] of each point to all points, in O(N D).

    sum_y |x - y|^2 = N |x|^2 + sum_y |y|^2 - 2 x . sum_y y. Computed in float64 because the terms cancel, and
    on the CPU because not every device has float64.
    """
    num_points = len(points)
    total = torch.zeros(points.shape[1], dtype=torch.float64)
    squared_norms = torch.empty(num_points, dtype=torch.float64)
    products = torch.empty(num_points, dtype=torch.float64)
    for rows in _row_chunks(*points.shape):
        chunk = points[rows].cpu().double()
        total += chunk.sum(dim=0)
        squared_norms[rows] = chunk.square().sum(dim=1)
    for rows in _row_chunks(*points.shape):
        products[rows] = points[rows].cpu().double() @ total
    sums = num_points * squared_norms + squared_norms.sum() - 2 * products
    return sums.clamp_(min=0)


def _squared_norms(points: torch.Tensor) -> torch.Tensor:
    """Return the squared norm [N] of each row, refusing those that float32 cannot hold."""
    squared_norms = points.new_empty(len(points))
    for rows in _row_chunks(*points.shape):
        squared_norms[rows] = points[rows].square().sum(dim=1)
    if not math.isfinite(float(squared_norms.max()) * 4):  # |x - y|^2 <= 2 |x|^2 + 2 |y|^2
        raise DataError("features overflow float32 when squared, expected values below 1e18: check the backbone")
    return squared_norms


def _column_means(features: torch.Tensor) -> torch.Tensor:
    """Return the mean [D] float32 of features [N, D], accumulated over chunks in float64."""
    total = torch.zeros(features.shape[1], dtype=torch.float64)
    for rows in _row_chunks(*features.shape):
        total += features[rows].float().sum(dim=0).cpu().double()
    return (total / len(features)).float().to(features.device)


def _check_finite(features: torch.Tensor) -> None:
    """Raise DataError where a feature is infinite or not a number."""
    for rows in _row_chunks(*features.shape):
        extremes = torch.stack(features[rows].aminmax())  # one pass; a NaN anywhere becomes both extremes
        if not bool(extremes.isfinite().all()):
            raise DataError(
                "found infinite or NaN features, expected finite numbers: check the weights of the backbone "
                "and the training images"
            )


def _row_chunks(num_rows: int, row_elements: int) -> Iterator[slice]:
    """Yield slices that cover all rows, short enough for temporaries of `row_elements` numbers a row."""
    rows_per_chunk = max(1, CHUNK_ELEMENTS // row_elements)
    for start in range(0, num_rows, rows_per_chunk):
        yield slice(start, min(start + rows_per_chunk, num_rows))


def num_selected(num_points: int, percentage: float) -> int:
    """Return how many of `num_points` a share stands for: rounded down, at least one.

    The original's int(num_points * percentage) gives 28 for 29 % of 100, as binary floats fall just short of
    the product that was meant. A product less than a millionth below an integer counts as that integer.
    """
    return max(1, math.floor(num_points * percentage + 1e-6))


def _checked_percentage(percentage: float) -> float:
    """Return the share, or raise ConfigurationError where it is outside (0, 1]."""
    if not 0 < percentage <= 1:  # NaN fails too
        raise ConfigurationError(
            f"percentage {percentage} is outside (0, 1]: give the share of patches to keep, for example 0.1"
        )
    return percentage


def _build_identity(percentage: float) -> IdentitySampler:
    """Build the sampler that keeps all, refusing a share that it could not honour."""
    if _checked_percentage(percentage) not in (1, DEFAULT_PERCENTAGE):
        raise ConfigurationError(
            f"percentage {percentage} has no effect on the identity sampler, which keeps every patch: "
            "leave the percentage out, or choose random or approx_greedy_coreset"
        )
    return IdentitySampler()


SAMPLERS: dict[str, Callable[[float], Sampler]] = {
    "identity": _build_identity,
    "random": RandomSampler,
    "greedy_coreset": GreedyCoresetSampler,
    "approx_greedy_coreset": ApproximateGreedyCoresetSampler,
}


def build_sampler(name: str, percentage: float = DEFAULT_PERCENTAGE) -> Sampler:
    """Build a sampler by name.

    Args:
        name: A key of SAMPLERS.
        percentage: Share of patches to keep, in (0, 1]. `identity` keeps all: it accepts 1 and the default,
            which stands for "not given".

    Returns:
        The sampler.

    Raises:
        ConfigurationError: The name is unknown, the share is outside (0, 1], or the sampler cannot honour it.
    """
    if name not in SAMPLERS:
        near = difflib.get_close_matches(name, SAMPLERS, n=1)
        hint = f"did you mean {near[0]}?" if near else "choose one of these"
        raise ConfigurationError(f"sampler {name!r} is unknown, expected one of {', '.join(SAMPLERS)}: {hint}")
    return SAMPLERS[name](percentage)

"""Choice of the patch embeddings that enter the memory bank.

The two coreset samplers solve the k-center problem greedily: always take the point that is farthest from everything
taken so far, as `greedy_selection` does.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from patchcore.errors import ConfigurationError, DataError
from patchcore.memory.greedy_selection import BLOCK_SIZE, farthest_points
from patchcore.memory.points import PROJECTION_DIM, Points, check_finite, project_features

NUM_STARTING_POINTS = 10  # as in the original repository
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
    def reduce(self, features: torch.Tensor, generator: torch.Generator, out: torch.Tensor | None = None) -> Points:
        """Return the points that `select_reduced` chooses from, so that several selections share this work.

        Args:
            features: Patch embeddings [N, D] float32, finite, on any device, N >= 1.
            generator: Source of all randomness, on the CPU.
            out: [N, projection_dim(D)] float32, where a projection goes; None for a new one.

        Returns:
            Points [N, R] on the device of `features`; they read the features themselves unless there is a projection.

        Raises:
            DataError: There are no features, or some are not finite.
        """
        if features.ndim != 2 or 0 in features.shape:
            raise DataError(
                f"found features of shape {list(features.shape)}, expected [N, D] with at least one row: "
                "check that the class has training images"
            )
        return self._reduce(features, generator, out)

    def projection_dim(self, dim: int) -> int:
        """Return how many numbers `reduce` stores for each feature of `dim` numbers: 0 without a projection."""
        return 0

    def _reduce(self, features: torch.Tensor, generator: torch.Generator, out: torch.Tensor | None) -> Points:
        """Return the points to choose from: the features themselves unless a sampler needs less."""
        check_finite(features)
        return Points(features)

    @torch.no_grad()
    def select_reduced(self, points: Points, generator: torch.Generator) -> torch.Tensor:
        """Pick some of the points that `reduce` returned, or of a subset of them.

        Args:
            points: [N, R], on any device, N >= 1.
            generator: Source of all randomness, on the CPU.

        Returns:
            Distinct numbers [M] int64 of points, on their device, in order of selection.
        """
        return self._select(points, generator).to(points.device)

    @abstractmethod
    def _select(self, points: Points, generator: torch.Generator) -> torch.Tensor:
        """Pick some of the points, which are known to be valid."""


class IdentitySampler(Sampler):
    """Keeps every row."""

    def _select(self, points: Points, generator: torch.Generator) -> torch.Tensor:
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

    def _select(self, points: Points, generator: torch.Generator) -> torch.Tensor:
        num_select = num_selected(len(points), self.percentage)
        return torch.randperm(len(points), generator=generator)[:num_select]


class GreedyCoresetSampler(SubsetSampler):
    """Keeps a greedy k-center coreset that starts at the point farthest from all others.

    Source: PatchCore, Algorithm 1 and Eq. 5. As in the original repository, the first point is the one whose
    row of the full distance matrix has the largest norm; here that norm is computed without the matrix.
    """

    def projection_dim(self, dim: int) -> int:
        return PROJECTION_DIM if dim > PROJECTION_DIM else 0

    def _reduce(self, features: torch.Tensor, generator: torch.Generator, out: torch.Tensor | None) -> Points:
        return project_features(features, generator, out)

    @torch.no_grad()
    def select_number(
        self, points: Points, num_select: int, generator: torch.Generator, handicaps: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pick so many of the points instead of the sampler's share; else as `select_reduced`.

        Args:
            points: [N, R].
            num_select: How many, at most N.
            generator: Source of all randomness, on the CPU.
            handicaps: [N] float32, >= 0: each point counts as farther, by so much in its squared distances.
        """
        # Nothing here refers to the distances: they need not be copied.
        return farthest_points(
            points,
            self._initial_squared_distances(points, generator).to(points.device, torch.float32),
            num_select,
            BLOCK_SIZE,
            handicaps,
        )

    def _select(self, points: Points, generator: torch.Generator) -> torch.Tensor:
        return self.select_number(points, num_selected(len(points), self.percentage), generator)

    def _initial_squared_distances(self, points: Points, generator: torch.Generator) -> torch.Tensor:
        """Return [N]: how far each point counts as being from the selection before the first pick."""
        return _sums_of_squared_distances(points)


class ApproximateGreedyCoresetSampler(GreedyCoresetSampler):
    """Keeps a greedy k-center coreset that starts at the point farthest from ten random ones.

    Source: the original repository's sampler of the same name. A point's distance to the selection starts as
    its mean distance to the random points; these are not in the selection themselves.
    """

    def _initial_squared_distances(self, points: Points, generator: torch.Generator) -> torch.Tensor:
        """Return [N]: the squared mean Euclidean distance to the random points."""
        starts = torch.randperm(len(points), generator=generator)[:NUM_STARTING_POINTS]
        return _mean_distances(points, points[starts.to(points.device)]).square_()


def _mean_distances(points: Points, references: torch.Tensor) -> torch.Tensor:
    """Return the mean Euclidean distance [N] of points [N, D] to references [R, D]."""
    means = torch.empty(len(points), device=points.device)
    for rows in points.chunks(points.dim):
        # The exact mode: the start decides the first pick, and there are few references.
        distances = torch.cdist(points[rows], references, compute_mode="donot_use_mm_for_euclid_dist")
        means[rows] = distances.mean(dim=1)
    return means


def _sums_of_squared_distances(points: Points) -> torch.Tensor:
    """Return the sum of squared distances [N] of each point to all points, in O(N D).

    sum_y |x - y|^2 = N |x|^2 + sum_y |y|^2 - 2 x . sum_y y. Computed in float64 because the terms cancel, and
    on the CPU because not every device has float64.
    """
    num_points = len(points)
    total = torch.zeros(points.dim, dtype=torch.float64)
    norms = torch.empty(num_points, dtype=torch.float64)
    products = torch.empty(num_points, dtype=torch.float64)
    for rows in points.chunks(points.dim):
        chunk = points[rows].cpu().double()
        total += chunk.sum(dim=0)
        norms[rows] = chunk.square().sum(dim=1)
    for rows in points.chunks(points.dim):
        products[rows] = points[rows].cpu().double() @ total
    sums = num_points * norms + norms.sum() - 2 * products
    return sums.clamp_(min=0)


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

"""Greedy selection of the point farthest from all picks so far, exact, at one matrix product per block of picks.

The textbook loop pays one matrix-vector product per pick.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from patchcore.memory.points import CHUNK_ELEMENTS, Points, row_chunks, squared_norms
from patchcore.runtime import progress

BLOCK_SIZE = 512  # candidates per pass: with fewer there are more passes, with more each pick costs more
MIN_SPARE_CANDIDATES = 64  # of the last pass, which otherwise takes few more candidates than it needs picks
NUMBERS_PER_LATE_POINT = 4  # its row, twice, and what it has seen: what the look-up of late points costs
LEVEL_STEP = 0.9  # factor on the level of up-to-date distances; nearer to 1, fewer points but more updates


@torch.no_grad()
def greedy_selection(
    points: Points | torch.Tensor,
    initial_squared_distances: torch.Tensor,
    num_select: int,
    block_size: int = BLOCK_SIZE,
) -> torch.Tensor:
    """Pick, again and again, the point farthest from everything picked so far.

    Each pass takes the `block_size` points of largest current distance as candidates and picks among them for
    as long as the best one beats the best point outside. Distances only shrink, so a point outside cannot
    overtake: the picks are those of the loop that updates all distances after each one. For the same reason
    a distance that lacks some picks is an upper bound, and is updated only when it reaches the candidates.

    Of points at the same distance, the one with the lowest index is picked, inside a block and across its
    border. "Same" refers to the computed squared distances. Their error is about 1e-7 of the squared norm of
    the points, and differs between two identical points, because what a matrix product gives for a row
    depends on where in the matrix the row stands. Points closer to a tie than that may come in either order.

    Args:
        points: [N, D], finite, centred near the origin.
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
    points = Points(points) if isinstance(points, torch.Tensor) else points
    distances = initial_squared_distances.to(points.device, torch.float32, copy=True)
    return farthest_points(points, distances, num_select, block_size)


@torch.no_grad()
def farthest_points(
    points: Points,
    distances: torch.Tensor,
    num_select: int,
    block_size: int,
    handicaps: torch.Tensor | None = None,
) -> torch.Tensor:
    """Do what `greedy_selection` does, from float32 distances on the device of the points, which it overwrites.

    Args:
        points: [N, D].
        distances: [N], as there.
        num_select: As there.
        block_size: As there.
        handicaps: [N] float32, >= 0, what each point's squared distance to any pick is increased by; None for nothing.
    """
    num_pickable = int((distances >= 0).sum())
    if num_select > num_pickable:
        raise ValueError(f"cannot pick {num_select} of {num_pickable} points")
    picks = torch.empty(num_select, dtype=torch.int64, device=points.device)
    lazy = _LazyDistances(points, distances, picks, handicaps)
    with progress(None, "coreset", total=num_select) as bar:
        while (num_left := num_select - lazy.num_picked) > 0:
            # About three candidates in four are picked: more than the last pass needs would only be updated.
            block = min(block_size, num_pickable - lazy.num_picked, num_left + num_left // 4 + MIN_SPARE_CANDIDATES)
            candidates, bound, first_outside = lazy.farthest(block)
            order = _select_within_block(
                distances[candidates].cpu().numpy(),
                lazy.pairwise(candidates).cpu().numpy(),
                bound,
                int(torch.searchsorted(candidates, first_outside)),
                min(block, num_left),
            )
            lazy.add(candidates[torch.from_numpy(order).to(candidates.device)])
            bar.update(len(order))
    return picks


class _LazyDistances:
    """Squared distances to the picks, each updated only when the points that are farthest may depend on it.

    Where points are redundant most of them are soon closer to the selection than its last pick will be, and
    from then on cost nothing.
    """

    def __init__(
        self, points: Points, distances: torch.Tensor, picks: torch.Tensor, handicaps: torch.Tensor | None
    ) -> None:
        """Start without picks.

        Args:
            points: [N, D].
            distances: [N] float32, updated in place; minus infinity for points that may not be picked.
            picks: [M] int64, where the picks go.
            handicaps: [N] float32, what each point's squared distance to any pick is increased by.
        """
        self.num_picked = 0
        self._points = points
        self._norms = squared_norms(points)
        self._distances = distances
        self._picks = picks
        self._handicaps = handicaps
        self._num_seen = torch.zeros(len(points), dtype=torch.int32, device=points.device)  # picks in each distance
        # Made once: megabytes that come and go leave holes in the heap, which grows by several times as much.
        self._products = torch.empty(CHUNK_ELEMENTS, device=points.device)
        self._expected_bound = math.inf  # of the next pass
        self._last_bound = math.nan

    def pairwise(self, candidates: torch.Tensor) -> torch.Tensor:
        """Return squared distances [B, B] between points of these numbers [B]: row i to a pick of point i."""
        points = self._points[candidates]
        norms = points.square().sum(dim=1)
        squared = torch.addmm(norms, points, points.T, alpha=-2).add_(norms[:, None]).clamp_(min=0)
        return squared if self._handicaps is None else squared.add_(self._handicaps[candidates])

    def add(self, picked: torch.Tensor) -> None:
        """Enter new picks [P]; the distances do not know them yet."""
        self._picks[self.num_picked : self.num_picked + len(picked)] = picked
        self._distances[picked] = -math.inf
        self.num_picked += len(picked)

    def farthest(self, num_candidates: int) -> tuple[torch.Tensor, float, int]:
        """Return the points of largest distance to all picks, the lowest index first among equals.

        Args:
            num_candidates: How many to return, at most the number of points that may be picked.

        Returns:
            Indices [num_candidates] in ascending order; the largest distance among the points left outside; the
            lowest index among the points outside that have this distance. Candidates know all picks, and so do
            all points outside at this distance.
        """
        level = math.inf  # points at this distance or farther know all picks
        target = self._expected_bound
        while (bound := self._distance_of_rank(num_candidates)) < level:
            level = min(bound, target)
            self._update_from(level)
            target = level * LEVEL_STEP
        # From pass to pass the bound falls by much the same factor: the next one is reached in one or two updates.
        self._expected_bound = bound * bound / self._last_bound if self._last_bound > 0 else math.inf
        self._last_bound = bound
        return _split_at(self._distances, num_candidates, bound)

    def _distance_of_rank(self, rank: int) -> float:
        """Return the largest distance but `rank`, of the distances as they are."""
        if rank == len(self._distances):
            return -math.inf
        if self._distances.device.type != "cpu":
            return float(self._distances.topk(rank + 1).values[-1])
        place = len(self._distances) - rank - 1
        return float(np.partition(self._distances.numpy(), place)[place])  # a copy; topk holds four times as much

    def _update_from(self, level: float) -> None:
        """Make the points at this distance or farther know all picks."""
        for rows in self._points.chunks(NUMBERS_PER_LATE_POINT):
            is_late = (self._distances[rows] >= max(level, 0)) & (self._num_seen[rows] < self.num_picked)
            late = torch.nonzero(is_late).flatten().add_(rows.start)
            num_seen = self._num_seen[late]
            for first in torch.bincount(num_seen).nonzero().flatten().tolist():
                numbers = late[num_seen == first]
                for picked in self._picks[first : self.num_picked].split(BLOCK_SIZE):
                    self._shrink(numbers, picked)
            self._num_seen[late] = self.num_picked

    def _shrink(self, numbers: torch.Tensor, picked: torch.Tensor) -> None:
        """Lower the distance of the points of these numbers [K] to that of the nearest of some picks."""
        points, norms = self._points, self._norms
        centres, centre_norms = points[picked], norms[picked]  # [P, D], [P]
        for chunk in row_chunks(len(numbers), max(len(picked), points.dim)):
            rows = numbers[chunk]
            partial = self._products[: len(rows) * len(picked)].view(len(rows), len(picked))
            # |x|^2 is the same for all centres, so it is added after the minimum, to P times fewer numbers.
            torch.addmm(centre_norms, points[rows], centres.T, alpha=-2, out=partial)
            nearest = partial.amin(dim=1).add_(norms[rows]).clamp_(min=0)  # [rows]
            if self._handicaps is not None:
                nearest += self._handicaps[rows]
            self._distances[rows] = torch.minimum(self._distances[rows], nearest)


def _split_at(distances: torch.Tensor, num_candidates: int, bound: float) -> tuple[torch.Tensor, float, int]:
    """Return candidates, bound and first point outside, as `_LazyDistances.farthest`, for the bound that it found."""
    if num_candidates == len(distances):
        return torch.arange(num_candidates, device=distances.device), bound, num_candidates
    above = torch.nonzero(distances > bound).flatten()
    tied = torch.nonzero(distances == bound).flatten()
    num_tied_inside = num_candidates - len(above)  # less than len(tied): the bound's rank is one point farther
    candidates = torch.cat([above, tied[:num_tied_inside]]).sort().values
    return candidates, bound, int(tied[num_tied_inside])


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

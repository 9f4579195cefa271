"""More patches for a memory bank that is there: the greedy selection goes on where it stopped."""

from __future__ import annotations

import torch

from patchcore.memory.greedy_selection import greedy_selection
from patchcore.memory.sampler import GreedyCoresetSampler, Sampler, num_selected

ROWS_AT_ONCE = 4096  # bounds the distances that are held


@torch.no_grad()
def continued_selection(
    sampler: Sampler, bank: torch.Tensor, features: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Pick rows of new features as the sampler does, at its share.

    A greedy sampler counts the bank as picked: its first pick is the feature that is farthest from the bank. The others
    pick among the new features alone, as they look at no distances.

    Args:
        sampler: The rule, with its share of the new features.
        bank: [M, D] float32, what was kept before, M >= 1.
        features: [N, D] float32, finite, N >= 1.
        generator: Source of all randomness, on the CPU.

    Returns:
        Distinct row numbers of `features` int64, in order of selection.

    Raises:
        DataError: There are no features, or some are not finite.
    """
    if not isinstance(sampler, GreedyCoresetSampler):
        return sampler.select(features, generator)
    sampler.reduce(features[:1], torch.Generator())  # refuses what no selection can be made from
    points = sampler.reduce(torch.cat([bank, features]), generator)  # one projection, one centre
    picked, rest = points[: len(bank)], points.subset(torch.arange(len(bank), len(points), device=points.device))
    starts = range(0, len(rest), ROWS_AT_ONCE)
    distances = torch.cat([torch.cdist(rest[i : i + ROWS_AT_ONCE], picked).amin(dim=1) for i in starts])
    return greedy_selection(rest, distances.square(), num_selected(len(rest), sampler.percentage))

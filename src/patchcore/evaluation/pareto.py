"""Which of several methods no other one beats in both cost and quality."""

from __future__ import annotations

from collections.abc import Sequence


def non_dominated(costs: Sequence[float], qualities: Sequence[float]) -> list[bool]:
    """Return for each point whether no other one is at least as good in both and better in one.

    Args:
        costs: Lower is better.
        qualities: Higher is better, as many as costs.
    """
    points = list(zip(costs, qualities, strict=True))
    return [
        not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points) for cost, quality in points
    ]

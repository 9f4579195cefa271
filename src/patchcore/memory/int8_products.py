"""Rows in 8 bits, and their products, which processors with instructions for them compute several times as fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

LARGEST_CODE = 127
MAX_DIMENSION = 2**17  # products of codes fit 32 bits up to it: 127 * 127 * 2**17 < 2**31


@dataclass(frozen=True)
class Codes:
    """Rows as integers times a step of each row.

    Attributes:
        values: int8 [n, D], in [-127, 127].
        steps: float32 [n]; a row is about its values times its step.
        squared_norms: float32 [n], of values times step.
        errors: float32 [n], the Euclidean distance of each row to its values times its step.
    """

    values: torch.Tensor
    steps: torch.Tensor
    squared_norms: torch.Tensor
    errors: torch.Tensor


def encoded(rows: torch.Tensor) -> Codes:
    """Encode rows [n, D] float32, so that the largest magnitude of each is 127 steps. What is not finite stays so."""
    steps = rows.abs().amax(dim=1, keepdim=True)  # a seventh of the time of the norm that is the maximum
    steps = steps.clamp_(min=torch.finfo(torch.float32).tiny) / LARGEST_CODE
    decoded = (rows / steps).round_()
    values = decoded.to(torch.int8)
    norms = torch.linalg.vector_norm(decoded.mul_(steps), dim=1)
    errors = torch.linalg.vector_norm(decoded.sub_(rows), dim=1)
    return Codes(values, steps[:, 0], norms.square_(), errors)


def joined(parts: Sequence[Codes]) -> Codes:
    """Return the rows of all parts."""
    return Codes(
        torch.cat([part.values for part in parts]),
        torch.cat([part.steps for part in parts]),
        torch.cat([part.squared_norms for part in parts]),
        torch.cat([part.errors for part in parts]),
    )


def int8_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return all inner products, int32 [n, m], of int8 rows [n, D] and [m, D]."""
    return torch._int_mm(left, right.T)


@cache
def int8_products_are_fast_and_exact() -> bool:
    """Return whether this processor multiplies int8 by instructions that sum in 32 bits (VNNI), and torch uses them.

    Without these, products are computed by others, which saturate in 16 bits, or one by one. That the largest sums
    come out right is tried as well: the function is not among the documented ones of torch.
    """
    if not getattr(torch.cpu, "_is_vnni_supported", lambda: False)() or not hasattr(torch, "_int_mm"):
        return False
    largest = torch.full((32, 64), LARGEST_CODE, dtype=torch.int8)
    signs = torch.ones(32, 1, dtype=torch.int8)
    signs[::2] = -1
    return torch.equal(int8_products(largest, largest * signs), (64 * LARGEST_CODE**2 * signs.T.int()).expand(32, -1))

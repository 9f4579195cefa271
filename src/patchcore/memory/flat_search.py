"""Exact search that reads the bank in 8 bits first, where the processor is faster at that."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from patchcore.memory.int8_products import (
    MAX_DIMENSION,
    Codes,
    encoded,
    int8_products,
    int8_products_are_fast_and_exact,
    joined,
)
from patchcore.memory.torch_search import (
    BANK_CHUNK,
    COLUMNS_PER_GROUP,
    TorchNN,
    group_minima,
    merged,
    smallest_of_groups,
)

# Of the bank, for each neighbour sought and one more: below, the float32 product takes less time than what follows.
CODED_ROWS_PER_NEIGHBOUR = 512
CODED_BLOCK = 1024  # rows of the bank per product: what is done to the products finds them in the cache
MAX_CODED_K = 16
MAX_PAIRS_PER_QUERY = 32  # distances by subtraction that take as long as one float32 product with a chunk of the bank
# Relative to (|x| + |y|)^2: float32 errors of norms, products and distances stay below a tenth of it.
ROUNDING = 1e-5


class FlatNN(TorchNN):
    """Exact search by bounds, and by subtraction where bounds leave it open.

    Query x and member y, both less the bank's mean, are encoded in 8 bits as x', y' with the errors
    e(x) = |x - x'| and e(y). By the triangle inequality

        |x' - y'| - e(x) - e(y) <= |x - y|,

    so that no member whose left side is above the distance of k known members is among the k nearest. The left sides
    come from an integer product, which is exact; known members are those nearest by their codes. On real embeddings
    two to ten of thousands of members are left for each query. Their distances are computed by subtraction.

    Where this would not be faster, the search is that of `TorchNN`: processors without 8-bit products, other devices,
    small banks, many neighbours, and queries that their bounds hardly tell apart.

    Attributes:
        codes_: Of the centred bank; None where the search is that of `TorchNN`.
    """

    codes_: Codes | None

    def _measure(self) -> None:
        super()._measure()
        num_rows, dimension = self.bank_.shape
        self.codes_ = None
        if self.device.type != "cpu" or num_rows < 2 * CODED_ROWS_PER_NEIGHBOUR or dimension > MAX_DIMENSION:
            return
        if int8_products_are_fast_and_exact():
            chunks = self.bank_.split(BANK_CHUNK)
            self.codes_ = joined([encoded(chunk - self.centre_) for chunk in chunks])

    def _nearest(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        pays = k <= MAX_CODED_K and len(self.bank_) >= CODED_ROWS_PER_NEIGHBOUR * (k + 1)
        if self.codes_ is not None and pays:
            found = self._nearest_by_bounds(queries, k, self.codes_)
            if found is not None:
                return found
        return super()._nearest(queries, k)

    def _nearest_by_bounds(
        self, queries: torch.Tensor, k: int, bank: Codes
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return distances and rows [q, k] of the nearest; None where bounds leave too much open."""
        coded = encoded(queries - self.centre_)
        margins = coded.errors + bank.errors.max()  # [q]
        rounding = ROUNDING * (coded.squared_norms.sqrt() + bank.squared_norms.max().sqrt()).square()
        distances = queries.new_empty(len(queries), 0)
        rows = torch.empty(len(queries), 0, dtype=torch.int64)
        memory = torch.empty(0)
        for chunk in even_chunks(len(bank.values), BANK_CHUNK):
            values = memory = self._code_distances(coded, bank, chunk, memory)  # [q, b]
            minima = group_minima(values)
            _, columns = smallest_of_groups(values, minima, k)
            values.scatter_(1, columns, torch.inf)  # so that they are not found again
            columns += chunk.start
            distances = torch.cat([distances, self.exact_distances(queries, columns)], dim=1)
            rows = torch.cat([rows, columns], dim=1)
            farthest = distances.kthvalue(k, dim=1).values  # [q]
            limits = (farthest + margins).square() - coded.squared_norms + rounding
            of_query, members = _at_most(values, minima, limits)
            if len(members) > MAX_PAIRS_PER_QUERY * len(queries):
                return None
            members += chunk.start
            exact = self.pair_distances(queries, of_query, members)
            distances, rows = merged(distances, rows, of_query, members, exact, k)
        return distances, rows

    def _code_distances(self, queries: Codes, bank: Codes, chunk: slice, memory: torch.Tensor) -> torch.Tensor:
        """Return |x' - y'|^2 - |x'|^2 for queries and a chunk of the bank, filled up to whole groups with infinity.

        Args:
            queries: q rows.
            bank: Rows of the bank.
            chunk: Which of them.
            memory: Of an earlier call; taken where it has the size.

        Returns:
            float32 [q, b rounded up to a multiple of COLUMNS_PER_GROUP].
        """
        num_rows = chunk.stop - chunk.start
        shape = len(queries.values), -(-num_rows // COLUMNS_PER_GROUP) * COLUMNS_PER_GROUP
        values = memory if memory.shape == shape else torch.empty(shape)
        values[:, num_rows:] = torch.inf
        for start in range(chunk.start, chunk.stop, CODED_BLOCK):
            block = slice(start, min(start + CODED_BLOCK, chunk.stop))
            products = int8_products(queries.values, bank.values[block]).float().mul_(queries.steps[:, None])
            into = values[:, block.start - chunk.start : block.stop - chunk.start]
            torch.addcmul(bank.squared_norms[block], products, bank.steps[block], value=-2, out=into)
        return values


def even_chunks(num_rows: int, at_most: int) -> Iterator[slice]:
    """Yield slices of about the same length that cover all rows."""
    num_chunks = -(-num_rows // at_most)
    for number in range(num_chunks):
        yield slice(number * num_rows // num_chunks, (number + 1) * num_rows // num_chunks)


def _at_most(values: torch.Tensor, minima: torch.Tensor, limits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the values [q, b] that are at most the limit [q] of their row, given the minima of groups of columns.

    Returns:
        Rows, ascending, and columns, int64 [p] each.
    """
    in_row, group = (minima <= limits[:, None]).nonzero().unbind(dim=1)
    offsets = torch.arange(COLUMNS_PER_GROUP) * minima.shape[1]
    columns = group[:, None] + offsets  # [groups found, COLUMNS_PER_GROUP]
    found = values[in_row[:, None], columns] <= limits[in_row, None]
    return in_row[:, None].expand_as(columns)[found], columns[found]

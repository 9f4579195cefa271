"""Search with torch: exact, in principal directions, and in banks of fewer bytes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from patchcore.detector import require_tensor
from patchcore.errors import ConfigurationError, DataError
from patchcore.memory.search import MEMORY_BANK, NearestNeighbours, stored_bank
from patchcore.runtime import in_parts

# With QUERY_CHUNK: 30 MiB of ranking values at a time. Blocks above 32 MiB are new memory each time with glibc, and
# touching that takes as long as the product with few dimensions that fills it.
BANK_CHUNK = 8192
COLUMNS_PER_GROUP = 32
QUERIES_IN_PARTS_FROM = 256
VARIANCE_SHARE = 0.9  # of the bank, that the principal directions keep
SAMPLE_ROWS = 4096  # of the bank, that the directions are learned from
PROJECTED_ROWS_AT_LEAST = 2048  # below, the product that is saved takes less time than the re-ranking that is added
RESIDUAL_COSINE = 0.5  # recall changes little between 0.25 and 0.75; 1 would be the lower bound of the distance
FP16_BANK = "memory_bank_fp16"  # these are names of tensors of a model: none is `memory_bank`, which is float32
SQ8_BANK = "memory_bank_sq8"
SQ8_SCALE = "memory_bank_sq8_scale"


class TorchNN(NearestNeighbours):
    """Search by blocked matrix products on a torch device.

    Attributes:
        bank_: [M, D], float32 or float16.
        centre_: [D] float32, mean of the bank.
        squared_norms_: [M] float32, of the centred bank.
    """

    bank_: torch.Tensor

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Store how the bank is kept.

        Args:
            device: Where the bank is kept.
            dtype: Numbers of the bank. Distances are float32 in any case, to the rows as they are kept.
        """
        super().__init__(device)
        self.dtype = dtype
        self.stored_name = MEMORY_BANK if dtype == torch.float32 else FP16_BANK

    def whole_bank(self) -> torch.Tensor:
        return self._decoded(slice(None))

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.bank_.index_select(0, numbers).float()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {self.stored_name: self.bank_}

    def reads(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        return self.stored_name in tensors

    def restore(self, tensors: Mapping[str, torch.Tensor], dimension: int) -> None:
        self.fit(stored_bank(tensors, self.stored_name, self.dtype, dimension))

    def _take_over(self, bank: torch.Tensor) -> None:
        """Keep the bank, without a copy where it is on the device in numbers of this kind."""
        self.bank_ = bank.to(self.device, self.dtype).contiguous()
        if self.dtype == torch.float16 and not bool(self.bank_.isfinite().all()):
            raise DataError(
                f"found features up to {float(bank.abs().max()):g} in the memory bank, float16 ends at 65504: "
                "use another --index than fp16"
            )
        self._measure()

    def _measure(self) -> None:
        """Compute the centre and the norms of the bank as it is kept."""
        num_rows = len(self.bank_)
        chunks = [slice(start, start + BANK_CHUNK) for start in range(0, num_rows, BANK_CHUNK)]
        self.centre_ = torch.stack([self._decoded(rows).sum(dim=0) / num_rows for rows in chunks]).sum(dim=0)
        self.squared_norms_ = torch.cat([(self._decoded(rows) - self.centre_).square().sum(dim=1) for rows in chunks])

    def _decoded(self, rows: slice) -> torch.Tensor:
        """Return a part of the bank in float32; without a copy where it is kept so."""
        return self.bank_[rows].float()

    def _search_chunks(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Alone, threads take a little longer with a part of the queries each than together with all of them. While
        # others decode images, they take a tenth less: none waits for one that had to share its core.
        if len(queries) < QUERIES_IN_PARTS_FROM:
            return super()._search_chunks(queries, k)
        found = in_parts(lambda part: super(TorchNN, self)._search_chunks(part, k), self.device, queries)
        return torch.cat([distances for distances, _ in found]), torch.cat([rows for _, rows in found])

    def _candidates(self, queries: torch.Tensor, k: int) -> torch.Tensor:
        # Distances do not change when both sides move by the bank's mean, and the products get smaller.
        return self._lowest(queries - self.centre_, k)[1]

    def _lowest(self, keys: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where a row's squared norm less twice its product with the keys [q, R] is lowest: values, rows [q, k].

        With the mean m: |q - b|^2 = |b - m|^2 - 2 (q - m).b + terms that depend on q alone. Leaving those out
        changes no ranking, and taking b instead of b - m in the product spares a centred copy of the bank.
        """
        num_rows = len(self.squared_norms_)
        memory = keys.new_empty(len(keys) * min(BANK_CHUNK, num_rows))  # one block for all products
        values, indices = [], []
        for start in range(0, num_rows, BANK_CHUNK):
            rows = slice(start, min(start + BANK_CHUNK, num_rows))
            bank = self._bank_keys(rows)  # [b, R]
            products = memory[: len(keys) * len(bank)].view(len(keys), len(bank))
            torch.addmm(self.squared_norms_[rows], keys, bank.T, alpha=-2, out=products)  # [q, b]
            smallest, columns = smallest_of_rows(products, min(k, len(bank)))
            values.append(smallest)
            indices.append(columns + start)
        if len(indices) == 1:
            return values[0], indices[0]
        lowest, best = torch.cat(values, dim=1).topk(k, dim=1, largest=False, sorted=False)  # [q, k]
        return lowest, torch.cat(indices, dim=1).gather(1, best)

    def _bank_keys(self, rows: slice) -> torch.Tensor:
        """Return what the keys of queries are multiplied with, float32 [b, R]."""
        return self._decoded(rows)


class ProjectedNN(TorchNN):
    """Search in the principal directions of the bank, then exact distances to the best few rows.

    With the mean m and the projection P, |q - b|^2 = |Pq - Pb|^2 + |q' - b'|^2, where q' and b' are what of q - m and
    b - m lies outside the directions. Of that, both norms are known but not the angle: its cosine is taken as
    RESIDUAL_COSINE. That ranks rows by one product with few columns. The distances returned are exact, those of
    `TorchNN` where the row is the same. The directions keep VARIANCE_SHARE of the bank's variance.

    Where this saves nothing, the search is that of `TorchNN`: banks below PROJECTED_ROWS_AT_LEAST rows, and those whose
    variance needs more than half of the dimensions.

    Attributes:
        directions_: [D, R - 1], orthonormal columns; None where the search is that of `TorchNN`.
        keys_: [M, R], the projected bank and RESIDUAL_COSINE times the norm of the residual.
    """

    directions_: torch.Tensor | None
    keys_: torch.Tensor
    _shared_directions: torch.Tensor | None = None

    def share(self, other: NearestNeighbours) -> None:
        """Use the directions of another search: learning them takes as long as searching for dozens of images."""
        if isinstance(other, ProjectedNN):
            self._shared_directions = other.directions_

    def _measure(self) -> None:
        super()._measure()
        self.directions_ = self._shared_directions
        if self.directions_ is None:
            self.directions_ = principal_directions(self.bank_, self.centre_)
        if self.directions_ is None:
            return
        self.keys_ = self.bank_.new_empty(len(self.bank_), self.directions_.shape[1] + 1)
        for start in range(0, len(self.bank_), BANK_CHUNK):
            rows = slice(start, start + BANK_CHUNK)
            self.keys_[rows] = self._keys(self.bank_[rows], self.directions_, RESIDUAL_COSINE)

    def _nearest(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.directions_ is None:
            return super()._nearest(queries, k)
        keys = self._keys(queries, self.directions_, 1.0)
        values, candidates = self._lowest(keys, min(num_reranked(k), len(self.bank_)))  # [q, n]
        values, order = values.sort(dim=1)
        candidates = candidates.gather(1, order)
        distances = self.exact_distances(queries, candidates[:, :k])
        # With 1 for the cosine the same sum is a lower bound: most of the other candidates cannot be nearer.
        residuals = keys[:, -1:] * self.keys_[:, -1][candidates]  # RESIDUAL_COSINE |q'| |b'|
        bounds = values + keys.square().sum(dim=1, keepdim=True) - 2 * (1 / RESIDUAL_COSINE - 1) * residuals
        of_query, places = (bounds[:, k:] < distances.amax(dim=1, keepdim=True).square()).nonzero().unbind(dim=1)
        members = candidates[of_query, k + places]
        exact = self.pair_distances(queries, of_query, members)
        return merged(distances, candidates[:, :k], of_query, members, exact, k)

    def _keys(self, rows: torch.Tensor, directions: torch.Tensor, weight: float) -> torch.Tensor:
        """Return [n, R]: coordinates of rows [n, D] along the directions, and the weighted norm of what is left."""
        centred = rows - self.centre_
        projected = centred @ directions
        squared_residual = centred.square().sum(dim=1) - projected.square().sum(dim=1)
        residual = squared_residual.clamp_(min=0).sqrt_().mul_(weight)
        return torch.cat([projected, residual[:, None]], dim=1)

    def _bank_keys(self, rows: slice) -> torch.Tensor:
        return super()._bank_keys(rows) if self.directions_ is None else self.keys_[rows]


class EightBitNN(TorchNN):
    """Search in a bank of one byte per value, each dimension divided into 255 steps from its lowest to its highest.

    faiss has the same quantiser (IndexScalarQuantizer), but compares codes one by one, which takes twenty times as long
    as decoding a block of them for a matrix product.

    Attributes:
        bank_: uint8 [M, D].
        scale_: float32 [2, D], the lowest value of each dimension and its step.
    """

    scale_: torch.Tensor

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        return self._values(self.bank_.index_select(0, numbers))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {SQ8_BANK: self.bank_, SQ8_SCALE: self.scale_}

    def reads(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        return SQ8_BANK in tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, torch.Tensor], dimension: int) -> None:
        bank = stored_bank(tensors, SQ8_BANK, torch.uint8, dimension)
        scale = require_tensor(tensors, SQ8_SCALE, ndim=2)
        fits = scale.dtype == torch.float32 and tuple(scale.shape) == (2, dimension)
        if not fits or not bool(scale.isfinite().all()) or bool((scale[1] < 0).any()):
            raise ConfigurationError(
                f"model tensor {SQ8_SCALE!r} of shape {tuple(scale.shape)} does not hold finite values and steps of "
                f"shape {(2, dimension)}: train the model anew"
            )
        self.bank_, self.scale_ = bank.to(self.device).contiguous(), scale.to(self.device)
        self._measure()
        self.num_rows_, self.dimension_ = bank.shape

    def _take_over(self, bank: torch.Tensor) -> None:
        lowest, highest = bank.aminmax(dim=0)
        step = (highest - lowest).float() / 255
        self.scale_ = torch.stack([lowest.float(), step]).to(self.device)
        divisor = step.where(step > 0, torch.ones_like(step))  # a constant dimension is all zeros
        self.bank_ = torch.empty(bank.shape, dtype=torch.uint8, device=self.device)
        for start in range(0, len(bank), BANK_CHUNK):
            rows = slice(start, start + BANK_CHUNK)
            self.bank_[rows] = ((bank[rows] - lowest) / divisor).round_().clamp_(0, 255).to(self.device, torch.uint8)
        self._measure()

    def _decoded(self, rows: slice) -> torch.Tensor:
        return self._values(self.bank_[rows])

    def _values(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.float().mul_(self.scale_[1]).add_(self.scale_[0])


def smallest_of_rows(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the k smallest values of each row, several times as fast as `topk` where k is small.

    Columns are divided into groups. The k smallest values lie in the k groups of smallest minimum, since each group
    that holds one of them has a minimum that is no larger. So `topk` sees the minima, and what is in k groups.

    Args:
        values: [q, b].
        k: In [1, b].

    Returns:
        Values and columns [q, k], in any order.
    """
    num_groups = values.shape[1] // COLUMNS_PER_GROUP
    if num_groups <= 2 * k:
        return values.topk(k, dim=1, largest=False, sorted=False)
    grouped = num_groups * COLUMNS_PER_GROUP
    smallest, columns = smallest_of_groups(values, group_minima(values[:, :grouped]), k)
    if grouped == values.shape[1]:
        return smallest, columns
    rest = torch.arange(grouped, values.shape[1], device=values.device).expand(len(values), -1)
    columns = torch.cat([columns, rest], dim=1)
    smallest, positions = values.gather(1, columns).topk(k, dim=1, largest=False, sorted=False)
    return smallest, columns.gather(1, positions)


def group_minima(values: torch.Tensor) -> torch.Tensor:
    """Return the minimum [q, g] of each group of COLUMNS_PER_GROUP columns of values [q, COLUMNS_PER_GROUP * g].

    Column c is in group c % g: neighbouring columns are in different groups, which vectorises the minimum.
    """
    return values.unflatten(1, (COLUMNS_PER_GROUP, -1)).amin(dim=1)


def smallest_of_groups(values: torch.Tensor, minima: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the k smallest values of each row, given the minima [q, g] of groups of its columns, k <= g.

    Returns:
        Values and columns [q, k], in any order.
    """
    num_groups = minima.shape[1]
    groups = minima.topk(k, dim=1, largest=False, sorted=False).indices  # [q, k]
    offsets = torch.arange(COLUMNS_PER_GROUP, device=values.device) * num_groups
    columns = (groups[:, :, None] + offsets).flatten(1)  # [q, k * COLUMNS_PER_GROUP]
    smallest, positions = values.gather(1, columns).topk(k, dim=1, largest=False, sorted=False)
    return smallest, columns.gather(1, positions)


def merged(
    distances: torch.Tensor,
    rows: torch.Tensor,
    of_query: torch.Tensor,
    members: torch.Tensor,
    exact: torch.Tensor,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k nearest, ascending, of those known and of further pairs.

    Args:
        distances: [q, n], of those known.
        rows: int64 [q, n], which they are.
        of_query: int64 [p], ascending, the query of each pair.
        members: int64 [p], the bank row.
        exact: [p], their distance.
        k: How many, at most n.
    """
    num_queries = len(distances)
    counts = torch.bincount(of_query, minlength=num_queries)
    firsts = counts.cumsum(dim=0) - counts
    numbers = torch.arange(len(of_query), device=of_query.device)
    places = numbers - firsts[of_query]  # [p], of a pair among those of its query
    shape = num_queries, int(counts.max())
    more_distances, more_rows = distances.new_full(shape, torch.inf), rows.new_zeros(shape)
    more_distances[of_query, places], more_rows[of_query, places] = exact, members
    nearest = torch.cat([distances, more_distances], dim=1).topk(k, dim=1, largest=False)  # sorted
    return nearest.values, torch.cat([rows, more_rows], dim=1).gather(1, nearest.indices)


def num_reranked(k: int) -> int:
    """Return to how many rows `ProjectedNN` computes the exact distance for k neighbours."""
    return 6 + 2 * k


def principal_directions(bank: torch.Tensor, centre: torch.Tensor) -> torch.Tensor | None:
    """Return the directions in which a bank varies most.

    Args:
        bank: [M, D] float32. Directions are learned from at most SAMPLE_ROWS of its rows, at equal steps.
        centre: [D], its mean.

    Returns:
        [D, R - 1], orthonormal columns, with the fewest columns that keep VARIANCE_SHARE of the variance, and R rounded
        up to a multiple of 16, which matrix products like; None where a search in them would not be faster.
    """
    num_rows, dimension = bank.shape
    if num_rows < PROJECTED_ROWS_AT_LEAST:
        return None
    sample = bank[:: -(-num_rows // SAMPLE_ROWS)] - centre
    eigenvalues, eigenvectors = torch.linalg.eigh(
        (sample.T @ sample).cpu()
    )  # ascending; small, and not on every device
    shares = eigenvalues.flip(0).clamp_(min=0).double().cumsum(0)
    needed = int((shares < VARIANCE_SHARE * shares[-1]).sum()) + 1
    num_columns = -(-(needed + 1) // 16) * 16 - 1
    if 2 * num_columns > dimension:
        return None
    return eigenvectors[:, -num_columns:].contiguous().to(bank.device)

"""The contract of the k-nearest-neighbour searches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

from patchcore.detector import require_tensor
from patchcore.errors import ConfigurationError, DataError

QUERY_CHUNK = 960
PAIRS_AT_ONCE = 512  # 2 MB of rows with 1,024 values
MEMORY_BANK = "memory_bank"  # name of the stored bank among the tensors of a model


class NearestNeighbours(ABC):
    """Finds the rows of a bank that are nearest to each query in Euclidean distance.

    Every search proposes candidates in its own way, then computes their distances by subtraction from the rows as it
    holds them. A matrix product alone loses the digits that matter: where the features are large against their
    distances, |q|^2 + |b|^2 - 2 q.b is the small difference of large float32 numbers, and a query that is in the
    bank comes out at a distance above 0.

    Attributes:
        num_rows_: M, learned by `fit`.
        dimension_: D, learned by `fit`.
    """

    num_rows_: int
    dimension_: int

    def __init__(self, device: torch.device) -> None:
        """Store where the search computes.

        Args:
            device: Device on which the returned distances are computed.
        """
        self.device = device

    @torch.no_grad()
    def fit(self, bank: torch.Tensor) -> NearestNeighbours:
        """Take over the bank.

        Args:
            bank: Memory bank [M, D] float32, finite, M >= 1.

        Returns:
            The search itself.

        Raises:
            DataError: The bank is empty, has values that are not finite, or does not fit this search.
        """
        if bank.ndim != 2 or 0 in bank.shape:
            raise DataError(
                f"found a memory bank of shape {list(bank.shape)}, expected [M, D] with at least one row: "
                "check that the class has training images"
            )
        if not bool(bank.mean(dim=0, dtype=torch.float32).isfinite().all()):
            raise DataError("found infinite or NaN values in the memory bank, expected finite ones: check the features")
        self._take_over(bank)
        self.num_rows_, self.dimension_ = bank.shape
        return self

    def share(self, other: NearestNeighbours) -> None:  # noqa: B027  # most learn nothing that takes long
        """Take over, before `fit`, what a search of the same kind has learned of a bank of similar rows."""

    @torch.no_grad()
    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the k nearest rows of the bank for each query.

        Args:
            queries: [Q, D] float32, on any device. A query that is not finite gets NaN or infinite distances.
            k: How many neighbours, in [1, M].

        Returns:
            Euclidean distances [Q, k] float32, ascending, to the rows as they are held, and bank rows [Q, k] int64,
            both on the device of `queries`. The order among equal distances is left open.

        Raises:
            RuntimeError: There is no bank yet.
            ConfigurationError: k is outside [1, M].
            ValueError: The queries are not [Q, D].
        """
        if not hasattr(self, "num_rows_"):
            raise RuntimeError(f"{type(self).__name__} has no memory bank yet: call fit before search")
        check_num_neighbours(k, self.num_rows_)
        if queries.ndim != 2 or queries.shape[1] != self.dimension_:
            raise ValueError(
                f"found queries of shape {list(queries.shape)}, expected [Q, {self.dimension_}] to fit the bank: "
                "extract them with the layers and dimensions of the model"
            )
        return self._search_chunks(queries, k)

    @torch.no_grad()
    def _search_chunks(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Search as `search` does, some queries at a time."""
        distances = torch.empty(len(queries), k, device=self.device)
        indices = torch.empty(len(queries), k, dtype=torch.int64, device=self.device)
        for start in range(0, len(queries), QUERY_CHUNK):
            rows = slice(start, start + QUERY_CHUNK)
            chunk = queries[rows].to(self.device, torch.float32)  # [q, D]
            distances[rows], indices[rows] = self._nearest(chunk, k)
        return distances.to(queries.device), indices.to(queries.device)  # all at once: a GPU is waited for

    def _nearest(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return distances, ascending, and bank rows [q, k] for queries [q, D]."""
        candidates = self._candidates(queries, k)  # [q, at least k]
        ordered, order = self.exact_distances(queries, candidates).sort(dim=1)
        return ordered[:, :k], candidates.gather(1, order[:, :k])

    def exact_distances(self, queries: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Return the distances [q, k] of queries [q, D] to the bank rows [q, k], by subtraction."""
        columns = [
            torch.linalg.vector_norm(self.rows(column).sub_(queries), dim=1)
            for column in indices.unbind(dim=1)  # one neighbour at a time: [q, D] of memory, not [q, k, D]
        ]
        return torch.stack(columns, dim=1)

    def pair_distances(self, queries: torch.Tensor, of_query: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
        """Return the distance [p] of query `of_query` [p] to bank row `members` [p], by subtraction."""
        parts = zip(of_query.split(PAIRS_AT_ONCE), members.split(PAIRS_AT_ONCE), strict=True)
        return torch.cat([self.exact_distances(queries[q], m[:, None])[:, 0] for q, m in parts])

    def whole_bank(self) -> torch.Tensor:
        """Return the bank [M, D] float32, as far as the search has kept its digits; without a copy where it has all."""
        return self.rows(torch.arange(self.num_rows_, device=self.device))

    @abstractmethod
    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return a copy [n, D] float32 of the bank rows of these numbers [n], as far as their digits were kept."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what a model folder stores of the bank, by name."""

    @abstractmethod
    def reads(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Return whether `restore` takes these over as they are."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, torch.Tensor], dimension: int) -> None:
        """Take over what `tensors` gave.

        Args:
            tensors: Those of a search of the same kind.
            dimension: D that the model's embeddings have.

        Raises:
            ConfigurationError: They are damaged, or of another model.
        """

    @abstractmethod
    def _take_over(self, bank: torch.Tensor) -> None:
        """Keep the bank [M, D], in whatever form, and prepare it for searching."""

    @abstractmethod
    def _candidates(self, queries: torch.Tensor, k: int) -> torch.Tensor:
        """Return bank rows [q, k or more] int64, in any order, among which the nearest of queries [q, D] are."""


def check_num_neighbours(k: int, bank_size: int) -> None:
    """Raise ConfigurationError where a bank of `bank_size` rows has no k nearest ones."""
    if not 1 <= k <= bank_size:
        raise ConfigurationError(
            f"found k={k} neighbours for a memory bank of {bank_size} rows, expected k from 1 to {bank_size}: "
            "lower k (--anomaly_scorer_num_nn) or keep more patches (sampler --percentage)"
        )


def require_columns(name: str, found: int, dimension: int) -> None:
    """Raise ConfigurationError where a stored bank has other columns than the model's embeddings."""
    if found != dimension:
        raise ConfigurationError(
            f"{name} has {found} columns, the configuration gives embeddings of {dimension} values: "
            "the files belong to different models"
        )


def stored_bank(tensors: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype, dimension: int) -> torch.Tensor:
    """Return a stored bank [M, D].

    Args:
        tensors: What a model folder holds.
        name: Of the bank.
        dtype: That it must have.
        dimension: D that the model's embeddings have.

    Raises:
        ConfigurationError: It is missing, empty, or of another kind.
    """
    bank = require_tensor(tensors, name, ndim=2)
    require_columns("memory bank", bank.shape[1], dimension)
    if bank.dtype != dtype or len(bank) == 0:
        raise ConfigurationError(
            f"model tensor {name!r} of shape {list(bank.shape)} holds {bank.dtype}, expected rows of {dtype}: "
            "train the model anew"
        )
    return bank

"""Exact k-nearest-neighbour search in the memory bank, with torch or faiss.

Both searches rank by matrix products and then compute the distances that they return by subtraction. The
product alone loses the digits that matter: where the features are large against their distances,
|q|^2 + |b|^2 - 2 q.b is the small difference of large float32 numbers, and a query that is in the bank comes
out at a distance above 0.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
from abc import ABC, abstractmethod
from typing import Any

import torch

from patchcore.errors import ConfigurationError, DataError
from patchcore.runtime import available_cpus

LOGGER = logging.getLogger(__name__)

QUERY_CHUNK = 1024  # with BANK_CHUNK: 32 MB of ranking values at a time, for any number of queries
BANK_CHUNK = 8192
FAISS_DISTRIBUTIONS = (
    "faiss-cpu",
    "faiss-gpu",
    "faiss-gpu-cu11",
    "faiss-gpu-cu12",
    "faiss-gpu-cuvs",
    "faiss-gpu-cu12-cuvs",
    "faiss-gpu-cu13-cuvs",
    "faiss-cuda",
)


class NearestNeighbours(ABC):
    """Finds the rows of a bank that are nearest to each query in Euclidean distance."""

    bank_: torch.Tensor
    centre_: torch.Tensor

    def __init__(self, device: torch.device) -> None:
        """Store where the bank is kept.

        Args:
            device: Device on which the returned distances are computed.
        """
        self.device = device

    @torch.no_grad()
    def fit(self, bank: torch.Tensor) -> NearestNeighbours:
        """Take over the bank.

        Args:
            bank: Memory bank [M, D] float32, finite, M >= 1. Kept without a copy where it is on the device.

        Returns:
            The search itself.

        Raises:
            DataError: The bank is empty or has values that are not finite.
        """
        if bank.ndim != 2 or 0 in bank.shape:
            raise DataError(
                f"found a memory bank of shape {list(bank.shape)}, expected [M, D] with at least one row: "
                "check that the class has training images"
            )
        self.bank_ = bank.to(self.device, torch.float32).contiguous()
        self.centre_ = self.bank_.mean(dim=0)
        if not bool(self.centre_.isfinite().all()):
            raise DataError("found infinite or NaN values in the memory bank, expected finite ones: check the features")
        self._index_bank()
        return self

    @torch.no_grad()
    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the k nearest rows of the bank for each query.

        Args:
            queries: [Q, D] float32, on any device. A query that is not finite gets NaN or infinite distances.
            k: How many neighbours, in [1, M].

        Returns:
            Euclidean distances [Q, k] float32, ascending, and bank rows [Q, k] int64, both on the device of
            `queries`. The order among equal distances is left open.

        Raises:
            RuntimeError: There is no bank yet.
            ConfigurationError: k is outside [1, M].
            ValueError: The queries are not [Q, D].
        """
        if not hasattr(self, "bank_"):
            raise RuntimeError(f"{type(self).__name__} has no memory bank yet: call fit before search")
        check_num_neighbours(k, len(self.bank_))
        if queries.ndim != 2 or queries.shape[1] != self.bank_.shape[1]:
            raise ValueError(
                f"found queries of shape {list(queries.shape)}, expected [Q, {self.bank_.shape[1]}] to fit the bank: "
                "extract them with the layers and dimensions of the model"
            )
        distances = torch.empty(len(queries), k, device=queries.device)
        indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        for start in range(0, len(queries), QUERY_CHUNK):
            rows = slice(start, start + QUERY_CHUNK)
            chunk = queries[rows].to(self.device, torch.float32)  # [q, D]
            # Distances do not change when both sides move by the bank's mean, and the products get smaller.
            nearest = self._nearest(chunk - self.centre_, k)  # [q, k]
            chunk_distances, order = self.exact_distances(chunk, nearest).sort(dim=1)
            distances[rows] = chunk_distances
            indices[rows] = nearest.gather(1, order)
        return distances, indices

    def exact_distances(self, queries: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Return the distances [q, k] of queries [q, D] to the bank rows [q, k], by subtraction."""
        columns = [
            torch.linalg.vector_norm(queries - self.bank_[column], dim=1)
            for column in indices.unbind(dim=1)  # one neighbour at a time: [q, D] of memory, not [q, k, D]
        ]
        return torch.stack(columns, dim=1)

    @abstractmethod
    def _index_bank(self) -> None:
        """Prepare `bank_` for searching."""

    @abstractmethod
    def _nearest(self, centred_queries: torch.Tensor, k: int) -> torch.Tensor:
        """Return the k nearest bank rows [q, k] int64, in any order, of queries [q, D] less `centre_`."""


class TorchNN(NearestNeighbours):
    """Search by blocked matrix products on a torch device."""

    def _index_bank(self) -> None:
        self.squared_norms_ = torch.cat(
            [(rows - self.centre_).square().sum(dim=1) for rows in self.bank_.split(BANK_CHUNK)]
        )  # [M], of the centred bank

    def _nearest(self, centred_queries: torch.Tensor, k: int) -> torch.Tensor:
        chunks = [
            self._nearest_in_chunk(centred_queries, slice(start, start + BANK_CHUNK), k)
            for start in range(0, len(self.bank_), BANK_CHUNK)
        ]
        if len(chunks) == 1:
            return chunks[0][1]
        values = torch.cat([values for values, _ in chunks], dim=1)  # [q, k per chunk]
        indices = torch.cat([indices for _, indices in chunks], dim=1)
        return indices.gather(1, values.topk(k, dim=1, largest=False, sorted=False).indices)  # [q, k]

    def _nearest_in_chunk(
        self, centred_queries: torch.Tensor, rows: slice, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ranking values and bank rows [q, min(k, rows)] of the nearest among these rows.

        With the mean m: |q - b|^2 = |b - m|^2 - 2 (q - m).b + terms that depend on q alone. Leaving those out
        changes no ranking, and taking b instead of b - m in the product spares a centred copy of the bank.
        """
        bank = self.bank_[rows]  # [b, D]
        values = torch.addmm(self.squared_norms_[rows], centred_queries, bank.T, alpha=-2)  # [q, b]
        if k == 1:  # twice as fast as topk
            smallest, columns = values.min(dim=1, keepdim=True)  # [q, 1]
        else:
            smallest, columns = values.topk(min(k, len(bank)), dim=1, largest=False, sorted=False)  # [q, k]
        return smallest, columns + rows.start


class FaissNN(NearestNeighbours):
    """Search by faiss's flat index, on the CPU or on one GPU.

    Source: the original repository's class of the same name. That one returns squared distances; here they
    are Euclidean (PatchCore, Eq. 6).
    """

    def __init__(self, on_gpu: bool = False, num_workers: int = 4, gpu_index: int = 0) -> None:
        """Prepare faiss.

        Args:
            on_gpu: Search on a GPU; where faiss cannot, warn once per process and search on the CPU.
            num_workers: Threads of the search on the CPU, >= 1, cut to the cores this process may use.
            gpu_index: Which GPU.

        Raises:
            ConfigurationError: faiss is not installed or installed twice, or `num_workers` is below 1.
        """
        super().__init__(torch.device("cpu"))  # faiss takes and returns numpy arrays
        if num_workers < 1:
            raise ConfigurationError(
                f"found faiss_num_workers={num_workers}, expected at least 1: give the number of threads"
            )
        faiss = import_faiss()
        if faiss is None:
            raise ConfigurationError(
                "found no faiss, expected faiss-cpu or faiss-gpu: pip install -r requirements.txt (CPU) or "
                "requirements-gpu.txt (GPU), or search with torch"
            )
        if on_gpu and not faiss_sees_gpu(faiss):
            _warn_once("faiss has no GPU here (a CPU build, or no device): searching with faiss on the CPU")
        self.on_gpu = on_gpu and faiss_sees_gpu(faiss)
        self.gpu_index = gpu_index
        self._faiss = faiss
        faiss.omp_set_num_threads(min(num_workers, available_cpus()))

    def _index_bank(self) -> None:
        index = self._faiss.IndexFlatL2(self.bank_.shape[1])
        if self.on_gpu:
            # Held here because faiss does not: the index would outlive the memory it works in.
            self._gpu_resources = self._faiss.StandardGpuResources()
            index = self._faiss.index_cpu_to_gpu(self._gpu_resources, self.gpu_index, index)
        index.add((self.bank_ - self.centre_).numpy())
        self._index = index

    def _nearest(self, centred_queries: torch.Tensor, k: int) -> torch.Tensor:
        _, indices = self._index.search(centred_queries.contiguous().numpy(), k)
        return torch.from_numpy(indices)


class NearestNeighbourScorer:
    """Scores a patch embedding by its mean distance to the nearest ones of the memory bank.

    Source: PatchCore, Eq. 6, is the case of one neighbour. The original repository always uses one, whatever
    it is told; here the number is honoured.
    """

    def __init__(self, num_neighbours: int, nearest_neighbours: NearestNeighbours) -> None:
        """Store the parts.

        Args:
            num_neighbours: How many neighbours are averaged, >= 1.
            nearest_neighbours: The search.
        """
        self.num_neighbours = num_neighbours
        self.nearest_neighbours = nearest_neighbours

    def fit(self, bank: torch.Tensor) -> NearestNeighbourScorer:
        """Take over the memory bank [M, D] float32.

        Raises:
            ConfigurationError: The bank has fewer rows than there are neighbours to average.
            DataError: The bank is empty or has values that are not finite.
        """
        check_num_neighbours(self.num_neighbours, len(bank))
        self.nearest_neighbours.fit(bank)
        return self

    def score(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Score queries by their distance to the bank.

        Args:
            queries: [Q, D] float32.

        Returns:
            Mean Euclidean distance [Q] float32 to the nearest bank members, higher is more anomalous; the row [Q]
            int64 of the nearest one.
        """
        distances, rows = self.nearest_neighbours.search(queries, self.num_neighbours)
        return distances.mean(dim=1), rows[:, 0]

    def neighbourhood_weights(self, queries: torch.Tensor, nearest_rows: torch.Tensor, support: int) -> torch.Tensor:
        """Weigh queries by how alone their nearest bank member is.

        With the query q, its nearest member m* and the `support` members N nearest to m*, itself among them:
        1 - exp|q - m*| / sum over m in N of exp|q - m|. A member in a sparse region of the bank has neighbours far
        from q, which makes the weight large.

        Args:
            queries: [Q, D] float32.
            nearest_rows: [Q] int64, the bank row of each query's nearest member.
            support: How many members around m* count, from 2 to the size of the bank.

        Returns:
            float32 [Q] in (0, 1), on the device of `queries`.

        Source: Roth et al. (CVPR 2022), Eq. 7.
        """
        search = self.nearest_neighbours
        members = search.bank_[nearest_rows.to(search.device)]  # [Q, D]
        _, support_rows = search.search(members, support)  # [Q, B]
        moved = queries.to(search.device)
        own = search.exact_distances(moved, nearest_rows.to(search.device)[:, None])[:, 0]  # [Q]
        distances = search.exact_distances(moved, support_rows)  # [Q, B]
        # In logarithms: exp of a distance overflows from 89 on.
        return (1 - torch.exp(own - distances.logsumexp(dim=1))).to(queries.device)


def build_nearest_neighbours(
    faiss_on_gpu: bool, faiss_num_workers: int | None, device: torch.device
) -> NearestNeighbours:
    """Choose the search: torch on the device of the features, or faiss where one of its options asks for it.

    Both find the same neighbours at the same distances. torch is the default because the BLAS library inside the
    faiss packages does not know every processor: on the ones measured, torch was three to four times as fast.

    Args:
        faiss_on_gpu: Use faiss on the GPU; where that cannot be, one warning per process.
        faiss_num_workers: Use faiss with so many threads where the search is on the CPU, >= 1; None if not.
        device: Where the features are.

    Returns:
        A search without a bank.

    Raises:
        ConfigurationError: faiss is installed twice, or `faiss_num_workers` is below 1.
    """
    require_one_faiss()
    if not faiss_on_gpu and faiss_num_workers is None:
        return TorchNN(device)
    faiss = import_faiss()
    if faiss_on_gpu and faiss is not None and faiss_sees_gpu(faiss):
        return FaissNN(True, faiss_num_workers or available_cpus(), gpu_index=device.index or 0)
    if faiss_num_workers is not None and faiss is not None and device.type == "cpu":
        return FaissNN(faiss_on_gpu, faiss_num_workers)
    option = "--faiss_on_gpu" if faiss_on_gpu else "--faiss_num_workers"
    _warn_once(f"{option}: {_what_is_missing(faiss)}, searching with torch on {device}")
    return TorchNN(device)


def _what_is_missing(faiss: Any | None) -> str:
    if faiss is not None:
        return "faiss has no GPU here (a CPU build, or no device)"
    installed = require_one_faiss()
    return f"{installed[0]} cannot be imported" if installed else "faiss is not installed"


def check_num_neighbours(k: int, bank_size: int) -> None:
    """Raise ConfigurationError where a bank of `bank_size` rows has no k nearest ones."""
    if not 1 <= k <= bank_size:
        raise ConfigurationError(
            f"found k={k} neighbours for a memory bank of {bank_size} rows, expected k from 1 to {bank_size}: "
            "lower k (--anomaly_scorer_num_nn) or keep more patches (sampler --percentage)"
        )


def require_one_faiss() -> tuple[str, ...]:
    """Return the installed distributions of faiss, none or one.

    Raises:
        ConfigurationError: Several own the module; pip installs one over the other without a word, and the
            mixture fails in odd ways.
    """
    installed = _installed_faiss_distributions()
    if len(installed) > 1:
        raise ConfigurationError(
            f"found {' and '.join(installed)} installed together, expected one of them, as each overwrites the "
            f"other: pip uninstall -y {' '.join(installed)}, then pip install -r requirements.txt (CPU) or "
            "requirements-gpu.txt (GPU)"
        )
    return installed


def import_faiss() -> Any | None:
    """Return the faiss module, or None where it is not installed or lacks a library it needs.

    Raises:
        ConfigurationError: As in `require_one_faiss`.
    """
    require_one_faiss()
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        LOGGER.debug("faiss cannot be imported: %s", error)
        return None


def faiss_sees_gpu(faiss: Any) -> bool:
    """Return whether this build of faiss has GPU support and finds a device."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


@functools.cache  # a model is searched anew for every class and fold
def _installed_faiss_distributions() -> tuple[str, ...]:
    """Return the installed distributions that own the module faiss."""
    return tuple(name for name in FAISS_DISTRIBUTIONS if _is_installed(name))


def _is_installed(distribution: str) -> bool:
    """Return whether a distribution of this name is installed."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@functools.cache
def _warn_once(message: str) -> None:
    """Log a warning the first time it is given in this process."""
    LOGGER.warning(message)

"""Search with faiss; no other module imports it."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from patchcore.errors import ConfigurationError, DataError
from patchcore.memory.search import MEMORY_BANK, NearestNeighbours, require_columns, stored_bank
from patchcore.runtime import available_cpus

LOGGER = logging.getLogger(__name__)

FAISS_INDEX = "faiss_index"  # name of the serialised index among the tensors of a model
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
ROWS_PER_CENTROID = 39  # faiss warns below: too few to place a centroid
PQ_LISTS = 512  # this and the next two: the original's ApproximateFaissNN
PQ_SUBQUANTISERS = 64
PQ_BITS = 8
PROBED_LISTS = 8  # the original keeps faiss's 1, which misses every tenth neighbour or more before any quantisation
SEED = 1234
_HEADER = struct.Struct("<4s i q 16x ? i")  # of serialised indices: kind, D, M, two unused numbers, trained, metric
_HEADER_KINDS = {b"IwFl": "ivf", b"IwPQ": "ivfpq"}
_METRIC_L2 = 1


class _FaissSearch(NearestNeighbours):
    """What all searches with faiss share: the module, its threads, its GPU."""

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
                "requirements-gpu.txt (GPU), or search with torch (--index flat, projected, fp16 or sq8)"
            )
        if on_gpu and not faiss_sees_gpu(faiss):
            warn_once("faiss has no GPU here (a CPU build, or no device): searching with faiss on the CPU")
        self.on_gpu = on_gpu and faiss_sees_gpu(faiss)
        self.gpu_index = gpu_index
        self._faiss = faiss
        faiss.omp_set_num_threads(min(num_workers, available_cpus()))

    def _on_device(self, index: Any, *options: Any) -> Any:
        """Return the index, copied to the GPU if that is where the search is."""
        if not self.on_gpu:
            return index
        # Held here because faiss does not: the index would outlive the memory it works in.
        self._gpu_resources = self._faiss.StandardGpuResources()
        return self._faiss.index_cpu_to_gpu(self._gpu_resources, self.gpu_index, index, *options)


class FaissNN(_FaissSearch):
    """Search by faiss's flat index, on the CPU or on one GPU.

    Source: the original repository's class of the same name. That one returns squared distances; here they
    are Euclidean (PatchCore, Eq. 6).
    """

    bank_: torch.Tensor

    def whole_bank(self) -> torch.Tensor:
        return self.bank_

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.bank_[numbers]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {MEMORY_BANK: self.bank_}

    def reads(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        return MEMORY_BANK in tensors

    def restore(self, tensors: Mapping[str, torch.Tensor], dimension: int) -> None:
        self.fit(stored_bank(tensors, MEMORY_BANK, torch.float32, dimension))

    def _take_over(self, bank: torch.Tensor) -> None:
        self.bank_ = bank.to("cpu", torch.float32).contiguous()
        self.centre_ = self.bank_.mean(dim=0)
        index = self._on_device(self._faiss.IndexFlatL2(bank.shape[1]))
        index.add((self.bank_ - self.centre_).numpy())
        self._index = index

    def _candidates(self, queries: torch.Tensor, k: int) -> torch.Tensor:
        _, indices = self._index.search((queries - self.centre_).contiguous().numpy(), k)
        return torch.from_numpy(indices)


class InvertedListsNN(_FaissSearch):
    """Search in the PROBED_LISTS of the bank's k-means clusters that are nearest to a query.

    The rows are kept by faiss alone: as they are ("ivf"), or as product codes of 64 bytes ("ivfpq"), which move a
    row to the centre of its code.

    Source: "ivfpq" is the original repository's ApproximateFaissNN, with more than one probed list.
    """

    def __init__(self, kind: str, on_gpu: bool = False, num_workers: int = 4, gpu_index: int = 0) -> None:
        """Prepare faiss.

        Args:
            kind: "ivf" or "ivfpq".
            on_gpu: As for FaissNN, also the next two.
            num_workers: Also of the training.
            gpu_index: Which GPU.
        """
        super().__init__(on_gpu, num_workers, gpu_index)
        self.kind = kind

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._index.reconstruct_batch(numbers.contiguous().numpy()))

    def tensors(self) -> dict[str, torch.Tensor]:
        plain = self._faiss.clone_index(self._index)
        plain.set_direct_map_type(self._faiss.DirectMap.NoMap)  # 8 bytes a row that `_serve` computes again
        return {FAISS_INDEX: torch.from_numpy(self._faiss.serialize_index(plain))}

    def reads(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        return FAISS_INDEX in tensors and serialised_kind(tensors[FAISS_INDEX]) == self.kind

    def restore(self, tensors: Mapping[str, torch.Tensor], dimension: int) -> None:
        self._serve(read_index(self._faiss, tensors[FAISS_INDEX], dimension))

    def _take_over(self, bank: torch.Tensor) -> None:
        num_rows, dimension = bank.shape
        require_trainable(self.kind, num_rows, dimension, "memory bank")
        quantiser = self._faiss.IndexFlatL2(dimension)
        if self.kind == "ivfpq":
            index = self._faiss.IndexIVFPQ(quantiser, dimension, PQ_LISTS, PQ_SUBQUANTISERS, PQ_BITS)
            index.pq.cp.seed = SEED
        else:
            index = self._faiss.IndexIVFFlat(quantiser, dimension, num_lists(num_rows))
        index.cp.seed = SEED
        rows = bank.to("cpu", torch.float32).contiguous().numpy()
        index.train(rows)
        index.add(rows)
        self._serve(index)

    def _serve(self, index: Any) -> None:
        """Take over a filled index and make it ready to search."""
        index.nprobe = min(PROBED_LISTS, index.nlist)
        index.make_direct_map()
        self._index = index
        options = []
        if self.on_gpu:
            options = [self._faiss.GpuClonerOptions()]
            options[0].useFloat16 = self.kind == "ivfpq"  # the tables of 64 codes do not fit the GPU otherwise
        self._searched = self._on_device(index, *options)
        self.num_rows_, self.dimension_ = index.ntotal, index.d

    def _candidates(self, queries: torch.Tensor, k: int) -> torch.Tensor:
        _, found = self._searched.search(queries.contiguous().numpy(), k)
        indices = torch.from_numpy(found)
        short = (indices < 0).any(dim=1)  # the probed lists hold fewer than k rows
        if bool(short.any()):
            everything = self._faiss.SearchParametersIVF(nprobe=self._index.nlist)
            _, found = self._index.search(queries[short].contiguous().numpy(), k, params=everything)
            indices[short] = torch.from_numpy(found)
        return indices.clamp_(min=0)  # nothing is near a query that is not finite, and its distances show that


def num_lists(num_rows: int) -> int:
    """Return how many clusters "ivf" makes: about two square roots, with ROWS_PER_CENTROID rows in the mean."""
    return max(1, min(round(2 * num_rows**0.5), num_rows // ROWS_PER_CENTROID))


def require_trainable(kind: str, num_rows: int | None, dimension: int, what: str) -> None:
    """Raise where faiss cannot learn an index.

    Args:
        kind: Name of the index; those without a training need nothing.
        num_rows: Rows of the bank; None where they are not known yet.
        dimension: Columns of the bank.
        what: Name of the bank, for the message.

    Raises:
        ConfigurationError: The dimension cannot be divided into sub-quantisers.
        DataError: There are too few rows.
    """
    if kind == "ivfpq" and dimension % PQ_SUBQUANTISERS:
        raise ConfigurationError(
            f"--index ivfpq divides an embedding into {PQ_SUBQUANTISERS} parts, but it has {dimension} values: choose "
            f"--target_embed_dimension {max(1, dimension // PQ_SUBQUANTISERS) * PQ_SUBQUANTISERS} or --index sq8"
        )
    needed = {"ivfpq": PQ_LISTS * ROWS_PER_CENTROID, "ivf": ROWS_PER_CENTROID}.get(kind, 0)
    if num_rows is not None and num_rows < needed:
        raise DataError(
            f"the {what} has {num_rows} patches, --index {kind} needs {needed} to learn its centroids: keep more "
            "patches (sampler -p), give more images, or choose --index sq8"
        )


def serialised_kind(blob: torch.Tensor) -> str | None:
    """Return which index a tensor of bytes holds, by its first four; None for anything else."""
    if blob.dtype != torch.uint8 or blob.ndim != 1:
        return None
    return _HEADER_KINDS.get(bytes(blob[:4].tolist()))


def read_index(faiss: Any, blob: torch.Tensor, dimension: int) -> Any:
    """Read a serialised index, checking what it says of itself before and after.

    Args:
        faiss: The module.
        blob: uint8, from `InvertedListsNN.tensors`.
        dimension: Values of an embedding of the model.

    Raises:
        ConfigurationError: The bytes are damaged, or of an index of other embeddings.
    """
    kind = serialised_kind(blob)
    content = bytes(blob.numpy()) if kind else b""
    if kind is None or len(content) < _HEADER.size:
        raise _damaged("it is no index of this kind")
    _, found, num_rows, is_trained, metric = _HEADER.unpack_from(content)
    require_columns("search index", found, dimension)
    bytes_per_row = PQ_SUBQUANTISERS * PQ_BITS // 8 if kind == "ivfpq" else 4 * dimension
    if not is_trained or metric != _METRIC_L2 or not 1 <= num_rows <= len(content) // bytes_per_row:
        raise _damaged(f"{num_rows} rows in {len(content)} bytes")
    try:
        index = faiss.deserialize_index(blob.numpy())
        sizes = [index.invlists.list_size(number) for number in range(index.nlist)]
        fits = index.d == index.quantizer.d == dimension and index.quantizer.ntotal == index.nlist
        if not fits or sum(sizes) != index.ntotal or index.ntotal != num_rows:
            raise _damaged("its parts disagree")
        index.make_direct_map()  # refuses row numbers that are out of range
    except (RuntimeError, AttributeError, MemoryError) as error:
        raise _damaged(str(error).splitlines()[-1][:200] if str(error) else type(error).__name__) from error
    return index


def _damaged(reason: str) -> ConfigurationError:
    return ConfigurationError(f"the search index is damaged ({reason}): train the model anew")


def float32_rows(blob: torch.Tensor, dimension: int) -> torch.Tensor:
    """Return the bank [M, D] float32 that a serialised "ivf" index holds, in the order of its rows.

    Raises:
        ConfigurationError: It is damaged, or faiss is not installed.
    """
    search = InvertedListsNN("ivf", num_workers=torch.get_num_threads())  # which torch and faiss have in common
    search.restore({FAISS_INDEX: blob}, dimension)
    return search.rows(torch.arange(search.num_rows_))


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
        with _processor_known_to_openblas():
            return importlib.import_module("faiss")
    except ImportError as error:
        LOGGER.debug("faiss cannot be imported: %s", error)
        return None


@contextmanager
def _processor_known_to_openblas() -> Iterator[None]:
    """Tell an OpenBLAS that is loaded meanwhile which of its kernels fits this processor.

    The one inside the faiss packages (0.3.15) takes processors from 2021 on for one of 2004, which makes faiss five
    times slower. It reads the environment once, when it is loaded; other BLAS libraries do not look at it.
    """
    name = "OPENBLAS_CORETYPE"
    kernels = {"AVX512": "SkylakeX", "AVX2": "Haswell"}.get(torch.backends.cpu.get_cpu_capability())
    if kernels is None or name in os.environ:
        yield
        return
    with _ENVIRONMENT:
        os.environ[name] = kernels
        try:
            yield
        finally:
            os.environ.pop(name, None)


_ENVIRONMENT = threading.Lock()


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
def warn_once(message: str) -> None:
    """Log a warning the first time it is given in this process."""
    LOGGER.warning(message)

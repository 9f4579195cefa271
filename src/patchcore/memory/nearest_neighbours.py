"""Which search a model uses, and the scores that are made of its distances."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from patchcore.errors import ConfigurationError
from patchcore.memory.faiss_search import (
    FAISS_INDEX,
    FaissNN,
    InvertedListsNN,
    faiss_sees_gpu,
    float32_rows,
    import_faiss,
    require_one_faiss,
    serialised_kind,
    warn_once,
)
from patchcore.memory.flat_search import FlatNN
from patchcore.memory.search import MEMORY_BANK, NearestNeighbours, check_num_neighbours, stored_bank
from patchcore.memory.torch_search import FP16_BANK, SQ8_BANK, EightBitNN, ProjectedNN, TorchNN
from patchcore.runtime import available_cpus


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
        members = search.rows(nearest_rows.to(search.device))  # [Q, D]
        _, support_rows = search.search(members, support)  # [Q, B]
        moved = queries.to(search.device)
        own = search.exact_distances(moved, nearest_rows.to(search.device)[:, None])[:, 0]  # [Q]
        distances = search.exact_distances(moved, support_rows)  # [Q, B]
        # In logarithms: exp of a distance overflows from 89 on.
        return (1 - torch.exp(own - distances.logsumexp(dim=1))).to(queries.device)


def build_nearest_neighbours(
    faiss_on_gpu: bool, faiss_num_workers: int | None, device: torch.device, index: str = "flat"
) -> NearestNeighbours:
    """Choose the search.

    "flat" is torch on the device of the features, or faiss where one of its options asks for it. Both find the same
    neighbours at the same distances. torch is the default because it needs no further package, and is about as fast.

    Args:
        faiss_on_gpu: Use faiss on the GPU; where that cannot be, one warning per process.
        faiss_num_workers: Use faiss with so many threads where the search is on the CPU, >= 1; None if not.
        device: Where the features are.
        index: One of configs.INDEXES.

    Returns:
        A search without a bank.

    Raises:
        ConfigurationError: faiss is installed twice or needed and not installed, or `faiss_num_workers` is below 1.
    """
    require_one_faiss()
    option = "--faiss_on_gpu" if faiss_on_gpu else "--faiss_num_workers"
    wants_faiss = faiss_on_gpu or faiss_num_workers is not None
    if index in ("ivf", "ivfpq"):
        workers = faiss_num_workers or torch.get_num_threads()
        return InvertedListsNN(index, faiss_on_gpu, workers, gpu_index=device.index or 0)
    if index != "flat":
        if wants_faiss:
            warn_once(f"{option}: --index {index} searches with torch on {device}")
        return _TORCH_SEARCHES[index](device)
    if not wants_faiss:
        return FlatNN(device)
    faiss = import_faiss()
    if faiss_on_gpu and faiss is not None and faiss_sees_gpu(faiss):
        return FaissNN(True, faiss_num_workers or available_cpus(), gpu_index=device.index or 0)
    if faiss_num_workers is not None and faiss is not None and device.type == "cpu":
        return FaissNN(faiss_on_gpu, faiss_num_workers)
    warn_once(f"{option}: {_what_is_missing(faiss)}, searching with torch on {device}")
    return FlatNN(device)


_TORCH_SEARCHES: dict[str, Callable[[torch.device], NearestNeighbours]] = {
    "projected": ProjectedNN,
    "fp16": lambda device: TorchNN(device, torch.float16),
    "sq8": EightBitNN,
}


def _what_is_missing(faiss: Any | None) -> str:
    if faiss is not None:
        return "faiss has no GPU here (a CPU build, or no device)"
    installed = require_one_faiss()
    return f"{installed[0]} cannot be imported" if installed else "faiss is not installed"


def restore_search(
    search: NearestNeighbours, index: str, tensors: Mapping[str, torch.Tensor], dimension: int
) -> NearestNeighbours:
    """Give a search the bank of a stored model, which may have had another index if that kept float32 values.

    Args:
        search: Without a bank.
        index: Its name.
        tensors: What the search of the stored model gave.
        dimension: Values of the model's embeddings.

    Returns:
        The search.

    Raises:
        ConfigurationError: The tensors are missing, damaged, of another model, or hold too few digits for this index.
        DataError: The bank does not fit this index.
    """
    if search.reads(tensors):
        search.restore(tensors, dimension)
        return search
    search.fit(_float32_bank(tensors, index, dimension))
    if index not in ("flat", "projected"):
        warn_once(f"--index {index} moves scores, but the model's thresholds were measured with its own index")
    return search


def _float32_bank(tensors: Mapping[str, torch.Tensor], index: str, dimension: int) -> torch.Tensor:
    """Return the bank [M, D] of a stored model that kept all its digits."""
    kept = {FP16_BANK: "fp16", SQ8_BANK: "sq8"}
    if FAISS_INDEX in tensors:
        kept[FAISS_INDEX] = serialised_kind(tensors[FAISS_INDEX]) or "an unknown index"
    if kept.get(FAISS_INDEX) == "ivf":
        return float32_rows(tensors[FAISS_INDEX], dimension)
    for name, stored in kept.items():
        if name in tensors:
            raise ConfigurationError(
                f"the model keeps its memory bank as {stored}, --index {index} needs float32 values: leave --index "
                "out, or train the model with it"
            )
    return stored_bank(tensors, MEMORY_BANK, torch.float32, dimension)

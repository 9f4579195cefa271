"""Images of one class in batches, read by worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from patchcore.datasets.inspection import InspectionDataset
from patchcore.errors import DataError
from patchcore.runtime import available_cpus


class ImageLoader:
    """Batches of a data set, read by worker processes.

    Iterating gives dictionaries of stacked items: `image` uint8 [B, 3, H, W], `mask` uint8 [B, H, W] where the
    data set has masks, `index` int64 [B].

    Args:
        dataset: What to read, in its order.
        batch_size: Images per batch; always 1 where images keep their own resolution, as their sizes may differ.
        num_workers: Worker processes, at most one per CPU core and batch; 0 reads in this process.
        pin_memory: Give page-locked tensors, for copies to a GPU.

    Raises:
        DataError: While iterating: a file cannot be read.
    """

    def __init__(
        self, dataset: InspectionDataset, batch_size: int, num_workers: int = 0, pin_memory: bool = False
    ) -> None:
        self.dataset = dataset
        if dataset.preprocessing.max_side_px is not None:
            batch_size = 1
        num_batches = -(-len(dataset) // batch_size)
        self._loader = DataLoader(
            _ErrorsAsItems(dataset),
            batch_size=batch_size,
            num_workers=min(num_workers, available_cpus(), num_batches),
            collate_fn=_collate,
            pin_memory=pin_memory,
        )

    @property
    def num_images(self) -> int:
        return len(self.dataset)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self._loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


class _ErrorsAsItems(Dataset[Any]):
    """Hands a DataError over as an item: raised in a worker it would arrive wrapped in a traceback."""

    def __init__(self, dataset: InspectionDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | DataError:
        try:
            return self.dataset[index]
        except DataError as error:
            return error


def _collate(items: list[Any]) -> Any:
    for item in items:
        if isinstance(item, DataError):
            return item
    return torch.utils.data.default_collate(items)

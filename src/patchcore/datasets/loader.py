"""Images of one class in batches, read by worker processes."""

from __future__ import annotations

import itertools
import math
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
        joined_pixels: Join consecutive batches, as many as have no more pixels than this together; 0 joins none.
            A worker still hands over small ones, so that the first is there soon; unless they are to be page-locked,
            which the joined ones would not be: then it reads as many images at once.

    Raises:
        DataError: While iterating: a file cannot be read.
    """

    def __init__(
        self,
        dataset: InspectionDataset,
        batch_size: int,
        num_workers: int = 0,
        pin_memory: bool = False,
        joined_pixels: int = 0,
    ) -> None:
        self.dataset = dataset
        self._num_joined = 1
        if dataset.preprocessing.max_side_px is not None:
            batch_size = 1
        else:
            self._num_joined = max(1, joined_pixels // (batch_size * dataset.preprocessing.imagesize_px**2))
        if pin_memory:
            batch_size, self._num_joined = batch_size * self._num_joined, 1
        num_workers = min(num_workers, available_cpus(), math.ceil(len(dataset) / batch_size))
        self._loader = DataLoader(
            _ErrorsAsItems(dataset),
            batch_size=batch_size,
            num_workers=num_workers,
            prefetch_factor=max(2, self._num_joined) if num_workers else None,  # one joined batch ahead
            collate_fn=_collate,
            pin_memory=pin_memory,
        )

    @property
    def num_images(self) -> int:
        return len(self.dataset)

    def __len__(self) -> int:
        return math.ceil(len(self._loader) / self._num_joined)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        batches = self._read()
        while together := list(itertools.islice(batches, self._num_joined)):
            yield {key: torch.cat([batch[key] for batch in together]) for key in together[0]}

    def _read(self) -> Iterator[dict[str, torch.Tensor]]:
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

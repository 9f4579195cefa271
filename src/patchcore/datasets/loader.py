"""Images of one class in batches, read ahead by threads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import default_collate

from patchcore.datasets.inspection import InspectionDataset
from patchcore.runtime import available_cpus, in_threads

BATCHES_AHEAD = 2  # that are read while the model works on one


class ImageLoader:
    """Batches of a data set, read ahead by threads.

    Decoding and resizing leave the interpreter free, so that threads are as fast as processes. They cost no copy of
    this process's memory, which slowed the model down more than reading does, nor shared memory, and none is left
    behind.

    Iterating gives dictionaries of stacked items: `image` uint8 [B, 3, H, W], `mask` uint8 [B, H, W] where the
    data set has masks, `index` int64 [B].

    Args:
        dataset: What to read, in its order.
        batch_size: Images per batch; always 1 where images keep their own resolution, as their sizes may differ.
        num_workers: Threads that read ahead, at most one per CPU core and image; 0 reads when a batch is asked for.
        pin_memory: Give page-locked images, for copies to a GPU; nothing else goes there.

    Raises:
        DataError: While iterating: a file cannot be read.
    """

    def __init__(
        self, dataset: InspectionDataset, batch_size: int, num_workers: int = 0, pin_memory: bool = False
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size if dataset.preprocessing.max_side_px is None else 1
        self.num_workers = min(num_workers, available_cpus(), len(dataset))
        self.pin_memory = pin_memory

    @property
    def num_images(self) -> int:
        return len(self.dataset)

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        items = self._items()
        while together := list(itertools.islice(items, self.batch_size)):
            batch = default_collate(together)
            if self.pin_memory:
                batch["image"] = batch["image"].pin_memory()
            yield batch

    def _items(self) -> Iterator[dict[str, Any]]:
        """Yield the items in order; what goes wrong with one is raised where its turn comes."""
        numbers = range(len(self.dataset))
        if self.num_workers == 0:
            return map(self.dataset.__getitem__, numbers)
        return in_threads(self.dataset.__getitem__, numbers, self.num_workers, BATCHES_AHEAD * self.batch_size)

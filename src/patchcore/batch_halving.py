"""Smaller batches where memory does not suffice for those that were asked for; no score depends on their size."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from patchcore.detector import AnomalyDetector, ImageBatches, Prediction
from patchcore.failures import is_out_of_memory

LOGGER = logging.getLogger(__name__)

R = TypeVar("R")

LoaderOf = Callable[[int], ImageBatches]
"""From the number of images per batch to what reads them."""


def call_in_memory(function: Callable[[ImageBatches], R], loader_of: LoaderOf, batch_size: int, category: str) -> R:
    """Call what reads images, from the start with half the images per batch whenever memory does not suffice.

    Args:
        function: What reads them, such as a detector's `fit`.
        loader_of: What reads its images.
        batch_size: Images per batch to begin with.
        category: The class, for the message.

    Returns:
        What the function returned.

    Raises:
        MemoryError, RuntimeError: Memory does not suffice for one image at a time, or ran out after the last batch,
            where smaller ones would change nothing.
    """
    while True:
        loader = _Watched(loader_of(batch_size))
        try:
            return function(loader)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or loader.is_exhausted or batch_size == 1:
                raise
        batch_size //= 2  # outside of the handler, whose traceback keeps the memory of what failed
        _tell(category, batch_size)


class _Watched:
    """Batches that tell whether all of them have been handed out."""

    def __init__(self, loader: ImageBatches) -> None:
        self.loader = loader
        self.is_exhausted = False

    @property
    def num_images(self) -> int:
        return self.loader.num_images

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.is_exhausted = False  # an ensemble reads them once for each of its backbones
        yield from self.loader
        self.is_exhausted = True


class PredictInMemory:
    """Scores batches, in parts from the first one on for which memory does not suffice.

    Args:
        detector: What scores.
    """

    def __init__(self, detector: AnomalyDetector) -> None:
        self.detector = detector
        self._largest: int | None = None

    def __call__(self, images: torch.Tensor, inside: torch.Tensor | None = None) -> list[Prediction]:
        """Score images; the predictions are those of consecutive parts.

        Args:
            images: uint8 [B, 3, H, W].
            inside: bool [B, H, W], what counts of each; None for everything.

        Raises:
            MemoryError, RuntimeError: Memory does not suffice for one image.
        """
        predictions: list[Prediction] = []
        while len(images):
            size = min(self._largest or len(images), len(images))
            prediction = self._attempt(images[:size], inside if inside is None else inside[:size])
            if prediction is None:
                self._largest = size // 2
                _tell(self.detector.source.category, self._largest)
            else:
                predictions.append(prediction)
                images, inside = images[size:], inside if inside is None else inside[size:]
        return predictions

    def _attempt(self, images: torch.Tensor, inside: torch.Tensor | None) -> Prediction | None:
        try:
            if inside is not None:
                return self.detector.predict_inside(images, inside)
            return self.detector.predict(images)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or len(images) == 1:
                raise
            return None


def _tell(category: str, batch_size: int) -> None:
    LOGGER.warning("%s: out of memory, goes on with %d image(s) per batch", category, batch_size)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the failed attempt held is of the wrong sizes

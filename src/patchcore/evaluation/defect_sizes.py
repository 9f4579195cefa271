"""Quartiles of the size of defects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SizeQuartile:
    """Defective images of about one size.

    Attributes:
        number: 1 (smallest defects) to 4.
        min_px: Smallest number of defect pixels among them.
        max_px: Largest one.
        images: int64 positions of the images.
    """

    number: int
    min_px: int
    max_px: int
    images: np.ndarray


def size_quartiles(defect_px: np.ndarray, labels: np.ndarray) -> list[SizeQuartile]:
    """Divide the defective images of a class by the size of their defects.

    Images are ranked by size and divided into quarters as equal in number as sizes allow: images with equally many
    defect pixels are never divided. Those whose mask is empty after the crop have no size and are left out.

    Args:
        defect_px: int [N] defect pixels of each image.
        labels: bool [N], True for defective.

    Returns:
        The quartiles that hold an image, smallest first.
    """
    images = np.flatnonzero(np.asarray(labels, bool) & (defect_px > 0))
    if not len(images):
        return []
    sizes = defect_px[images]
    # The rank of the first image of equal size decides for all of them.
    first_rank = np.searchsorted(np.sort(sizes), sizes)
    numbers = 1 + 4 * first_rank // len(sizes)
    found = []
    for number in range(1, 5):
        chosen = numbers == number
        if chosen.any():
            found.append(SizeQuartile(number, int(sizes[chosen].min()), int(sizes[chosen].max()), images[chosen]))
    return found

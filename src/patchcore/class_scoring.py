"""All images of a loader scored by a detector, with their masks, and how long that takes."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from patchcore.batch_halving import PredictInMemory
from patchcore.datasets.images import IGNORED
from patchcore.datasets.inspection import InspectionDataset
from patchcore.datasets.loader import ImageLoader
from patchcore.detector import AnomalyDetector, Prediction
from patchcore.runtime import progress

LATENCY_IMAGES = 20
LATENCY_WARMUP = 2
LATENCY_SECONDS = 10  # of measuring, after which LATENCY_IMAGES_AT_LEAST are enough
LATENCY_IMAGES_AT_LEAST = 3


@dataclass(frozen=True)
class ScoredImages:
    """Raw results on the test images of one class, in the order of the records.

    Images may differ in size: maps and masks are as high and as wide as the highest and the widest one, and those of
    an image lie at the top left. The margin holds the map's minimum, which moves no extreme of the class, and IGNORED.
    """

    scores: np.ndarray  # float32 [N]
    maps: np.ndarray | None  # float32 [N, H, W]
    masks: np.ndarray | None  # uint8 [N, H, W]
    images: list[np.ndarray] | None  # uint8 [3, h, w] each, kept for pictures alone
    sizes: np.ndarray  # int64 [N, 2], height and width of each image
    timings: dict[str, float | int | None]

    def of_image(self, arrays: np.ndarray, index: int) -> np.ndarray:
        """Return what `maps` or `masks` hold of one image, [h, w], without the margin."""
        height, width = self.sizes[index]
        return arrays[index, :height, :width]


def score_images(detector: AnomalyDetector, loader: ImageLoader, keep_images: bool) -> ScoredImages:
    """Score all images of a loader, and time it."""
    predictions: list[Prediction] = []
    masks: list[np.ndarray] = []
    images: list[np.ndarray] = []
    sizes: list[tuple[int, int]] = []
    predict = PredictInMemory(detector)
    started = time.perf_counter()
    for batch in progress(loader, f"{loader.dataset.category}: scoring", total=len(loader)):
        predictions += predict(batch["image"])
        sizes += [tuple(image.shape[1:]) for image in batch["image"]]
        # Copies: what a worker sent keeps a file open as long as it is held, and systems allow about a thousand.
        if "mask" in batch:
            masks.append(batch["mask"].numpy().copy())
        if keep_images:
            images += list(batch["image"].numpy().copy())
    largest = max(height for height, _ in sizes), max(width for _, width in sizes)
    for i, prediction in enumerate(predictions):  # one after the other: all maps may be large
        if prediction.maps is not None and prediction.maps.shape[1:] != largest:
            lowest = prediction.maps.min(axis=(1, 2), keepdims=True)
            predictions[i] = replace(prediction, maps=extended(prediction.maps, largest, lowest))
    joined = detector.join(predictions)
    seconds = time.perf_counter() - started
    timings: dict[str, float | int | None] = {
        "test_images": loader.num_images,
        "images_per_second": loader.num_images / seconds,
    }
    return ScoredImages(
        joined.scores,
        joined.maps,
        np.concatenate([extended(mask, largest, IGNORED) for mask in masks]) if masks else None,
        images if keep_images else None,
        np.array(sizes),
        timings,
    )


def extended(arrays: np.ndarray, size: tuple[int, int], fill: np.ndarray | int) -> np.ndarray:
    """Give arrays [B, h, w] a margin at the bottom and on the right, so that they have `size`.

    Args:
        arrays: Maps or masks; they come back as they are if they have that size.
        size: Height and width, at least those of the arrays.
        fill: Value of the margin: one number, or [B, 1, 1].
    """
    height, width = arrays.shape[1:]
    if (height, width) == size:
        return arrays
    extended = np.empty((len(arrays), *size), arrays.dtype)
    extended[:] = fill
    extended[:, :height, :width] = arrays
    return extended


def latency(detector: AnomalyDetector, test: InspectionDataset) -> dict[str, float | int | None]:
    """Return the median and 95th percentile of the time for one image that is in memory, ms."""
    images = [test[i]["image"][None] for i in range(min(LATENCY_IMAGES, len(test)))]
    for image in images[:LATENCY_WARMUP]:
        detector.predict(image)
    milliseconds: list[float] = []
    for image in progress(images, f"{test.category}: latency"):
        started = time.perf_counter()
        detector.predict(image)
        milliseconds.append(1000 * (time.perf_counter() - started))
        if len(milliseconds) >= LATENCY_IMAGES_AT_LEAST and sum(milliseconds) > 1000 * LATENCY_SECONDS:
            break
    p50, p95 = np.percentile(milliseconds, [50, 95])
    return {"latency_p50_ms": float(p50), "latency_p95_ms": float(p95)}

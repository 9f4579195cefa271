"""A stored model for Python: `load_detector(folder).predict(images)`."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from patchcore.batch_halving import PredictInMemory
from patchcore.configs import RuntimeConfig, require_at_least
from patchcore.datasets.images import (
    Placement,
    crop_image,
    crop_labels,
    place_of_file,
    read_image,
    read_mask,
    size_mismatch,
    to_rgb,
)
from patchcore.detector import AnomalyDetector, NotFittedError, Prediction
from patchcore.errors import ConfigurationError, DataError
from patchcore.failures import is_out_of_memory
from patchcore.inference.results import ImageResult
from patchcore.prediction import open_detector, require_large_enough, require_scores_of_single_images
from patchcore.runtime import available_cpus, resolve_device, set_threads

LOGGER = logging.getLogger(__name__)

ImageLike: TypeAlias = "str | os.PathLike[str] | np.ndarray | Image.Image"

BATCH_SIZE = 8  # more gains nothing on a CPU; a GPU is busy with it at 224 px
BATCHES_AHEAD = 2  # images that are read while the model computes: bounds the memory


@dataclass(frozen=True)
class RegionOfInterest:
    """The part of every image that counts.

    Attributes:
        mask: bool [H, W], of the size of the upright images.
        name: Where it comes from, for messages.
    """

    mask: np.ndarray
    name: str

    @classmethod
    def of(cls, source: str | os.PathLike[str] | np.ndarray) -> RegionOfInterest:
        """Take an array, or read an image file whose non-zero pixels count.

        Raises:
            ConfigurationError: It cannot be read, is no mask, or is empty.
        """
        if isinstance(source, np.ndarray):
            if source.ndim != 2:
                raise ConfigurationError(f"found a region of interest of shape {list(source.shape)}, expected [H, W]")
            mask, name = source != 0, "the region of interest"
        else:
            name = f"--roi {os.fspath(source)!r}"
            try:
                mask = read_mask(Path(source)).astype(bool)
            except DataError as error:
                raise ConfigurationError(f"region of interest: {error}") from error
        if not mask.any():
            raise ConfigurationError(f"{name} is black everywhere, expected white where the images count")
        return cls(mask, name)

    def cropped(self, path: Path, image: Image.Image, placement: Placement) -> np.ndarray:
        """Return what of the region the model sees, bool [crop_height, crop_width].

        Raises:
            DataError: It is of another size than the image, or lies outside of the model's crop.
        """
        size = (image.height, image.width)
        if self.mask.shape != size:
            raise DataError(size_mismatch(Path(self.name), self.mask.shape, path, size))
        inside = crop_labels(self.mask.astype(np.uint8), placement, padding=0) == 1
        if not inside.any():
            raise DataError(f"{path}: {self.name} lies outside of the part of the image that this model sees")
        return inside


@dataclass(frozen=True)
class PreparedImage:
    """An image that was read, resized and cropped for the model.

    Attributes:
        path: Its file; None for an array.
        image: RGB, upright, whole.
        pixels: uint8 [3, crop_height, crop_width].
        placement: The resize and crop.
        inside: bool [crop_height, crop_width], what counts; None for everything.
        roi: The same of the whole image, bool [H, W].
    """

    path: Path | None
    image: Image.Image
    pixels: torch.Tensor
    placement: Placement
    inside: np.ndarray | None
    roi: np.ndarray | None


@dataclass(frozen=True)
class Outcome:
    """What became of one item of a stream.

    Attributes:
        item: What was to be scored.
        result: What the model says; None if the item cannot be read or scored.
        image: RGB, upright, whole; None with an error.
        error: Why there is no result.
    """

    item: ImageLike
    result: ImageResult | None = None
    image: Image.Image | None = None
    error: DataError | None = None


class LoadedDetector:
    """A stored model that scores files, arrays and PIL images, from whichever threads.

    Args:
        detector: A fitted detector.
        batch_size: Images that the model takes at once; 1 where images keep their own resolution.
        num_workers: Threads that read and resize images while the model computes.

    Raises:
        ConfigurationError: The model's scores say nothing of a single image.
    """

    def __init__(self, detector: AnomalyDetector, batch_size: int = BATCH_SIZE, num_workers: int | None = None) -> None:
        require_scores_of_single_images(detector)
        require_at_least("--batch_size", batch_size, 1, 65536)
        require_at_least("--num_workers", num_workers if num_workers is not None else 1, 1)
        self.detector = detector
        self.batch_size = 1 if detector.preprocessing.max_side_px is not None else batch_size
        self.num_workers = min(num_workers or available_cpus(), 64)
        self._predict = PredictInMemory(detector)
        self._one_at_a_time = threading.Lock()  # no detector promises more, and all cores work on one batch anyway

    @property
    def has_thresholds(self) -> bool:
        """Whether the model decides; without, it was stored without calibration."""
        return self.detector.calibration_ is not None

    @property
    def has_maps(self) -> bool:
        """Whether the model locates what it finds."""
        return self.detector.has_maps

    def predict(
        self, images: ImageLike | Iterable[ImageLike], roi: str | os.PathLike[str] | np.ndarray | None = None
    ) -> list[ImageResult]:
        """Score images.

        Args:
            images: One image or several: paths of files, PIL images, and arrays uint8 [H, W, 3] (RGB) or [H, W] (gray),
                mixed as you like. The score of an image does not depend on the others.
            roi: What counts of every image: a mask [H, W] of the size of the upright images, or the path of one; score
                and decision are then those of what lies inside.

        Returns:
            One result for each image, in order.

        Raises:
            DataError: A file cannot be read, or an image cannot be scored.
            ConfigurationError: The region of interest is none, or the method cannot leave a part of an image out.
            TypeError, ValueError: Something is no image.
        """
        items = [images] if isinstance(images, (str, os.PathLike, np.ndarray, Image.Image)) else list(images)
        region = self.region(roi)
        results = []
        with self.workers() as pool:
            for outcome in self.stream(items, region, pool):
                if outcome.error is not None:
                    raise outcome.error
                assert outcome.result is not None
                results.append(outcome.result)
        return results

    def region(self, roi: str | os.PathLike[str] | np.ndarray | None) -> RegionOfInterest | None:
        """Read a region of interest.

        Raises:
            ConfigurationError: It is none, or the method cannot leave a part of an image out.
        """
        if roi is None:
            return None
        if not self.has_maps:
            raise ConfigurationError(
                f"a model of method {self.detector.method!r} scores whole images and cannot leave a part of one out: "
                "leave --roi away, or use a method with anomaly maps"
            )
        return RegionOfInterest.of(roi)

    @contextmanager
    def workers(self) -> Iterator[ThreadPoolExecutor]:
        """Give threads for the work around the model; what they have not begun is dropped at the end."""
        pool = ThreadPoolExecutor(self.num_workers, "predict")
        try:
            yield pool
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def stream(
        self, items: Iterable[ImageLike], region: RegionOfInterest | None, pool: ThreadPoolExecutor
    ) -> Iterator[Outcome]:
        """Score images one batch after the other, while threads read the next ones.

        Args:
            items: As many as you like: they are taken as they are needed, and few are held at once.
            region: What counts of every image.
            pool: Threads that read.

        Yields:
            One outcome for each item, in order.
        """
        reading: deque[tuple[ImageLike, Future[PreparedImage | DataError]]] = deque()
        ahead = BATCHES_AHEAD * self.batch_size + self.num_workers
        source = iter(items)
        while True:
            for item in source:
                reading.append((item, pool.submit(self._prepared, item, region)))
                if len(reading) >= ahead:
                    break
            if not reading:
                return
            batch = [reading.popleft() for _ in range(min(self.batch_size, len(reading)))]
            yield from self._outcomes([(item, future.result()) for item, future in batch])

    def inspect(self, item: ImageLike) -> Outcome:
        """Score one image in the calling thread; what is wrong with it is in the outcome."""
        return self._outcomes([(item, self._prepared(item, None))])[0]

    def _prepared(self, item: ImageLike, region: RegionOfInterest | None) -> PreparedImage | DataError:
        """Read, resize and crop an image; what is wrong with it is returned."""
        try:
            return prepared_image(item, self.detector, region)
        except DataError as error:
            return error
        except MemoryError as error:
            return DataError(f"{_name(item)}: {_failure(error)}")

    def _outcomes(self, batch: Sequence[tuple[ImageLike, PreparedImage | DataError]]) -> list[Outcome]:
        """Score the images of a batch that could be read."""
        readable = [prepared for _, prepared in batch if isinstance(prepared, PreparedImage)]
        results: list[ImageResult | DataError] = []
        for _, alike in groupby(readable, key=lambda image: image.pixels.shape):
            results += self._scored(list(alike))
        scored = iter(results)
        return [_outcome(item, prepared, scored) for item, prepared in batch]

    def _scored(self, images: Sequence[PreparedImage]) -> list[ImageResult | DataError]:
        """Score images that have one size, in smaller batches if memory does not suffice for all."""
        pixels = torch.stack([image.pixels for image in images])  # [B, 3, H, W]
        inside = [image.inside for image in images if image.inside is not None]
        region = torch.from_numpy(np.stack(inside)) if inside else None
        try:
            with self._one_at_a_time:
                predictions = self._predict(pixels, region)
        except NotFittedError:
            raise
        except (MemoryError, RuntimeError) as error:
            LOGGER.debug("a batch of %d image(s) could not be scored", len(images), exc_info=True)
            failure = _failure(error)  # not the error itself, whose traceback holds the memory
            return [DataError(f"{_name(image.path)}: {failure}") for image in images]
        rows = [(prediction, row) for prediction in predictions for row in range(len(prediction.scores))]
        return [self._result(image, *row) for image, row in zip(images, rows, strict=True)]

    def _result(self, image: PreparedImage, prediction: Prediction, number: int) -> ImageResult | DataError:
        """Return what a prediction says of the image of that number in its batch; NaN is no decision, but an error."""
        values = [prediction.scores[number]]
        if prediction.maps is not None:
            values.append(prediction.maps[number])
        if not all(np.isfinite(value).all() for value in values):
            return DataError(
                f"{_name(image.path)}: the model gives a score or an anomaly map that is not finite: use --precision "
                "float32, or train the model anew"
            )
        score, calibration = float(prediction.scores[number]), self.detector.calibration_
        pixel = calibration.pixel if calibration else None
        return ImageResult(
            path=image.path,
            height=image.image.height,
            width=image.image.width,
            score=score,
            normalized=float(calibration.image.normalized(prediction.scores[number])) if calibration else None,
            is_anomalous=score > calibration.image.threshold if calibration else None,
            threshold=calibration.image.threshold if calibration else None,
            pixel_threshold=pixel.threshold if pixel else None,
            model_map=None if prediction.maps is None else prediction.maps[number],
            placement=image.placement,
            roi=image.roi,
        )


def _outcome(
    item: ImageLike, prepared: PreparedImage | DataError, scored: Iterator[ImageResult | DataError]
) -> Outcome:
    """Return what became of an image; the next of those scored is that of this one, if it could be read."""
    result = prepared if isinstance(prepared, DataError) else next(scored)
    if isinstance(result, DataError):
        return Outcome(item, error=result)
    assert isinstance(prepared, PreparedImage)
    return Outcome(item, result, prepared.image)


def _name(item: ImageLike | None) -> str:
    """Return what an image is called in messages."""
    return os.fspath(item) if isinstance(item, (str, os.PathLike)) else "image"


def _failure(error: MemoryError | RuntimeError) -> str:
    """Return in one line why an image has no result."""
    if isinstance(error, DataError):
        return str(error)
    told = " ".join(f"{type(error).__name__}: {error}".split())
    if is_out_of_memory(error):
        return f"out of memory for this image alone ({told}): end other programs, or use another --device"
    return f"the model failed ({told})"


def prepared_image(item: ImageLike, detector: AnomalyDetector, region: RegionOfInterest | None) -> PreparedImage:
    """Read, resize and crop an image as a model was trained.

    Args:
        item: A path, an array or a PIL image.
        detector: The model.
        region: What counts of it; None for everything.

    Raises:
        DataError: The file cannot be read, or the image does not fit the model or the region.
        TypeError, ValueError: It is no image.
    """
    path = Path(item) if isinstance(item, (str, os.PathLike)) else None
    name = path or Path("image")
    image = read_image(path) if path is not None else as_rgb(item)
    placement = place_of_file(name, image.height, image.width, detector.preprocessing)
    require_large_enough(detector, placement, name)
    pixels = torch.from_numpy(crop_image(image, placement).copy()).permute(2, 0, 1)  # [3, H, W]
    inside = region.cropped(name, image, placement) if region is not None else None
    roi = region.mask if region is not None else None
    return PreparedImage(path, image, pixels, placement, inside, roi)


def as_rgb(item: object) -> Image.Image:
    """Return an array or a PIL image as an upright 8-bit RGB image.

    Raises:
        DataError: The PIL image cannot be read as RGB.
        TypeError: It is neither.
        ValueError: The array has another shape or type than an image, or no pixels.
    """
    if isinstance(item, Image.Image):
        return to_rgb(item, "image")
    if not isinstance(item, np.ndarray):
        raise TypeError(f"found {type(item).__name__}, expected a path, a PIL image or a numpy array")
    if item.dtype != np.uint8 or item.ndim not in (2, 3) or (item.ndim == 3 and item.shape[2] != 3) or not item.size:
        raise ValueError(
            f"found an array of shape {list(item.shape)} and type {item.dtype}, expected uint8 [H, W, 3] or [H, W]: "
            "give several images as a list"
        )
    return Image.fromarray(item).convert("RGB")


def load_detector(
    folder: str | os.PathLike[str],
    device: str = "auto",
    *,
    threads: int | None = None,
    precision: str = "float32",
    batch_size: int = BATCH_SIZE,
    num_workers: int | None = None,
    resize: int | None = None,
) -> LoadedDetector:
    """Open a stored model of any method for new images.

    Args:
        folder: A model folder, or the export of a model.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        threads: Threads of CPU kernels, of the whole process; None leaves them as they are.
        precision: Numbers that the backbone computes with: "float32", "bf16", "fp16" or "auto".
        batch_size: Images that the model takes at once.
        num_workers: Threads that read images; None for one per CPU core.
        resize: The model's resize, px, which folders of the original PatchCore do not store.

    Raises:
        ConfigurationError: There is no such model or device, or the model's scores say nothing of a single image.
    """
    runtime = RuntimeConfig(device, threads=threads, precision=precision)
    return load_with(Path(folder), runtime, batch_size, num_workers, resize)


def load_with(
    model: Path, runtime: RuntimeConfig, batch_size: int, num_workers: int | None, resize_px: int | None = None
) -> LoadedDetector:
    """Open a stored model to compute as `runtime` says."""
    set_threads(runtime.threads)
    detector = open_detector(model, resolve_device(runtime.device, runtime.gpus), runtime, resize_px)
    return LoadedDetector(detector, batch_size, num_workers)

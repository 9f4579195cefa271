"""Stored models: from a model folder back to a detector, and what it says of one image."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import patchcore.methods  # noqa: F401  # enters every detector into the registry
from patchcore.config_json import config_from_dict
from patchcore.configs import RuntimeConfig, require_choice
from patchcore.datasets.images import Placement, crop_image, map_on_image, place_of_file
from patchcore.detector import DETECTORS, AnomalyDetector, DetectorBuilder
from patchcore.errors import ConfigurationError, DataError
from patchcore.storage.legacy import is_original_folder, read_original_header, read_original_tensors
from patchcore.storage.model_folder import ModelHeader, is_verified, read_model_header, read_model_tensors
from patchcore.storage.moved_weights import WEIGHTS_VARIABLE, with_moved_weights
from patchcore.storage.torch_export import read_torch_file

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredModel:
    """A stored model of which everything but the tensors has been read and checked.

    Attributes:
        folder: The model folder, or a file of `torch.save`.
        header: What it says of itself, or what was typed of a bare state dict.
        builder: Makes the unfitted detector; models of one configuration may share it.
    """

    folder: Path
    header: ModelHeader
    builder: DetectorBuilder

    def restore(self, device: torch.device) -> AnomalyDetector:
        """Read what was learned and return the fitted detector on a device.

        Raises:
            ConfigurationError: The tensors are missing, damaged or do not fit the configuration.
        """
        detector = self.builder(self.header.source, device)
        require_same_weights(self.header, detector, str(self.folder))
        try:
            detector.restore(read_tensors(self.folder))
        except (ConfigurationError, DataError) as error:
            raise ConfigurationError(f"model {str(self.folder)!r}: {error}") from error
        if self.header.calibration is not None and not detector.can_calibrate:
            raise ConfigurationError(
                f"model {str(self.folder)!r} has thresholds, but its scores are scaled over the test images: "
                "model.json was edited, train the model anew"
            )
        detector.calibration_ = self.header.calibration
        return detector


def read_header(path: Path, typed: Mapping[str, Any] | None = None) -> ModelHeader | None:
    """Read what a stored model says of itself; None for a bare state dict.

    Args:
        path: A model folder, one of the original PatchCore, or a file of `torch.save`.
        typed: What was typed of the preprocessing, by the names of PreprocessingConfig: folders of the original store
            the size of the crop alone.

    Raises:
        ConfigurationError: It is missing or damaged.
    """
    if not path.exists():
        raise ConfigurationError(
            f"model {str(path)!r} not found, expected a model folder (models/<data set>_<class> of a run) or a file of "
            "torch.save"
        )
    if path.is_file():
        return read_torch_file(path).header
    return read_original_header(path, typed) if is_original_folder(path) else read_model_header(path)


def warn_unverified(headers: Mapping[Path, ModelHeader | None]) -> None:
    """Say in one line which models have no digests, so that nothing tells whether they are as they were written."""
    unverified = [str(path) for path, header in headers.items() if header is not None and not is_verified(header)]
    if unverified:
        LOGGER.warning("not verified, written before models had digests: %s", ", ".join(unverified))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read what a model learned, from its folder or a file of `torch.save`."""
    if path.is_file():
        return read_torch_file(path).tensors
    return read_original_tensors(path) if is_original_folder(path) else read_model_tensors(path)


def require_same_weights(header: ModelHeader, detector: AnomalyDetector, where: str) -> None:
    """Raise ConfigurationError if a backbone came out with other weights than those that the model was trained with."""
    found = {weights.name: weights.sha256 for weights in detector.backbones()}
    for trained in header.backbones:
        if trained not in detector.backbones():
            libraries = ", ".join(f"{name} {header.libraries.get(name)}" for name in ("torch", "torchvision", "timm"))
            raise ConfigurationError(
                f"model {where!r}: backbone {trained.name!r} has weights of sha256 "
                f"{found.get(trained.name, 'none')[:16]}, it was trained with {trained.sha256[:16]} ({libraries}): "
                f"give it the weights back ({WEIGHTS_VARIABLE} names a file or its folder), or train it anew"
            )


def stored_config(header: ModelHeader, where: str) -> Any:
    """Return the configuration of a stored model, with the defaults of what it does not name.

    Args:
        header: What the model says of itself.
        where: Name of the model, for messages.

    Raises:
        ConfigurationError: The method is unknown, or the configuration none of it.
    """
    try:
        require_choice("method", header.method, DETECTORS)
        return config_from_dict(DETECTORS[header.method].config_class, header.config, "config")
    except ConfigurationError as error:
        raise ConfigurationError(f"model {where!r}: {error}") from error


def prepare_stored(header: ModelHeader, where: str, runtime: RuntimeConfig) -> DetectorBuilder:
    """Load what a stored model needs beside its tensors, such as the backbone.

    Args:
        header: What model.json says.
        where: Name of the model, for messages.
        runtime: How the machine computes.

    Raises:
        ConfigurationError: The method is unknown, or the configuration names something that is not there.
    """
    config = stored_config(replace(header, config=with_moved_weights(header.config, where)), where)
    try:
        return DETECTORS[header.method].prepare(config, header.preprocessing, runtime)
    except ConfigurationError as error:
        raise ConfigurationError(f"model {where!r}: {error}") from error


def load_detector(path: Path, device: torch.device, runtime: RuntimeConfig | None = None) -> AnomalyDetector:
    """Read any stored model that says what it is.

    Args:
        path: A folder that `AnomalyDetector.save` wrote, or the export of a model.
        device: Where the model shall run.
        runtime: How the machine computes.

    Raises:
        ConfigurationError: There is no model, it is damaged, a bare state dict, or belongs to an unknown method.
    """
    header = read_header(path)
    if header is None:
        raise ConfigurationError(
            f"{str(path)!r} is a bare state dict, which does not say what it belongs to: give the model folder"
        )
    warn_unverified({path: header})
    builder = prepare_stored(header, str(path), runtime or RuntimeConfig())
    return StoredModel(path, header, builder).restore(device)


@dataclass(frozen=True)
class ScoredImage:
    """What a detector says of one image.

    Attributes:
        score: Raw image score, higher is more anomalous.
        normalized: The score in (0, 1), 0.5 at the threshold; None without calibration.
        is_anomalous: Whether the score is above the threshold; None without calibration.
        anomaly_map: float32 [crop_height, crop_width], raw; None for methods without maps.
        placement: The resize and crop that the image had.
    """

    score: float
    normalized: float | None
    is_anomalous: bool | None
    anomaly_map: np.ndarray | None
    placement: Placement

    def map_on_image(self, height: int, width: int) -> np.ndarray | None:
        """Return the anomaly map in the frame of the whole image, with crop and resize undone.

        Args:
            height, width: Size of the result, px: that of the image, or of a scaled copy of it.

        Returns:
            float32 [height, width], NaN where the crop left the image out; None for methods without maps.
        """
        return None if self.anomaly_map is None else map_on_image(self.anomaly_map, self.placement, height, width)


def score_image(detector: AnomalyDetector, image: Image.Image, path: Path) -> ScoredImage:
    """Resize and crop an image as the model was trained, and score it.

    Args:
        detector: A fitted detector whose `can_calibrate` holds: the scores of the others say nothing of one image.
        image: RGB, upright, of any size, as `datasets.images.read_image` returns it.
        path: Its file, for messages.

    Raises:
        DataError: The image is too long or too small for this model.
    """
    placement = place_of_file(path, image.height, image.width, detector.preprocessing)
    if min(placement.crop_height, placement.crop_width) < detector.smallest_side_px:
        raise DataError(
            f"{path}: scored at {placement.crop_width} x {placement.crop_height} px, smaller than a tile of "
            f"{detector.smallest_side_px} px of this model: use a larger image"
        )
    pixels = torch.from_numpy(crop_image(image, placement).copy()).permute(2, 0, 1)  # [3, H, W]
    prediction = detector.predict(pixels[None])
    score, calibration = float(prediction.scores[0]), detector.calibration_
    return ScoredImage(
        score,
        float(calibration.image.normalized(prediction.scores)[0]) if calibration else None,
        score > calibration.image.threshold if calibration else None,
        prediction.maps[0] if prediction.maps is not None else None,
        placement,
    )

"""Stored models: from a model folder back to a detector."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import patchcore.methods  # noqa: F401  # enters every detector into the registry
from patchcore.config_json import config_from_dict
from patchcore.configs import RuntimeConfig, require_choice
from patchcore.datasets.images import Placement
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
            detector.restore(read_tensors(self.folder, self.header))
        except (ConfigurationError, DataError) as error:
            raise ConfigurationError(f"model {str(self.folder)!r}: {error}") from error
        if self.header.calibration is not None and not detector.can_calibrate:
            raise ConfigurationError(
                f"model {str(self.folder)!r} has thresholds, but its scores are scaled over the test images: "
                "model.json was edited, train the model anew"
            )
        detector.calibration_ = self.header.calibration
        detector.learned_images_ = self.header.learned_images
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
    if not os.path.exists(path):  # unlike Path.exists, also of names that are too long for any file
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


def read_tensors(path: Path, header: ModelHeader) -> dict[str, torch.Tensor]:
    """Read what a model learned, from its folder or a file of `torch.save`.

    Args:
        path: The folder or file.
        header: What `read_header` gave of it, so that both are of one model.

    Raises:
        ConfigurationError: It is damaged, or was replaced since its header was read.
    """
    if path.is_file():
        file = read_torch_file(path)
        if file.header is not None and replace(file.header, config=header.config) != header:  # options may override it
            raise ConfigurationError(f"{str(path)!r} was replaced while it was read: call again")
        return file.tensors
    return read_original_tensors(path) if is_original_folder(path) else read_model_tensors(path, header)


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


def open_detector(
    path: Path, device: torch.device, runtime: RuntimeConfig | None = None, resize_px: int | None = None
) -> AnomalyDetector:
    """Read any stored model that says what it is.

    Args:
        path: A folder that `AnomalyDetector.save` wrote, one of the original PatchCore, or the export of a model.
        device: Where the model shall run.
        runtime: How the machine computes.
        resize_px: The model's resize, which folders of the original do not store; None for what is stored.

    Raises:
        ConfigurationError: There is no model, it is damaged, a bare state dict, belongs to an unknown method, or has
            another resize.
    """
    header = read_header(path, {"resize_px": resize_px})
    if header is None:
        raise ConfigurationError(
            f"{str(path)!r} is a bare state dict, which does not say what it belongs to: give the model folder"
        )
    if resize_px is not None and header.preprocessing.resize_px != resize_px:
        raise ConfigurationError(
            f"--resize {resize_px} was typed, but model {str(path)!r} was trained with "
            f"{header.preprocessing.resize_px}: leave --resize out"
        )
    warn_unverified({path: header})
    builder = prepare_stored(header, str(path), runtime or RuntimeConfig())
    return StoredModel(path, header, builder).restore(device)


def require_scores_of_single_images(detector: AnomalyDetector) -> None:
    """Raise ConfigurationError if the scores of a model say nothing of a single image."""
    if not detector.can_calibrate:
        raise ConfigurationError(
            "this model scales its scores over a whole test set (--score_normalization minmax), so that it has "
            "none for a single image: train it with --score_normalization calibrated"
        )


def require_large_enough(detector: AnomalyDetector, placement: Placement, path: Path) -> None:
    """Raise DataError if an image is smaller after resize and crop than a model can score."""
    if min(placement.crop_height, placement.crop_width) < detector.smallest_side_px:
        raise DataError(
            f"{path}: scored at {placement.crop_width} x {placement.crop_height} px, smaller than a tile of "
            f"{detector.smallest_side_px} px of this model: use a larger image"
        )

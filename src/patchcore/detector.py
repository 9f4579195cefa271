"""The contract of every method, and the registry of detectors.

A detector is complete after construction. `fit` sees normal images and learns attributes that end in `_`,
`calibrate` derives thresholds from normal images, `predict` scores images independently of one another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch

from patchcore.configs import PreprocessingConfig, SearchConfig, TrainingSource, config_from_dict, require_choice
from patchcore.errors import ConfigurationError, DataError
from patchcore.scoring.calibration import Calibration
from patchcore.storage.model_folder import (
    FORMAT_VERSION,
    ModelHeader,
    read_model_header,
    read_model_tensors,
    write_model_folder,
)


@dataclass(frozen=True)
class Prediction:
    """Raw results for a batch, higher is more anomalous.

    Attributes:
        scores: float32 [B], image scores.
        maps: float32 [B, S, S], anomaly maps at the size of the images; None for methods without maps.
    """

    scores: np.ndarray
    maps: np.ndarray | None


class ImageBatches(Protocol):
    """What `fit` reads: batches with `image` uint8 [B, 3, S, S], and their number of images."""

    @property
    def num_images(self) -> int: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]: ...


class NotFittedError(RuntimeError):
    """A detector was used before `fit`."""


class AnomalyDetector(ABC):
    """Base class of every method.

    Attributes:
        method: Name in the registry and in model folders.
        config_class: Dataclass of the method's configuration.
        preprocessing: Resize and crop that its images had.
        source: What it is trained on.
        calibration_: Thresholds; None before `calibrate` or without it.
    """

    method: ClassVar[str]
    config_class: ClassVar[type]

    def __init__(self, preprocessing: PreprocessingConfig, source: TrainingSource) -> None:
        self.preprocessing = preprocessing
        self.source = source
        self.calibration_: Calibration | None = None

    @abstractmethod
    def fit(self, loader: ImageBatches) -> AnomalyDetector:
        """Learn from normal images and return self."""

    @abstractmethod
    def out_of_fold_calibration(self) -> Calibration | None:
        """Calibrate by K-fold cross-validation on the training images; None where there are too few."""

    @abstractmethod
    def predict(self, images: torch.Tensor) -> Prediction:
        """Score images.

        Args:
            images: uint8 [B, 3, S, S], RGB, resized and cropped as `preprocessing` says.

        Raises:
            NotFittedError: `fit` has not been called.
        """

    @abstractmethod
    def configuration(self) -> dict[str, Any]:
        """Return the method's configuration as JSON values."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what was learned, by name."""

    @classmethod
    @abstractmethod
    def prepare(cls, config: Any, preprocessing: PreprocessingConfig, search: SearchConfig) -> DetectorBuilder:
        """Load what all classes share, and return what makes an unfitted detector for one of them on a device.

        Raises:
            ConfigurationError: The configuration names something unknown, or weights cannot be had.
        """

    @abstractmethod
    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `tensors` gave for a fitted detector of this configuration.

        Raises:
            ConfigurationError: Configuration and tensors do not fit each other.
        """

    def release_training_data(self) -> None:  # noqa: B027  # most methods keep nothing
        """Free what only calibration needs; called once it is over."""

    def save(self, folder: Path) -> None:
        """Write a model folder that `load_detector` reads back; it appears whole or not at all."""
        header = ModelHeader(
            FORMAT_VERSION, self.method, self.configuration(), self.preprocessing, self.source, self.calibration_
        )
        write_model_folder(folder, header, self.tensors())


D = TypeVar("D", bound=type[AnomalyDetector])

DETECTORS: dict[str, type[AnomalyDetector]] = {}


def register_detector(cls: D) -> D:
    """Enter a detector into the registry under its `method` name."""
    DETECTORS[cls.method] = cls
    return cls


@dataclass(frozen=True)
class StoredModel:
    """A model folder of which everything but the tensors has been read and checked.

    Attributes:
        folder: The folder.
        header: What its model.json says.
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
        try:
            detector.restore(read_model_tensors(self.folder))
        except (ConfigurationError, DataError) as error:
            raise ConfigurationError(f"model {str(self.folder)!r}: {error}") from error
        detector.calibration_ = self.header.calibration
        return detector


def prepare_stored(header: ModelHeader, where: str, search: SearchConfig) -> DetectorBuilder:
    """Load what a stored model needs beside its tensors, such as the backbone.

    Args:
        header: What model.json says.
        where: Name of the model, for messages.
        search: How neighbours are searched, for memory banks.

    Raises:
        ConfigurationError: The method is unknown, or the configuration names something that is not there.
    """
    import_module("patchcore.methods")  # enters every detector into the registry
    try:
        require_choice("method", header.method, DETECTORS)
        detector = DETECTORS[header.method]
        config: Any = config_from_dict(detector.config_class, header.config, "config")
        return detector.prepare(config, header.preprocessing, search)
    except ConfigurationError as error:
        raise ConfigurationError(f"model {where!r}: {error}") from error


def load_detector(folder: Path, device: torch.device, search: SearchConfig | None = None) -> AnomalyDetector:
    """Read any model folder.

    Args:
        folder: A folder that `AnomalyDetector.save` wrote.
        device: Where the model shall run.
        search: How neighbours are searched, for memory banks.

    Raises:
        ConfigurationError: The folder is no model, is damaged, or belongs to an unknown method.
    """
    header = read_model_header(folder)
    builder = prepare_stored(header, str(folder), search or SearchConfig())
    return StoredModel(folder, header, builder).restore(device)


def require_tensor(tensors: Mapping[str, torch.Tensor], name: str, ndim: int) -> torch.Tensor:
    """Return a stored tensor, or raise ConfigurationError if it is missing or of another rank."""
    if name not in tensors or tensors[name].ndim != ndim:
        found = f"rank {tensors[name].ndim}" if name in tensors else ", ".join(sorted(tensors)) or "no tensors"
        raise ConfigurationError(f"model tensor {name!r} of rank {ndim} expected, found {found}: train the model anew")
    return tensors[name]


DetectorBuilder = Callable[[TrainingSource, torch.device], AnomalyDetector]

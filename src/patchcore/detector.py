"""The contract of every method, and the registry of detectors.

A detector is complete after construction. `fit` sees normal images and learns attributes that end in `_`,
`out_of_fold_calibration` derives thresholds from them, `predict` scores images independently of one another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch

from patchcore.configs import BackboneWeights, PreprocessingConfig, RuntimeConfig, TrainingSource
from patchcore.errors import ConfigurationError
from patchcore.process_group import ALONE, Processes
from patchcore.scoring.calibration import Calibration
from patchcore.storage.manifest import library_versions
from patchcore.storage.model_folder import FORMAT_VERSION, ModelHeader, write_model_folder
from patchcore.storage.torch_export import torch_export_bytes

R = TypeVar("R")


@dataclass(frozen=True)
class Prediction:
    """Raw results for a batch, higher is more anomalous.

    Attributes:
        scores: float32 [B], image scores.
        maps: float32 [B, H, W], anomaly maps at the size of the images; None for methods without maps.
        members: What each member of an ensemble gave, where the scores depend on the images scored together.
    """

    scores: np.ndarray
    maps: np.ndarray | None
    members: tuple[Prediction, ...] = ()


class ImageBatches(Protocol):
    """What `fit` reads: batches with `image` uint8 [B, 3, H, W], and their number of images.

    H = W = `imagesize_px`; with `max_side_px`, B = 1 and sizes differ from batch to batch.
    """

    @property
    def num_images(self) -> int: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]: ...


class ImageShares(Protocol):
    """The training images in shares, each of which another process can read."""

    @property
    def images(self) -> Sequence[torch.Tensor]:
        """Numbers of the images of each share, int64 [n] ascending; together they are all images."""

    @property
    def runtime(self) -> RuntimeConfig:
        """How these processes compute."""

    def map(self, calls: Iterable[tuple[int, Callable[[ImageBatches], R]]]) -> Iterator[tuple[int, R]]:
        """Call functions with shares, each in a process that has room for it.

        Args:
            calls: Number of a share, and what to call with its images; picklable, and the result too. Taken one by
                one, while those that were taken first are at work.

        Yields:
            Number of the share and the result, as they come.

        Raises:
            DataError: An image cannot be used, or a process was lost again and again.
        """


AfterEpoch = Callable[[int, Callable[[], dict[str, Any]]], None]
"""Number of the epoch, from 1, and what returns the state to resume from; whatever it measures selects nothing."""


@dataclass(frozen=True)
class TrainingPlan:
    """What a run adds to a training; methods without epochs look at the folder alone.

    Attributes:
        held_out: Normal images that are kept from the gradients.
        resume_from: State of an interrupted training of the same configuration and images.
        after_epoch: Called after each epoch; the detector predicts then.
        scratch_folder: Where large arrays lie during the training, in files without a name; None: that of `tempfile`.
        shares: What reads the images in other processes, for a configuration that learns so; None for others.
        processes: Those that train together, for a method that can; each fits the images of its own share.
        first_image: Number of the first of them among the images of all processes.
        first_held_out: The same of the held-out images.
    """

    held_out: ImageBatches | None = None
    resume_from: Mapping[str, Any] | None = None
    after_epoch: AfterEpoch | None = None
    scratch_folder: Path | None = None
    shares: ImageShares | None = None
    processes: Processes = ALONE
    first_image: int = 0
    first_held_out: int = 0


@dataclass(frozen=True)
class TrainingArtifacts:
    """What a method leaves of its training beside the model folder's own files.

    Attributes:
        history: One row per epoch, column to value; with an `epoch`, and losses in columns that end in `loss`.
        loss_unit: Unit of these losses.
        exports: Files for other programs, name to what returns the content; they go into the model folder.
    """

    history: tuple[Mapping[str, float | None], ...] = ()
    loss_unit: str = ""
    exports: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)


class NotFittedError(RuntimeError):
    """A detector was used before `fit`."""


class AnomalyDetector(ABC):
    """Base class of every method.

    Attributes:
        method: Name in the registry and in model folders.
        config_class: Dataclass of the method's configuration.
        has_maps: Whether predictions have anomaly maps, without which there are no pictures.
        preprocessing: Resize and crop that its images had.
        source: What it is trained on.
        calibration_: Thresholds; None before calibration or without it.
        learned_images_: Digests of the images that updates have added, so that none is learned twice.
        plan: What `fit` does besides learning, for methods that learn in epochs; to be set before it.
    """

    method: ClassVar[str]
    config_class: ClassVar[type]
    has_maps: ClassVar[bool] = True

    def __init__(self, preprocessing: PreprocessingConfig, source: TrainingSource) -> None:
        self.preprocessing = preprocessing
        self.source = source
        self.calibration_: Calibration | None = None
        self.learned_images_: tuple[str, ...] = ()
        self.plan = TrainingPlan()

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
            images: uint8 [B, 3, H, W], RGB, resized and cropped as `preprocessing` says.

        Raises:
            NotFittedError: `fit` has not been called.
        """

    def predict_inside(self, images: torch.Tensor, inside: torch.Tensor) -> Prediction:
        """Score images by what lies in a region of each; the maps are those of `predict`.

        Args:
            images: uint8 [B, 3, H, W], as for `predict`.
            inside: bool [B, H, W], pixels of the region, at least one in each image.

        Raises:
            ConfigurationError: The method does not know where in an image its score comes from.
        """
        raise ConfigurationError(
            f"a model of method {self.method!r} scores whole images and cannot leave a part of one out: leave the "
            "region of interest (--roi) away, or use a method with anomaly maps"
        )

    @abstractmethod
    def configuration(self) -> dict[str, Any]:
        """Return the method's configuration as JSON values."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what was learned, by name."""

    def backbones(self) -> tuple[BackboneWeights, ...]:
        """Return which weights its frozen networks have; methods without one return nothing."""
        return ()

    @classmethod
    @abstractmethod
    def prepare(cls, config: Any, preprocessing: PreprocessingConfig, runtime: RuntimeConfig) -> DetectorBuilder:
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

    @property
    def can_calibrate(self) -> bool:
        """Whether the score of an image stands for itself, so that a threshold means something."""
        return True

    @property
    def smallest_side_px(self) -> int:
        """Shortest side that an image may have after the preprocessing, px."""
        return 1

    def join(self, predictions: Sequence[Prediction]) -> Prediction:
        """Join the predictions of the batches of one test set, at least one, with maps of one size."""
        maps = [p.maps for p in predictions if p.maps is not None]
        return Prediction(np.concatenate([p.scores for p in predictions]), np.concatenate(maps) if maps else None)

    def release_training_data(self) -> None:  # noqa: B027  # most methods keep nothing
        """Free what only calibration needs; called once it is over."""

    def training_artifacts(self, log_group: str) -> TrainingArtifacts:
        """Return what the training has left besides the model, as far as it came; most methods leave nothing.

        Args:
            log_group: Name of the run, for the names of files.
        """
        return TrainingArtifacts()

    def save(self, folder: Path, exports: Mapping[str, bytes] | None = None) -> None:
        """Write a model folder that `open_detector` reads back; it appears whole or not at all.

        Args:
            folder: Where the model goes.
            exports: Further files of the folder, name to content.
        """
        write_model_folder(folder, self._header(), self.tensors(), exports or {})

    def torch_export(self) -> bytes:
        """Return the model as one file of `torch.save`: configuration and weights, nothing that executes."""
        return torch_export_bytes(self._header(), self.tensors())

    @classmethod
    def require_graph(cls, config: Any) -> None:
        """Raise ConfigurationError if models of this configuration have no `graph`."""
        raise _no_graph(cls.method)

    def graph(self) -> torch.nn.Module:
        """Return what `predict` computes as a module: uint8 [B, 3, S, S] to scores [B] and maps [B, S, S], float32.

        Raises:
            NotFittedError: `fit` has not been called.
            ConfigurationError: As `require_graph`.
        """
        raise _no_graph(self.method)

    def _header(self) -> ModelHeader:
        return ModelHeader(
            FORMAT_VERSION,
            self.method,
            self.configuration(),
            self.preprocessing,
            self.source,
            self.calibration_,
            self.backbones(),
            library_versions(),
            self.learned_images_,
        )


D = TypeVar("D", bound=type[AnomalyDetector])

DETECTORS: dict[str, type[AnomalyDetector]] = {}


def register_detector(cls: D) -> D:
    """Enter a detector into the registry under its `method` name."""
    DETECTORS[cls.method] = cls
    return cls


def require_tensor(tensors: Mapping[str, torch.Tensor], name: str, ndim: int) -> torch.Tensor:
    """Return a stored tensor, or raise ConfigurationError if it is missing or of another rank."""
    if name not in tensors or tensors[name].ndim != ndim:
        found = f"rank {tensors[name].ndim}" if name in tensors else ", ".join(sorted(tensors)) or "no tensors"
        raise ConfigurationError(f"model tensor {name!r} of rank {ndim} expected, found {found}: train the model anew")
    return tensors[name]


def require_images(images: torch.Tensor, preprocessing: PreprocessingConfig) -> None:
    """Raise ValueError unless a batch has the shape that the preprocessing gives."""
    side = preprocessing.imagesize_px
    any_size = preprocessing.max_side_px is not None
    height, width = ("H", "W") if any_size else (side, side)
    fits = images.ndim == 4 and images.shape[1] == 3 and (any_size or images.shape[2:] == (side, side))
    if not fits:
        raise ValueError(
            f"found images of shape {list(images.shape)}, expected [B, 3, {height}, {width}]: "
            "resize and crop them as the model's preprocessing says"
        )


DetectorBuilder = Callable[[TrainingSource, torch.device], AnomalyDetector]


def _no_graph(method: str) -> ConfigurationError:
    able = sorted(name for name, detector in DETECTORS.items() if detector.graph is not AnomalyDetector.graph)
    return ConfigurationError(f"a model of method {method!r} has no graph, only {', '.join(able)} have")

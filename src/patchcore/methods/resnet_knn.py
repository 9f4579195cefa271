"""Nearest neighbours of whole images: one pooled feature vector for each."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from patchcore.config_json import config_to_dict
from patchcore.configs import BackboneWeights, PreprocessingConfig, ResNetKNNConfig, RuntimeConfig, TrainingSource
from patchcore.detector import (
    AnomalyDetector,
    DetectorBuilder,
    ImageBatches,
    NotFittedError,
    Prediction,
    register_detector,
    require_images,
    require_tensor,
)
from patchcore.errors import ConfigurationError, DataError
from patchcore.features.extractor import FeatureExtractor
from patchcore.features.layers import shared_extractor
from patchcore.memory.faiss_search import require_one_faiss
from patchcore.memory.nearest_neighbours import build_nearest_neighbours
from patchcore.memory.search import NearestNeighbours
from patchcore.runtime import progress
from patchcore.scoring.calibration import Calibration, calibrate

LOGGER = logging.getLogger(__name__)


@register_detector
class ResNetKNN(AnomalyDetector):
    """Mean distance of an image's pooled features to those of its nearest training images; it has no anomaly map.

    What is averaged over the whole image tells parts of one kind from another, and hardly a small defect from none:
    the baseline shows what a score of images gives without one of places.

    Args:
        config: Backbone and its one layer, features kept, number of neighbours.
        extractor: Feature maps of a frozen backbone, shared between classes.
        preprocessing: Resize and crop that the images have had.
        source: What the model is trained on.
        runtime: How the machine computes.

    Attributes:
        bank_: float32 [N, F], kept features of the training images; learned by `fit`.
        kept_: int64 [F], which features are kept; learned by `fit`.
    """

    method: ClassVar[str] = "resnet_knn"
    config_class: ClassVar[type] = ResNetKNNConfig
    has_maps: ClassVar[bool] = False

    def __init__(
        self,
        config: ResNetKNNConfig,
        extractor: FeatureExtractor,
        preprocessing: PreprocessingConfig,
        source: TrainingSource | None = None,
        runtime: RuntimeConfig | None = None,
    ) -> None:
        super().__init__(preprocessing, source or TrainingSource())
        self.config = config
        self.extractor = extractor
        self.runtime = runtime or RuntimeConfig()
        self.bank_: torch.Tensor | None = None
        self.kept_: torch.Tensor | None = None
        self._neighbours: NearestNeighbours | None = None

    @classmethod
    def prepare(
        cls, config: ResNetKNNConfig, preprocessing: PreprocessingConfig, runtime: RuntimeConfig
    ) -> DetectorBuilder:
        """Load the backbone once and return what makes a detector for each class.

        Raises:
            ConfigurationError: Backbone, weights or layer are unknown or do not fit.
        """
        require_one_faiss()
        extractor = shared_extractor(config.backbone, preprocessing.imagesize_px)
        return lambda source, device: cls(config, extractor.to(device), preprocessing, source, runtime)

    @property
    def _num_features(self) -> int:
        """What the backbone gives of an image: the channels of its layer."""
        return self.extractor.feature_shapes[self.config.backbone.layers[0]][0]

    def fit(self, loader: ImageBatches) -> ResNetKNN:
        """Keep the features of normal images that vary most over them.

        Args:
            loader: Batches of normal images.

        Raises:
            DataError: There are fewer images than neighbours and the one that is left out.
        """
        self._require_images(loader.num_images)
        batches = progress(loader, f"{self.source.category}: features", total=len(loader))
        features = torch.cat([self._pooled(batch["image"]) for batch in batches]).cpu()  # [N, C]
        count = self.config.num_features
        if count > self._num_features:
            LOGGER.info(
                "%s: all %d features of %s are kept, --num_features asks for %d",
                self.source.category,
                self._num_features,
                self.config.backbone.name,
                count,
            )
        self._set_bank(*most_varied(features, count))
        return self

    def _require_images(self, num_images: int) -> None:
        """Raise DataError before any work where leave-one-out has too few images."""
        k = self.config.num_neighbours
        if num_images == 0:
            raise DataError("no training images, expected at least one")
        if num_images > k:
            return
        if not self.config.clamp_neighbours:
            smaller = f"-k {num_images - 1}" if num_images > 1 else "more images"
            raise DataError(
                f"k={k} needs {k + 1} training images for leave-one-out, got {num_images}: use {smaller} or --clamp_k"
            )
        LOGGER.info(
            "%s: k=%d is lowered to %d, because there are %d training image(s)",
            self.source.category,
            k,
            clamped(k, num_images),
            num_images,
        )

    def _set_bank(self, bank: torch.Tensor, kept: torch.Tensor) -> None:
        self.bank_, self.kept_ = bank, kept
        device = self.extractor.mean.device
        neighbours = build_nearest_neighbours(self.runtime.faiss_on_gpu, self.runtime.faiss_num_workers, device)
        self._neighbours = neighbours.fit(bank)

    @torch.no_grad()
    def _pooled(self, images: torch.Tensor) -> torch.Tensor:
        """Return the mean [B, C] over the places of the layer's feature maps, on their device: nobody waits for it."""
        (feature_maps,) = self.extractor(images).values()
        return feature_maps.mean(dim=(2, 3))

    def _fitted(self) -> tuple[NearestNeighbours, torch.Tensor, torch.Tensor]:
        """Return the search, the bank and the kept features."""
        if self._neighbours is None or self.bank_ is None or self.kept_ is None:
            raise NotFittedError("this ResNetKNN has seen no images: call fit() or load a model folder")
        return self._neighbours, self.bank_, self.kept_

    def predict(self, images: torch.Tensor) -> Prediction:
        """Score images by their mean Euclidean distance to the k nearest training images.

        Args:
            images: uint8 [B, 3, S, S], RGB.

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: The images have another size than the model's preprocessing gives.
        """
        neighbours, bank, kept = self._fitted()
        require_images(images, self.preprocessing)
        features = self._pooled(images).cpu()[:, kept]  # [B, F]
        distances, _ = neighbours.search(features, clamped(self.config.num_neighbours, len(bank)))  # [B, k]
        return Prediction(distances.mean(dim=1).numpy(), None)

    def out_of_fold_calibration(self) -> Calibration | None:
        """Calibrate by leave-one-out: each training image is scored by the others.

        It costs one search. The choice of features is not repeated without each image: it uses no labels, and one
        image in so many hardly moves a standard deviation.
        """
        neighbours, bank, _ = self._fitted()
        if len(bank) < 2:
            return None
        scores = leave_one_out_distances(neighbours, bank, clamped(self.config.num_neighbours, len(bank)))
        return calibrate("kfold", len(bank), scores.numpy(), None)

    def backbones(self) -> tuple[BackboneWeights, ...]:
        return (self.extractor.weights,) if self.extractor.weights else ()

    def configuration(self) -> dict[str, Any]:
        return config_to_dict(self.config)

    def tensors(self) -> dict[str, torch.Tensor]:
        _, bank, kept = self._fitted()
        return {"bank": bank, "kept": kept}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over stored features.

        Raises:
            ConfigurationError: They do not fit one another or the configuration.
        """
        bank, kept = require_tensor(tensors, "bank", ndim=2), require_tensor(tensors, "kept", ndim=1)
        expected = min(self.config.num_features, self._num_features)
        if bank.shape[1] != expected or len(kept) != expected or bank.dtype != torch.float32:
            raise ConfigurationError(
                f"the bank holds {bank.shape[1]} features of {bank.dtype} and names {len(kept)}, the configuration "
                f"gives {expected} of float32: the files belong to different models"
            )
        if kept.dtype != torch.int64 or not bool(((kept >= 0) & (kept < self._num_features)).all()):
            raise ConfigurationError(
                f"the kept features are not numbers below {self._num_features}: train the model anew"
            )
        k, num_images = self.config.num_neighbours, len(bank)
        if num_images <= k and not self.config.clamp_neighbours:
            raise ConfigurationError(f"the bank holds {num_images} images, k={k} needs {k + 1}: train the model anew")
        self._set_bank(bank, kept)


def clamped(k: int, num_images: int) -> int:
    """Return how many neighbours are averaged: at most all training images but one, which leave-one-out scores."""
    return max(1, min(k, num_images - 1))


def most_varied(features: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the features of the largest standard deviation over images.

    Args:
        features: float32 [N, C].
        count: How many are chosen; all where there are no more.

    Returns:
        The chosen features float32 [N, F] in their order, and their numbers int64 [F]. Of equal ones the first count.
    """
    deviations = features.double().std(dim=0, correction=0)  # [C]
    kept = deviations.argsort(descending=True, stable=True)[:count].sort().values
    return features[:, kept].contiguous(), kept


def leave_one_out_distances(neighbours: NearestNeighbours, bank: torch.Tensor, k: int) -> torch.Tensor:
    """Return the mean distance of each row of a bank to the k nearest other rows.

    One neighbour more is searched and the row itself dropped, by its number and not by its distance: an image that is
    there twice is its twin's neighbour. Among more twins than are searched the row itself may be missing; all of them
    are at the same distance then, and the last is dropped.

    Args:
        neighbours: Search that holds the bank.
        bank: float32 [N, F].
        k: Neighbours that are averaged, < N.

    Returns:
        float64 [N].
    """
    distances, rows = neighbours.search(bank, k + 1)  # [N, k + 1]
    own = rows == torch.arange(len(bank), device=rows.device)[:, None]
    own[~own.any(dim=1), -1] = True
    return distances.double()[~own].view(len(bank), k).mean(dim=1)

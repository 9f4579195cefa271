"""FastFlow: one normalizing flow for each feature map of a frozen backbone.

Source: Yu et al., "FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing Flows" (2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from patchcore.config_json import config_to_dict
from patchcore.configs import (
    FastFlowConfig,
    PreprocessingConfig,
    SearchConfig,
    TrainingConfig,
    TrainingSource,
)
from patchcore.detector import (
    AnomalyDetector,
    DetectorBuilder,
    ImageBatches,
    NotFittedError,
    Prediction,
    TrainingArtifacts,
    register_detector,
    require_images,
)
from patchcore.errors import ConfigurationError, DataError
from patchcore.features.extractor import FeatureExtractor, build_extractor
from patchcore.methods.training import WITHOUT_HELD_OUT, EpochRecord, Training, load_weights
from patchcore.runtime import derive_seed, progress
from patchcore.scoring.anomaly_map import image_scores
from patchcore.scoring.calibration import Calibration, MapStatistics, calibrate

if TYPE_CHECKING:
    from patchcore.methods.normalizing_flow import FastFlowNet

IMAGES_PER_FORWARD = 8  # in calibration: bounds the latent variables that are held at once


@register_detector
class FastFlow(AnomalyDetector):
    """Negative log-likelihood of feature maps under normalizing flows.

    Args:
        config: Flows, training, and how likelihoods become maps and scores.
        extractor: Feature maps of a frozen backbone, shared between classes.
        preprocessing: Resize and crop that the images have had.
        source: What the model is trained on; its seed drives weights and order.

    Attributes:
        history_: One record per epoch, learned by `fit`; empty for a stored model.
    """

    method: ClassVar[str] = "fastflow"
    config_class: ClassVar[type] = FastFlowConfig

    def __init__(
        self,
        config: FastFlowConfig,
        extractor: FeatureExtractor,
        preprocessing: PreprocessingConfig,
        source: TrainingSource | None = None,
    ) -> None:
        super().__init__(preprocessing, source or TrainingSource())
        self.config = config
        self.extractor = extractor
        self.shapes = [_map_shape(extractor, layer) for layer in config.backbone.layers]
        self.device = extractor.mean.device
        self.history_: list[EpochRecord] = []
        self._flows: FastFlowNet | None = None
        self._features: list[torch.Tensor] | None = None
        self._weights_epoch = 0

    @classmethod
    def prepare(
        cls, config: FastFlowConfig, preprocessing: PreprocessingConfig, search: SearchConfig
    ) -> DetectorBuilder:
        """Load the backbone once and return what makes a detector for each class.

        Raises:
            ConfigurationError: Backbone, weights or layers are unknown or do not fit.
        """
        extractor = build_extractor(config.backbone, preprocessing.imagesize_px)
        return lambda source, device: cls(config, extractor.to(device), preprocessing, source)

    def fit(self, loader: ImageBatches) -> FastFlow:
        """Train one flow for each feature map of normal images.

        Args:
            loader: Batches of normal images. The plan's held-out images are kept from the gradients: their loss is in
                the history, and early stopping watches it.

        Raises:
            DataError: There are no images, or the training diverged.
            ConfigurationError: Early stopping is asked for without held-out images, or the plan resumes another
                training.
        """
        held_out = self.plan.held_out
        if self.config.training.patience is not None and held_out is None:
            raise ConfigurationError(WITHOUT_HELD_OUT)  # before the features are computed
        features = self._embedded(loader, "features")
        return self.fit_features(features, None if held_out is None else self._embedded(held_out, "held-out features"))

    def fit_features(self, features: list[torch.Tensor], held_out: list[torch.Tensor] | None = None) -> FastFlow:
        """Train on feature maps float32 [N, C, H, W] of each layer, as `fit` does from images."""
        training = self._training(features, self.config.training, "flows")
        if self.plan.resume_from is not None:
            training.load_state_dict(self.plan.resume_from)
        after_epoch = self.plan.after_epoch

        def report(training: Training, record: EpochRecord) -> None:
            assert after_epoch is not None
            self._flows = self._measured(training, features)  # the detector predicts, for as long as it is asked
            after_epoch(record.epoch, training.state_dict)
            self._flows = None

        self.history_ = training.run(features, held_out, None if after_epoch is None else report)
        self._flows = self._measured(training, features)
        self._features, self._weights_epoch = features, training.weights_epoch
        return self

    def _embedded(self, loader: ImageBatches, what: str) -> list[torch.Tensor]:
        """Compute the feature maps of all images once: the backbone is frozen and there is no augmentation."""
        if loader.num_images == 0:
            raise DataError("no training images, expected at least one")
        buffers = [
            torch.empty(loader.num_images, *shape).to(memory_format=torch.channels_last) for shape in self.shapes
        ]
        start = 0
        for batch in progress(loader, f"{self.source.category}: {what}", total=len(loader)):
            maps = self._feature_maps(batch["image"])
            for feature_map, buffer in zip(maps, buffers, strict=True):
                buffer[start : start + len(feature_map)] = feature_map
            start += len(maps[0])
        return buffers

    def _feature_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        maps = self.extractor(images)
        return [maps[layer] for layer in self.config.backbone.layers]

    def _training(self, features: Sequence[torch.Tensor], config: TrainingConfig, *purpose: str | int) -> Training:
        """Return a training of new flows, whose standardisation is that of some features."""
        flows = self._new_flows(*purpose)
        flows.standardise_by(features)
        seed = derive_seed(self.source.seed, self.source.category, *purpose, "training")
        description = f"{self.source.category}: {' '.join(map(str, purpose))}"
        return Training(flows, flows.mean_bits_per_dimension, config, seed, description)

    def _new_flows(self, *purpose: str | int) -> FastFlowNet:
        # Imported here: FrEIA brings scipy.stats, which takes a second that no other method should wait for.
        from patchcore.methods.normalizing_flow import FastFlowNet

        seed = derive_seed(self.source.seed, self.source.category, *purpose, "weights")
        return FastFlowNet(self.shapes, self.config, seed).to(self.device)

    def _measured(self, training: Training, features: Sequence[torch.Tensor]) -> FastFlowNet:
        """Return the flows of a training, which know how far each one's map spreads on the training images."""
        flows: FastFlowNet = training.module  # type: ignore[assignment]
        flows.measure_spread(features, IMAGES_PER_FORWARD)
        return flows

    def out_of_fold_calibration(self) -> Calibration | None:
        """Calibrate on the training images, each scored by flows that were trained without it.

        Each of a few folds is left out of a training of its own, from the cached features, for as many epochs as the
        model's own. K folds cost K - 1 times the training of the model. PatchCore's five, or one per image, would
        cost far more than the model; fewer folds train on fewer images, which makes scores and threshold higher, on
        the safe side of false alarms.

        Raises:
            NotFittedError: Training data are there only between `fit` and `release_training_data`.
            DataError: The training of a fold diverged.
        """
        if self._features is None:
            raise NotFittedError("out-of-fold calibration needs the training data: call it right after fit()")
        num_images = len(self._features[0])
        if num_images < 2:
            return None
        seed = derive_seed(self.source.seed, self.source.category, "folds")
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
        folds = order.tensor_split(min(self.config.calibration_folds, num_images))
        scores, maxima, means = (np.empty(num_images, dtype=np.float32) for _ in range(3))
        for number, fold in enumerate(progress(folds, f"{self.source.category}: calibration")):
            rest = order[~torch.isin(order, fold)].sort().values
            flows = self._fold_flows([maps[rest] for maps in self._features], number)
            for chunk in fold.split(IMAGES_PER_FORWARD):
                part = [maps[chunk].to(self.device) for maps in self._features]
                rows = chunk.numpy()
                scores[rows], maps_of_part = self._score(flows, part)
                statistics = MapStatistics.of([maps_of_part])
                maxima[rows], means[rows] = statistics.maxima, statistics.means
        return calibrate("kfold", len(folds), scores, MapStatistics(maxima, means))

    def _fold_flows(self, features: list[torch.Tensor], fold: int) -> FastFlowNet:
        """Return flows trained on some of the training images, for as many epochs as the model has."""
        without_stopping = replace(self.config.training, patience=None)
        training = self._training(features, without_stopping, "fold", fold)
        training.run(features, stop_after=self._weights_epoch)
        return self._measured(training, features)

    def release_training_data(self) -> None:
        self._features = None

    def predict(self, images: torch.Tensor) -> Prediction:
        """Score images by how unlikely their feature maps are.

        Args:
            images: uint8 [B, 3, S, S], RGB.

        Returns:
            Scores and maps in the unit of the map mode: bits per dimension ("nll"), the same in standard deviations
            of normal images ("weighted"), or the negative probability ("prob").

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: The images have another size than the model's preprocessing gives.
        """
        flows = self._require_fitted()
        require_images(images, self.preprocessing)
        return Prediction(*self._score(flows, self._feature_maps(images)))

    @torch.no_grad()
    def _score(self, flows: FastFlowNet, features: Sequence[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Return scores [B] and maps [B, S, S] of feature maps [B, C, H, W]."""
        grid = flows.anomaly_grid(features, self.config.map_mode)  # [B, h, w]
        scores = image_scores(grid, self.config.image_score)
        size = self.preprocessing.imagesize_px
        maps = F.interpolate(grid[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]  # [B, S, S]
        return scores.cpu().numpy(), maps.cpu().numpy()

    def _require_fitted(self) -> FastFlowNet:
        if self._flows is None:
            raise NotFittedError("this FastFlow has no trained flows: call fit() or load a model folder")
        return self._flows

    def training_artifacts(self, log_group: str) -> TrainingArtifacts:
        """Return the history, and the model as one file that plain torch reads."""
        history = tuple(config_to_dict(record) for record in self.history_)
        return TrainingArtifacts(history, {f"fastflow_{log_group}_final.pth": self.torch_export()})

    def configuration(self) -> dict[str, Any]:
        return config_to_dict(self.config)

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self._require_fitted().state_dict())

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over stored flows.

        Raises:
            ConfigurationError: They do not fit the configuration; the message names the tensors.
        """
        flows = self._new_flows("flows")
        load_weights(flows, tensors)
        self._flows = flows.eval()


def _map_shape(extractor: FeatureExtractor, layer: str) -> tuple[int, int, int]:
    channels, height, width = extractor.feature_shapes[layer]
    return channels, height, width

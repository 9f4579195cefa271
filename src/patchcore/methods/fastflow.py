"""FastFlow: one normalizing flow for each feature map of a frozen backbone.

Source: Yu et al., "FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing Flows" (2021).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.nn.functional as F

from patchcore.config_json import config_to_dict
from patchcore.configs import (
    BackboneConfig,
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
    TrainingPlan,
    register_detector,
    require_images,
)
from patchcore.errors import ConfigurationError, DataError
from patchcore.features.extractor import FeatureExtractor, build_extractor
from patchcore.methods.tiles import cut_tiles, drawn_corners, resized, tiled_map
from patchcore.methods.training import WITHOUT_HELD_OUT, EpochRecord, Training, load_weights
from patchcore.runtime import derive_seed, over_threads, progress
from patchcore.scoring.anomaly_map import image_scores
from patchcore.scoring.calibration import Calibration, MapStatistics, calibrate
from patchcore.scoring.post_processing import post_processed

if TYPE_CHECKING:
    from patchcore.methods.normalizing_flow import FastFlowNet

LOGGER = logging.getLogger(__name__)

IMAGES_PER_FORWARD = 8  # of cached features: bounds the latent variables that are held at once
SIZE_STEP_PX = 32  # what the strides of common backbones multiply to


@dataclass(frozen=True)
class TrainingData:
    """What calibration needs of the training images.

    Attributes:
        loader: The images.
        features: For each layer float32 [R, C, H, W], as they were trained on.
        image_of_row: Number of the image that each row belongs to, int64 [R].
    """

    loader: ImageBatches
    features: list[torch.Tensor]
    image_of_row: torch.Tensor


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
        self._unmeasured: list[torch.Tensor] | None = None  # features whose spread the flows do not know yet
        self._training_data: TrainingData | None = None
        self._weights_epoch = 0

    @classmethod
    def prepare(
        cls, config: FastFlowConfig, preprocessing: PreprocessingConfig, search: SearchConfig
    ) -> DetectorBuilder:
        """Load the backbone once and return what makes a detector for each class.

        Raises:
            ConfigurationError: Backbone, weights or layers are unknown or do not fit.
        """
        _require_tiles(config, preprocessing)
        extractor = _shared_extractor(config.backbone, preprocessing.imagesize_px)
        _require_scales(config, extractor, preprocessing.imagesize_px)
        return lambda source, device: cls(config, extractor.to(device), preprocessing, source)

    def fit(self, loader: ImageBatches) -> FastFlow:
        """Train one flow for each feature map of normal images.

        Args:
            loader: Batches of normal images. The plan's held-out images are kept from the gradients: their loss is in
                the history, and early stopping watches it.

        Raises:
            DataError: There are no images, one is smaller than a tile, or the training diverged.
            ConfigurationError: Early stopping is asked for without held-out images, or the plan resumes another
                training.
        """
        held_out = self.plan.held_out
        if self.config.training.patience is not None and held_out is None:
            raise ConfigurationError(WITHOUT_HELD_OUT)  # before the features are computed
        features, image_of_row = self._embedded(loader, "features")
        self._train(features, None if held_out is None else self._embedded(held_out, "held-out features")[0])
        self._training_data = TrainingData(loader, features, image_of_row)
        return self

    def _train(self, features: list[torch.Tensor], held_out: list[torch.Tensor] | None) -> None:
        """Train on feature maps float32 [R, C, H, W] of each layer."""
        training = self._training(features, self.config.training, "flows")
        if self.plan.resume_from is not None:
            training.load_state_dict(self.plan.resume_from)
        after_epoch = self.plan.after_epoch

        def report(training: Training, record: EpochRecord) -> None:
            assert after_epoch is not None
            # The detector predicts, for as long as it is asked.
            self._flows, self._unmeasured = training.module, features  # type: ignore[assignment]
            after_epoch(record.epoch, training.state_dict)
            self._flows = self._unmeasured = None

        self.history_ = training.history  # filled as it goes: what diverges leaves its history too
        training.run(features, held_out, None if after_epoch is None else report)
        self._flows = self._measured(training, features)
        self._weights_epoch = training.weights_epoch
        if self._weights_epoch < self.config.training.epochs:
            LOGGER.info(
                "%s: stopped after %d of %d epochs, the model has the weights of epoch %d",
                self.source.category,
                len(self.history_),
                self.config.training.epochs,
                self._weights_epoch,
            )

    def _embedded(self, loader: ImageBatches, what: str) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Compute the feature maps of all images once: the backbone is frozen and there is no augmentation.

        Returns:
            For each layer float32 [R, C, H, W], a row for each image or each tile drawn from it; and the number of
            the image that a row belongs to, int64 [R].
        """
        if loader.num_images == 0:
            raise DataError("no training images, expected at least one")
        tiles = self.config.tiles
        most_rows = loader.num_images * (tiles.training_tiles if tiles else 1)
        buffers = [torch.empty(most_rows, *shape, memory_format=torch.channels_last) for shape in self.shapes]
        image_of_row: list[int] = []
        num_images = 0
        for batch in progress(loader, f"{self.source.category}: {what}", total=len(loader)):
            inputs, image_of_input = self._training_inputs(batch["image"], num_images)
            rows = slice(len(image_of_row), len(image_of_row) + len(inputs))
            for feature_map, buffer in zip(self._feature_maps(inputs), buffers, strict=True):
                buffer[rows] = feature_map
            image_of_row += image_of_input
            num_images += len(batch["image"])
        return [buffer[: len(image_of_row)] for buffer in buffers], torch.tensor(image_of_row)

    def _training_inputs(self, images: torch.Tensor, first: int) -> tuple[torch.Tensor, list[int]]:
        """Return what the backbone gets of images [B, 3, H, W], and the number of each one's image from `first`."""
        tiles = self.config.tiles
        if tiles is None:
            return images, list(range(first, first + len(images)))
        inputs: list[torch.Tensor] = []
        numbers: list[int] = []
        for number, image in enumerate(images, start=first):
            seed = derive_seed(self.source.seed, self.source.category, "tiles", number)
            _, height, width = image.shape
            corners = drawn_corners(height, width, tiles, seed)
            inputs.append(cut_tiles(image, corners, tiles, self.preprocessing.imagesize_px))
            numbers += [number] * len(corners)
        return torch.cat(inputs), numbers

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

    @property
    def smallest_side_px(self) -> int:
        return self.config.tiles.patch_size if self.config.tiles else 1

    def out_of_fold_calibration(self) -> Calibration | None:
        """Calibrate on the training images, each scored by flows that were trained without it.

        Each of a few folds is left out of a training of its own, from the cached features and for as many epochs as
        the model's own, and scored like new images. K folds cost K - 1 times the training of the model. PatchCore's
        five, or one per image, would cost far more than the model; fewer folds train on fewer images, which makes
        scores and threshold higher, on the safe side of false alarms.

        Raises:
            NotFittedError: Training data are there only between `fit` and `release_training_data`.
            DataError: The training of a fold diverged.
        """
        data = self._training_data
        if data is None:
            raise NotFittedError("out-of-fold calibration needs the training data: call it right after fit()")
        num_images = data.loader.num_images
        if num_images < 2:
            return None
        fold_of_image = self._folds(num_images)
        num_folds = int(fold_of_image.max()) + 1
        numbers = progress(range(num_folds), f"{self.source.category}: calibration, trainings")
        flows_of_fold = [self._fold_flows(data, fold_of_image, number) for number in numbers]
        scores, maxima, means = (np.empty(num_images, dtype=np.float32) for _ in range(3))
        first = 0
        batches = progress(data.loader, f"{self.source.category}: calibration, scoring", total=len(data.loader))
        for batch in batches:
            fold_of_row = fold_of_image[first : first + len(batch["image"])]
            for number in fold_of_row.unique().tolist():
                chosen = torch.nonzero(fold_of_row == number)[:, 0]
                prediction = self._score(flows_of_fold[number], batch["image"][chosen])
                rows = (first + chosen).numpy()
                assert prediction.maps is not None
                statistics = MapStatistics.of([prediction.maps])
                scores[rows], maxima[rows], means[rows] = prediction.scores, statistics.maxima, statistics.means
            first += len(fold_of_row)
        return calibrate("kfold", num_folds, scores, MapStatistics(maxima, means))

    def _folds(self, num_images: int) -> torch.Tensor:
        """Return the fold of each image, int64 [N]: a random partition into equal parts."""
        seed = derive_seed(self.source.seed, self.source.category, "folds")
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
        fold_of_image = torch.empty(num_images, dtype=torch.int64)
        for number, images in enumerate(order.tensor_split(min(self.config.calibration_folds, num_images))):
            fold_of_image[images] = number
        return fold_of_image

    def _fold_flows(self, data: TrainingData, fold_of_image: torch.Tensor, fold: int) -> FastFlowNet:
        """Return flows trained without the images of a fold, for as many epochs as the model has."""
        kept = torch.nonzero(fold_of_image[data.image_of_row] != fold)[:, 0]
        features = [maps[kept] for maps in data.features]
        without_stopping = replace(self.config.training, patience=None)
        training = self._training(features, without_stopping, "fold", fold)
        training.run(features, stop_after=self._weights_epoch)
        return self._measured(training, features)

    def release_training_data(self) -> None:
        self._training_data = None
        self.plan = TrainingPlan()  # may hold the state of an interrupted training

    def predict(self, images: torch.Tensor) -> Prediction:
        """Score images by how unlikely their feature maps are.

        Args:
            images: uint8 [B, 3, S, S], RGB; [B, 3, H, W] where images keep their resolution.

        Returns:
            Scores, and maps of the size of the images, in the unit of the map mode: bits per dimension ("nll"), the
            same in standard deviations of normal images ("weighted"), or the bits of the mean probability per dimension
            ("prob"); robust z-scores of these with adaptive normalisation.

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: The images have another size than the model's preprocessing gives.
            DataError: They are smaller than a tile.
        """
        flows = self._require_fitted()
        require_images(images, self.preprocessing)
        return self._score(flows, images)

    @torch.inference_mode()
    def _score(self, flows: FastFlowNet, images: torch.Tensor) -> Prediction:
        """Return scores [B] and maps [B, H, W] of images uint8 [B, 3, H, W]: the score is read off the final map."""
        maps = post_processed(self._maps(flows, images), images, self.config.post_processing)
        return Prediction(image_scores(maps, self.config.image_score).cpu().numpy(), maps.cpu().numpy())

    def _maps(self, flows: FastFlowNet, images: torch.Tensor) -> torch.Tensor:
        """Return maps float32 [B, H, W], of whole images or joined from those of their tiles."""
        tiles, input_size = self.config.tiles, self.preprocessing.imagesize_px
        if tiles is None:
            return self._input_maps(flows, images, input_size)

        def maps_of(inputs: torch.Tensor) -> torch.Tensor:
            return self._input_maps(flows, inputs, tiles.patch_size)

        return torch.stack([tiled_map(image, tiles, input_size, maps_of) for image in images])

    def _input_maps(self, flows: FastFlowNet, inputs: torch.Tensor, size: int) -> torch.Tensor:
        """Return maps [B, size, size] of what the backbone gets [B, 3, S, S]."""
        return over_threads(lambda part: self._maps_of_part(flows, part, size), inputs, self.device)

    @torch.inference_mode()  # each thread has a mode of its own
    def _maps_of_part(self, flows: FastFlowNet, inputs: torch.Tensor, size: int) -> torch.Tensor:
        """Return the mean over the scales."""
        total = torch.zeros((), device=self.device)
        scales = self.config.post_processing.scales
        for scale in scales:
            features = self._feature_maps(resized(inputs, scaled_size(inputs.shape[-1], scale)))
            grid = flows.anomaly_grid(features, self.config.map_mode)  # [B, h, w]
            upsampled = F.interpolate(grid[:, None], size=size, mode="bilinear", align_corners=False)
            total = total + upsampled[:, 0] / len(scales)  # [B, size, size]
        return total

    def _require_fitted(self) -> FastFlowNet:
        if self._flows is None:
            raise NotFittedError("this FastFlow has no trained flows: call fit() or load a model folder")
        if self._unmeasured is not None:
            self._flows.measure_spread(self._unmeasured, IMAGES_PER_FORWARD)
            self._unmeasured = None
        return self._flows

    def training_artifacts(self, log_group: str) -> TrainingArtifacts:
        """Return the history, and the model as one file that plain torch reads."""
        history = tuple(config_to_dict(record) for record in self.history_)
        return TrainingArtifacts(
            history, loss_unit="bits per dimension", exports={f"fastflow_{log_group}_final.pth": self.torch_export}
        )

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
        flows.require_invertible()
        self._flows = flows.eval()


def _map_shape(extractor: FeatureExtractor, layer: str) -> tuple[int, int, int]:
    channels, height, width = extractor.feature_shapes[layer]
    return channels, height, width


_EXTRACTORS: WeakValueDictionary[tuple[BackboneConfig, int], FeatureExtractor] = WeakValueDictionary()


def _shared_extractor(config: BackboneConfig, imagesize_px: int) -> FeatureExtractor:
    """Return the extractor that detectors of other settings use already, or a new one: each class may have a preset."""
    key = (config, imagesize_px)
    extractor = _EXTRACTORS.get(key) or build_extractor(config, imagesize_px)
    _EXTRACTORS[key] = extractor
    return extractor


def scaled_size(side: int, scale: float) -> int:
    """Return the side of an input at a scale, px: a multiple of what backbones halve, but for the unscaled one."""
    return side if scale == 1 else max(SIZE_STEP_PX, round(side * scale / SIZE_STEP_PX) * SIZE_STEP_PX)


def _require_tiles(config: FastFlowConfig, preprocessing: PreprocessingConfig) -> None:
    """Raise ConfigurationError if tiles are missing or larger than the images."""
    if config.tiles is None:
        if preprocessing.max_side_px is not None:
            raise ConfigurationError(
                "images that keep their resolution are scored in tiles: add --enable_patch_inference, or leave "
                "--preserve_high_res out"
            )
        return
    largest = preprocessing.max_side_px or preprocessing.imagesize_px
    if config.tiles.patch_size > largest:
        raise ConfigurationError(
            f"--patch_size {config.tiles.patch_size} is larger than the images of {largest} px: use {largest} or less"
            + (
                ", or a larger --max_side"
                if preprocessing.max_side_px
                else ", or --preserve_high_res for larger images"
            )
        )


def _require_scales(config: FastFlowConfig, extractor: FeatureExtractor, imagesize_px: int) -> None:
    """Raise ConfigurationError if the backbone does not run at each scale, or two scales are one after rounding."""
    sizes: dict[int, float] = {}
    for scale in config.post_processing.scales:
        size = scaled_size(imagesize_px, scale)
        if size in sizes:
            raise ConfigurationError(
                f"--multi_scale {sizes[size]:g} and {scale:g} are both {size} px for an input of {imagesize_px} px: "
                "leave one of them out"
            )
        if size == imagesize_px and scale != 1:
            raise ConfigurationError(
                f"--multi_scale {scale:g} is {size} px for an input of {imagesize_px} px, no other size: use 1, or a "
                "scale further from it"
            )
        sizes[size] = scale
        if scale == 1:
            continue
        try:
            extractor(torch.zeros(1, 3, size, size))
        except (RuntimeError, AssertionError) as error:
            raise ConfigurationError(
                f"backbone {config.backbone.name!r} takes images of {imagesize_px} px alone, --multi_scale {scale:g} "
                f"gives {size} px: leave --multi_scale out"
            ) from error

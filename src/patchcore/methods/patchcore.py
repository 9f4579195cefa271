"""PatchCore: a memory bank of patch embeddings of normal images.

Source: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from patchcore.configs import (
    PatchCoreConfig,
    PreprocessingConfig,
    SearchConfig,
    TrainingSource,
    config_to_dict,
)
from patchcore.detector import (
    AnomalyDetector,
    ImageBatches,
    NotFittedError,
    Prediction,
    register_detector,
    require_tensor,
)
from patchcore.errors import ConfigurationError, DataError
from patchcore.features.extractor import FeatureExtractor, build_extractor
from patchcore.features.patches import ConcatEmbedding, PooledEmbedding
from patchcore.memory.nearest_neighbours import NearestNeighbourScorer, build_nearest_neighbours, require_one_faiss
from patchcore.memory.sampler import Sampler, build_sampler
from patchcore.runtime import derive_seed, progress
from patchcore.scoring.anomaly_map import anomaly_maps, image_scores
from patchcore.scoring.calibration import Calibration, MapStatistics, calibrate, fold_bounds

IMAGES_PER_SEARCH = 8  # in calibration: bounds the copies of embeddings and the maps that are held at once


@dataclass
class _TrainingData:
    """What calibration needs of the training images.

    Attributes:
        embeddings: float32 [N, P, D], P patches per image.
        points: [N * P, R], what the sampler selects from.
    """

    embeddings: torch.Tensor
    points: torch.Tensor


class PatchEmbedder:
    """Images to patch embeddings: the part of PatchCore that does not learn.

    Args:
        extractor: Feature maps of a frozen backbone.
        config: Embedding, patch size and dimensions.
    """

    def __init__(self, extractor: FeatureExtractor, config: PatchCoreConfig) -> None:
        channels = [extractor.feature_shapes[layer][0] for layer in extractor.layers]
        self.extractor = extractor
        self.grid = extractor.feature_shapes[extractor.layers[0]][1:]
        if config.patchsize >= 2 * min(self.grid):
            raise ConfigurationError(
                f"--patchsize {config.patchsize} reaches beyond the {self.grid[0]} x {self.grid[1]} grid of layer "
                f"{extractor.layers[0]!r} from every place: use {2 * min(self.grid) - 1} or less"
            )
        self.embedding: ConcatEmbedding | PooledEmbedding
        if config.embedding == "concat":
            self.embedding = ConcatEmbedding(channels, config.patchsize)
        else:
            dimensions = (config.pretrain_embed_dimension, config.target_embed_dimension)
            self.embedding = PooledEmbedding(channels, config.patchsize, *dimensions)
        self.dimension = self.embedding.dimension

    def to(self, device: torch.device) -> PatchEmbedder:
        """Move the network and the embedding to a device, in place, and return self."""
        self.extractor.to(device)
        self.embedding.to(device)
        return self

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the patch embeddings float32 [B, P, D] of images uint8 [B, 3, S, S]."""
        maps = self.extractor(images)
        return self.embedding(list(maps.values())).flatten(1, 2)  # [B, P, D]


@register_detector
class PatchCore(AnomalyDetector):
    """Distance of patch embeddings to a coreset of normal ones.

    Args:
        config: Sampler, number of neighbours, embedding.
        embedder: Images to patch embeddings, shared between classes.
        preprocessing: Resize and crop that the images have had.
        source: What the model is trained on; its seed drives the coreset.
        search: How neighbours are searched.

    Attributes:
        memory_bank_: float32 [M, D], learned by `fit`.
    """

    method: ClassVar[str] = "patchcore"
    config_class: ClassVar[type] = PatchCoreConfig

    def __init__(
        self,
        config: PatchCoreConfig,
        embedder: PatchEmbedder,
        preprocessing: PreprocessingConfig,
        source: TrainingSource | None = None,
        search: SearchConfig | None = None,
    ) -> None:
        super().__init__(preprocessing, source or TrainingSource())
        self.config = config
        self.embedder = embedder
        self.search = search or SearchConfig()
        self.device = embedder.extractor.mean.device
        self.sampler: Sampler = build_sampler(config.sampler.name, config.sampler.percentage)
        self._scorer: NearestNeighbourScorer | None = None
        self._training: _TrainingData | None = None

    @classmethod
    def prepare(
        cls, config: PatchCoreConfig, preprocessing: PreprocessingConfig, search: SearchConfig
    ) -> Callable[[TrainingSource, torch.device], PatchCore]:
        """Load the backbone once and return what makes a detector for each class.

        Raises:
            ConfigurationError: Backbone, weights, layers or sampler are unknown or do not fit.
        """
        build_sampler(config.sampler.name, config.sampler.percentage)  # refuse a wrong name before the weights load
        require_one_faiss()  # now, not after the features are extracted
        embedder = PatchEmbedder(build_extractor(config.backbone, preprocessing.imagesize_px), config)
        return lambda source, device: cls(config, embedder.to(device), preprocessing, source, search)

    def fit(self, loader: ImageBatches) -> PatchCore:
        """Fill the memory bank with a coreset of the patches of normal images.

        Args:
            loader: Batches of normal images.

        Raises:
            DataError: There are no images, or fewer patches are kept than neighbours are asked for.
        """
        if loader.num_images == 0:
            raise DataError("no training images, expected at least one")
        embeddings = self._embed_all(loader)
        points = self.sampler.reduce(embeddings.flatten(0, 1), self._generator("coreset"))
        chosen = self.sampler.select_reduced(points, self._generator("selection"))
        self._set_bank(embeddings.flatten(0, 1)[chosen])
        self._training = _TrainingData(embeddings, points)
        return self

    def _embed_all(self, loader: ImageBatches) -> torch.Tensor:
        """Return the patch embeddings [N, P, D] of all images, in one buffer on the CPU."""
        num_patches = self.embedder.grid[0] * self.embedder.grid[1]
        embeddings = torch.empty(loader.num_images, num_patches, self.embedder.dimension)
        start = 0
        for batch in progress(loader, f"{self.source.category}: features", total=len(loader)):
            part = self.embedder(batch["image"])
            embeddings[start : start + len(part)] = part
            start += len(part)
        return embeddings

    def _generator(self, *purpose: str | int) -> torch.Generator:
        seed = derive_seed(self.source.seed, self.source.category, *purpose)
        return torch.Generator().manual_seed(seed)

    def _set_bank(self, bank: torch.Tensor) -> None:
        self.memory_bank_ = bank
        self._scorer = self._fitted_scorer(bank, "memory bank", "use fewer neighbours")

    def _fitted_scorer(self, bank: torch.Tensor, what: str, remedy: str) -> NearestNeighbourScorer:
        if len(bank) < self.config.num_nn:
            raise DataError(
                f"the {what} has {len(bank)} patch(es), --anomaly_scorer_num_nn "
                f"{self.config.num_nn} needs as many: keep more patches (sampler -p) or {remedy}"
            )
        neighbours = build_nearest_neighbours(self.search.faiss_on_gpu, self.search.faiss_num_workers, self.device)
        return NearestNeighbourScorer(self.config.num_nn, neighbours).fit(bank)

    def out_of_fold_calibration(self) -> Calibration | None:
        """Calibrate on the training images, each scored by a bank that has none of its patches.

        The folds reuse the embeddings and their projection; each selects a coreset of its own with the same
        share.

        Raises:
            NotFittedError: Training data are there only between `fit` and `release_training_data`.
        """
        if self._training is None:
            raise NotFittedError("out-of-fold calibration needs the training data: call it right after fit()")
        embeddings, num_images = self._training.embeddings, len(self._training.embeddings)
        order = torch.randperm(num_images, generator=self._generator("folds"))
        folds = fold_bounds(num_images)
        if not folds:
            return None
        scores, maxima, means = torch.empty(3, num_images)  # [N] each
        for number, (start, end) in enumerate(progress(folds, f"{self.source.category}: calibration")):
            rest = torch.cat([order[:start], order[end:]]).sort().values
            bank = self._fold_bank(rest, number)
            scorer = self._fitted_scorer(bank, "memory bank of a calibration fold", "use --calibration none")
            for chunk in order[start:end].split(IMAGES_PER_SEARCH):
                chunk_scores, chunk_maps = self._score(embeddings[chunk], scorer)
                scores[chunk] = chunk_scores
                maxima[chunk] = chunk_maps.flatten(1).amax(dim=1)
                means[chunk] = chunk_maps.flatten(1).mean(dim=1)
        return calibrate("kfold", len(folds), scores.numpy(), MapStatistics(maxima.numpy(), means.numpy()))

    def _fold_bank(self, images: torch.Tensor, fold: int) -> torch.Tensor:
        """Return the memory bank [M, D] that some of the training images give."""
        assert self._training is not None
        embeddings, points = self._training.embeddings, self._training.points
        num_patches = embeddings.shape[1]
        rest = points.view(len(embeddings), num_patches, -1)[images].flatten(0, 1)
        chosen = self.sampler.select_reduced(rest, self._generator("fold", fold))
        return embeddings[images[chosen // num_patches], chosen % num_patches]  # [M, D]

    def release_training_data(self) -> None:
        self._training = None

    def predict(self, images: torch.Tensor) -> Prediction:
        """Score images by their patches' mean distance to the nearest bank members.

        Args:
            images: uint8 [B, 3, S, S], RGB.

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: The images have another size than the model's preprocessing gives.

        Source: Roth et al. (CVPR 2022), section 3.3, Eq. 6.
        """
        if self._scorer is None:
            raise NotFittedError("this PatchCore has no memory bank: call fit() or load a model folder")
        side = self.preprocessing.imagesize_px
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(
                f"found images of shape {list(images.shape)}, expected [B, 3, {side}, {side}]: "
                "resize and crop them as the model's preprocessing says"
            )
        scores, maps = self._score(self.embedder(images), self._scorer)
        return Prediction(scores.numpy(), maps.numpy())

    def _score(self, embeddings: torch.Tensor, scorer: NearestNeighbourScorer) -> tuple[torch.Tensor, torch.Tensor]:
        """Return image scores [B] and anomaly maps [B, S, S] of embeddings [B, P, D], on the CPU."""
        batch = len(embeddings)
        patch_scores = scorer.score(embeddings.flatten(0, 1)).view(batch, *self.embedder.grid)  # [B, h, w]
        maps = anomaly_maps(patch_scores, self.preprocessing.imagesize_px)
        return image_scores(patch_scores).cpu(), maps.cpu()

    def configuration(self) -> dict[str, Any]:
        return config_to_dict(self.config)

    def tensors(self) -> dict[str, torch.Tensor]:
        if self._scorer is None:
            raise NotFittedError("this PatchCore has no memory bank to save: call fit() first")
        return {"memory_bank": self.memory_bank_}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over a stored memory bank.

        Raises:
            ConfigurationError: The bank does not fit the configuration.
        """
        bank = require_tensor(tensors, "memory_bank", ndim=2)
        if bank.shape[1] != self.embedder.dimension or bank.dtype != torch.float32:
            raise ConfigurationError(
                f"memory bank has {bank.shape[1]} columns of {bank.dtype}, the configuration gives embeddings of "
                f"{self.embedder.dimension} float32 values: the files belong to different models"
            )
        self._set_bank(bank)

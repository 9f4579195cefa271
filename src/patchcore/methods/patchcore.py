"""PatchCore: a memory bank of patch embeddings of normal images.

Source: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from patchcore.config_json import config_to_dict
from patchcore.configs import BackboneWeights, PatchCoreConfig, PreprocessingConfig, RuntimeConfig, TrainingSource
from patchcore.detector import (
    AnomalyDetector,
    DetectorBuilder,
    ImageBatches,
    NotFittedError,
    Prediction,
    register_detector,
    require_images,
)
from patchcore.errors import ConfigurationError, DataError
from patchcore.features.extractor import FeatureExtractor, build_extractor
from patchcore.features.patches import ConcatEmbedding, PooledEmbedding
from patchcore.memory.buffers import Buffers
from patchcore.memory.faiss_search import require_trainable
from patchcore.memory.nearest_neighbours import NearestNeighbourScorer, build_nearest_neighbours, restore_search
from patchcore.memory.sampler import IdentitySampler, Sampler, build_sampler, num_selected
from patchcore.memory.search import NearestNeighbours
from patchcore.methods.patch_embedding import embed_batch
from patchcore.methods.training_features import EmbeddedImages, TrainingFeatures, embed_images, training_features
from patchcore.runtime import derive_seed, progress, resolve_precision
from patchcore.scoring.anomaly_map import anomaly_maps, image_scores, patches_inside
from patchcore.scoring.calibration import Calibration, MapStatistics, calibrate, fold_bounds

if TYPE_CHECKING:
    from patchcore.methods.sharded_bank import ShardedBank

IMAGES_PER_SEARCH = 8  # in calibration: bounds the copies of embeddings and the maps that are held at once


@dataclass(frozen=True)
class PatchScores:
    """Scores of images and of their patches, on the CPU.

    Attributes:
        images: float32 [N].
        patches: float32 [N, h, w], on the grid of the first layer.
    """

    images: torch.Tensor
    patches: torch.Tensor


class PatchEmbedder:
    """Images to patch embeddings: the part of PatchCore that does not learn.

    Args:
        extractor: Feature maps of a frozen backbone, of the layers of the configuration at least.
        config: Layers, embedding, patch sizes and dimensions.
    """

    def __init__(self, extractor: FeatureExtractor, config: PatchCoreConfig) -> None:
        self.extractor = extractor
        self.layers = config.backbone.layers
        channels = [extractor.feature_shapes[layer][0] for layer in self.layers]
        self.grid = extractor.feature_shapes[self.layers[0]][1:]
        largest = max(config.patchsizes)
        if largest >= 2 * min(self.grid):
            raise ConfigurationError(
                f"--patchsize {largest} reaches beyond the {self.grid[0]} x {self.grid[1]} grid of layer "
                f"{self.layers[0]!r} from every place: use {2 * min(self.grid) - 1} or less"
            )
        self.embedding: ConcatEmbedding | PooledEmbedding
        if config.embedding == "concat":
            self.embedding = ConcatEmbedding(channels, config.patchsizes)
        else:
            dimensions = (config.pretrain_embed_dimension, config.target_embed_dimension)
            self.embedding = PooledEmbedding(channels, config.patchsizes, *dimensions)
        self.dimension = self.embedding.dimension
        require_trainable(config.index, None, self.dimension, "memory bank")

    def to(self, device: torch.device, precision: str = "float32") -> PatchEmbedder:
        """Move the network and the embedding to a device, in place, and return self.

        Args:
            device: Where they compute.
            precision: Numbers of the network, one of BACKBONE_PRECISIONS; the embedding computes in float32.

        Raises:
            ConfigurationError: The device cannot compute with these numbers.
        """
        self.extractor.to(device).compute_in(resolve_precision(precision, device))
        self.embedding.to(device)
        return self

    @torch.inference_mode()
    def __call__(self, feature_maps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the patch embeddings float32 [B, P, D] of what the extractor gave for a batch."""
        return self.embedding([feature_maps[layer] for layer in self.layers]).flatten(1, 2)  # [B, P, D]


def require_search_and_sampler(config: PatchCoreConfig) -> None:
    """Raise ConfigurationError for a wrong sampler or installation of faiss, which must not cost a feature pass."""
    build_sampler(config.sampler.name, config.sampler.percentage)
    build_nearest_neighbours(False, None, torch.device("cpu"), config.index)


@register_detector
class PatchCore(AnomalyDetector):
    """Distance of patch embeddings to a coreset of normal ones.

    Args:
        config: Sampler, number of neighbours, embedding.
        embedder: Images to patch embeddings, shared between classes.
        preprocessing: Resize and crop that the images have had.
        source: What the model is trained on; its seed drives the coreset.
        runtime: How the machine computes.
        member: Number in an ensemble, so that equal members differ in their coresets; None outside.
    """

    method: ClassVar[str] = "patchcore"
    config_class: ClassVar[type] = PatchCoreConfig

    def __init__(
        self,
        config: PatchCoreConfig,
        embedder: PatchEmbedder,
        preprocessing: PreprocessingConfig,
        source: TrainingSource | None = None,
        runtime: RuntimeConfig | None = None,
        member: int | None = None,
    ) -> None:
        super().__init__(preprocessing, source or TrainingSource())
        self.config = config
        self.member = member
        self.embedder = embedder
        self.runtime = runtime or RuntimeConfig()
        self.device = embedder.extractor.mean.device
        self.sampler: Sampler = build_sampler(config.sampler.name, config.sampler.percentage)
        self._scorer: NearestNeighbourScorer | None = None
        self._training: TrainingFeatures | None = None
        self._sharded: ShardedBank | None = None

    @classmethod
    def prepare(
        cls, config: PatchCoreConfig, preprocessing: PreprocessingConfig, runtime: RuntimeConfig
    ) -> DetectorBuilder:
        """Load the backbone once and return what makes a detector for each class.

        Raises:
            ConfigurationError: Backbone, weights, layers or sampler are unknown or do not fit.
        """
        require_search_and_sampler(config)
        embedder = PatchEmbedder(build_extractor(config.backbone, preprocessing.imagesize_px), config)
        return lambda source, device: cls(
            config, embedder.to(device, runtime.precision), preprocessing, source, runtime
        )

    def fit(self, loader: ImageBatches) -> PatchCore:
        """Fill the memory bank with a coreset of the patches of normal images.

        Args:
            loader: Batches of normal images.

        Raises:
            DataError: There are no images, or fewer patches are kept than neighbours are asked for.
        """
        self.require_rows_to_learn_from(loader.num_images)
        buffers = Buffers(self.runtime.memory_budget_bytes, self.plan.scratch_folder)
        if self.plan.shares is not None:
            from patchcore.methods.sharded_bank import ShardedBank

            self._sharded = ShardedBank.gathered(self, self.plan.shares, buffers)
            return self.fit_bank(self._sharded.bank())
        return self.fit_embeddings(embed_images(loader, [self], buffers, f"{self.source.category}: features"))

    @property
    def patches_per_image(self) -> int:
        return self.embedder.grid[0] * self.embedder.grid[1]

    def require_rows_to_learn_from(self, num_images: int) -> None:
        """Raise DataError where so many images give a bank from which the index cannot be learned."""
        num_patches = num_images * self.patches_per_image
        keeps_all = isinstance(self.sampler, IdentitySampler)
        num_rows = num_patches if keeps_all else num_selected(num_patches, self.config.sampler.percentage)
        require_trainable(self.config.index, num_rows, self.embedder.dimension, "memory bank")

    def fit_embeddings(self, images: EmbeddedImages) -> PatchCore:
        """Fill the memory bank with a coreset of patch embeddings, as `fit` does from images."""
        self._training = training_features(images, self, self.random_numbers("coreset"))
        chosen = self.sampler.select_reduced(self._training.points, self.random_numbers("selection"))
        return self.fit_bank(self._training.bank(chosen))

    def random_numbers(self, *purpose: str | int) -> torch.Generator:
        """Return random numbers of this model alone: of its own seed, or of the run's and its place in the ensemble."""
        if self.config.seed is not None:
            seed = derive_seed(self.config.seed, self.source.category, *purpose)
        elif self.member is not None:
            seed = derive_seed(self.source.seed, self.source.category, "member", self.member, *purpose)
        else:
            seed = derive_seed(self.source.seed, self.source.category, *purpose)
        return torch.Generator().manual_seed(seed)

    @property
    def memory_bank_(self) -> torch.Tensor:
        """The memory bank float32 [M, D] that `fit` learned, as far as the index has kept its digits."""
        return self._require_fitted().nearest_neighbours.whole_bank()

    def fit_bank(self, bank: torch.Tensor, what: str = "memory bank", remedy: str = "lower it") -> PatchCore:
        """Take over a memory bank float32 [M, D] as it is.

        Args:
            bank: The patch embeddings.
            what: What messages call it.
            remedy: What a user can do about too few of them.

        Raises:
            DataError: It has fewer rows than neighbours are asked for, or than the index learns from.
        """
        self._scorer = self._fitted_scorer(bank, what, remedy)
        return self

    def _fitted_scorer(
        self, bank: torch.Tensor, what: str, remedy: str, whole_model: NearestNeighbours | None = None
    ) -> NearestNeighbourScorer:
        self._require_neighbours(len(bank), what, remedy)
        require_trainable(self.config.index, len(bank), self.embedder.dimension, what)
        search = self._new_search()
        if whole_model is not None:
            search.share(whole_model)
        return NearestNeighbourScorer(self.config.num_nn, search).fit(bank)

    def _new_search(self) -> NearestNeighbours:
        runtime = self.runtime
        return build_nearest_neighbours(runtime.faiss_on_gpu, runtime.faiss_num_workers, self.device, self.config.index)

    def _require_neighbours(self, num_rows: int, what: str, remedy: str) -> None:
        """Raise DataError where a bank has fewer rows than the options ask for neighbours."""
        needs = [
            ("--anomaly_scorer_num_nn", self.config.num_nn),
            ("--score_reweighting", self.config.score_reweighting),
        ]
        for option, count in needs:
            if count is not None and num_rows < count:
                raise DataError(
                    f"the {what} has {num_rows} patch(es), {option} {count} needs as many: keep more patches "
                    f"(sampler -p) or {remedy}"
                )

    def out_of_fold_calibration(self) -> Calibration | None:
        """Calibrate on the training images, each scored by a bank that has none of its patches.

        Raises:
            NotFittedError: Training data are there only between `fit` and `release_training_data`.
        """
        if self._sharded is not None:
            return self._sharded.out_of_fold_calibration()
        scores = self.out_of_fold_scores("use --calibration none")
        if scores is None:
            return None
        maps = (self._maps(patches) for patches in scores.patches.split(IMAGES_PER_SEARCH))
        num_folds = len(fold_bounds(len(scores.images)))
        return calibrate("kfold", num_folds, scores.images.numpy(), MapStatistics.of(maps))

    def out_of_fold_scores(self, remedy: str) -> PatchScores | None:
        """Score the training images, each by a bank that has none of its patches; None for a single image.

        The folds reuse the embeddings and their projection; each selects a coreset of its own with the same
        share. They are the same for all members of an ensemble.

        Args:
            remedy: What a user can do without these scores, for the message.

        Raises:
            NotFittedError: Training data are there only between `fit` and `release_training_data`.
            DataError: The bank of a fold has fewer patches than neighbours are asked for.
        """
        if self._training is None:
            raise NotFittedError("out-of-fold scores need the training data: ask for them right after fit()")
        embeddings, num_images = self._training.embeddings, len(self._training.embeddings)
        folds = fold_bounds(num_images)
        if not folds:
            return None
        seed = derive_seed(self.source.seed, self.source.category, "folds")
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
        scores = PatchScores(torch.empty(num_images), torch.empty(num_images, *self.embedder.grid))
        for number, (start, end) in enumerate(progress(folds, f"{self.source.category}: calibration")):
            rest = torch.cat([order[:start], order[end:]]).sort().values
            bank = self._fold_bank(rest, number)
            whole_model = self._require_fitted().nearest_neighbours
            scorer = self._fitted_scorer(bank, "memory bank of a calibration fold", remedy, whole_model)
            for chunk in order[start:end].split(IMAGES_PER_SEARCH):
                part = self._score(embeddings[chunk].to(scorer.nearest_neighbours.device), scorer)
                scores.images[chunk], scores.patches[chunk] = part.images, part.patches
            del bank, scorer  # before the next one is made
        return scores

    def _fold_bank(self, images: torch.Tensor, fold: int) -> torch.Tensor:
        """Return the memory bank [M, D] that some of the training images give."""
        assert self._training is not None
        patches = self._training.patch_numbers(images)
        chosen = self.sampler.select_reduced(self._training.points.subset(patches), self.random_numbers("fold", fold))
        return self._training.bank(patches[chosen])

    def release_training_data(self) -> None:
        self._training = self._sharded = None

    def predict(self, images: torch.Tensor) -> Prediction:
        """Score images by their patches' mean distance to the nearest bank members.

        Args:
            images: uint8 [B, 3, S, S], RGB.

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: The images have another size than the model's preprocessing gives.

        Source: Roth et al. (CVPR 2022), section 3.3, Eq. 6, and with `score_reweighting` Eq. 7.
        """
        return self._predict(images, None)

    def predict_inside(self, images: torch.Tensor, inside: torch.Tensor) -> Prediction:
        return self._predict(images, inside)

    def _predict(self, images: torch.Tensor, inside: torch.Tensor | None) -> Prediction:
        self._require_fitted()
        require_images(images, self.preprocessing)
        scores = self.score_embeddings(embed_batch(images, [self.embedder])[0], inside)
        return Prediction(scores.images.numpy(), self._maps(scores.patches))

    def score_embeddings(self, embeddings: torch.Tensor, inside: torch.Tensor | None = None) -> PatchScores:
        """Score a batch from its patch embeddings.

        Args:
            embeddings: float32 [B, P, D].
            inside: bool [B, H, W], pixels whose patches make the image scores; None stands for all.
        """
        return self._score(embeddings, self._require_fitted(), inside)

    def _require_fitted(self) -> NearestNeighbourScorer:
        if self._scorer is None:
            raise NotFittedError("this PatchCore has no memory bank: call fit() or load a model folder")
        return self._scorer

    def _score(
        self, embeddings: torch.Tensor, scorer: NearestNeighbourScorer, inside: torch.Tensor | None = None
    ) -> PatchScores:
        """Score embeddings [B, P, D], the images by their patches inside a region [B, H, W]."""
        batch, num_patches, _ = embeddings.shape
        flat_scores, nearest = scorer.score(embeddings.flatten(0, 1))  # [B * P] each
        patch_scores = flat_scores.view(batch, *self.embedder.grid)  # [B, h, w]
        counted = None if inside is None else patches_inside(inside.to(patch_scores.device), self.embedder.grid)
        scores = image_scores(patch_scores, self.config.patchscore, counted)  # [B]
        if self.config.score_reweighting is not None:
            candidates = patch_scores if counted is None else patch_scores.masked_fill(~counted, -torch.inf)
            worst = candidates.flatten(1).argmax(dim=1)  # [B]
            rows = nearest.view(batch, num_patches).gather(1, worst[:, None])[:, 0]
            queries = embeddings[torch.arange(batch, device=worst.device), worst]  # [B, D]
            scores = scores * scorer.neighbourhood_weights(queries, rows, self.config.score_reweighting)
        return PatchScores(scores.cpu(), patch_scores.cpu())

    def _maps(self, patch_scores: torch.Tensor) -> np.ndarray:
        """Return the anomaly maps [B, S, S] of patch scores [B, h, w]."""
        return anomaly_maps(patch_scores, self.preprocessing.imagesize_px).numpy()

    def backbones(self) -> tuple[BackboneWeights, ...]:
        weights = self.embedder.extractor.weights
        return (weights,) if weights else ()

    @classmethod
    def require_graph(cls, config: PatchCoreConfig) -> None:
        """Let every model pass."""

    def graph(self) -> torch.nn.Module:
        from patchcore.methods.graphs import PatchCoreGraph

        self._require_fitted()
        return PatchCoreGraph([self], [(0.0, 1.0)])

    def configuration(self) -> dict[str, Any]:
        return config_to_dict(self.config)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._require_fitted().nearest_neighbours.tensors()

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over a stored memory bank, which may have had another index if that kept float32 values.

        Raises:
            ConfigurationError: The bank does not fit the configuration.
            DataError: It has fewer rows than the configuration asks for neighbours, or than the index learns from.
        """
        search = restore_search(self._new_search(), self.config.index, tensors, self.embedder.dimension)
        self._require_neighbours(search.num_rows_, "memory bank", "lower it")
        self._scorer = NearestNeighbourScorer(self.config.num_nn, search)

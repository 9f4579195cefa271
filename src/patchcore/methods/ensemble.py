"""An ensemble of PatchCore models: a detector made of detectors, and the fusion of their scores.

Members differ in backbone, layers or seed. Their distances have different scales, so that a plain mean would follow
the member with the largest ones. Here each member is put on the scale of normal images: its scores are standardised
by mean and standard deviation of its patch scores on out-of-fold training images, of which even two images have
many. The score of an image then depends on no other image. The original scales by minimum and maximum over the test
set instead, which `score_normalization="minmax"` gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from patchcore.config_json import config_to_dict
from patchcore.configs import (
    BackboneConfig,
    BackboneWeights,
    EnsembleConfig,
    PatchCoreConfig,
    PreprocessingConfig,
    RuntimeConfig,
    SamplerConfig,
    TrainingSource,
)
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
from patchcore.features.extractor import FeatureExtractor, build_extractor
from patchcore.memory.buffers import Buffers
from patchcore.methods.patch_embedding import embed_batch
from patchcore.methods.patchcore import (
    IMAGES_PER_SEARCH,
    PatchCore,
    PatchEmbedder,
    PatchScores,
    require_search_and_sampler,
)
from patchcore.methods.training_features import embed_images
from patchcore.scoring.anomaly_map import anomaly_maps
from patchcore.scoring.calibration import NEGLIGIBLE_SPREAD, Calibration, MapStatistics, calibrate, fold_bounds

SCALES = "member_scales"


@dataclass(frozen=True)
class MemberScale:
    """Mean and standard deviation of one member's patch scores on normal images that it has not seen."""

    mean: float
    std: float

    @classmethod
    def of(cls, patch_scores: torch.Tensor) -> MemberScale:
        """Measure the scale of out-of-fold patch scores [N, h, w]."""
        exact = patch_scores.double()
        mean, std = float(exact.mean()), float(exact.std())
        if std <= NEGLIGIBLE_SPREAD * abs(mean):  # all patches score alike: the mean itself is the unit
            std = abs(mean) or 1.0
        return cls(mean, std)

    def standardised(self, scores: PatchScores) -> PatchScores:
        """Return scores in standard deviations above the mean of normal patches."""
        return PatchScores((scores.images - self.mean) / self.std, (scores.patches - self.mean) / self.std)


@register_detector
class Ensemble(AnomalyDetector):
    """Mean of the scores of several PatchCore models.

    Args:
        config: The members and how their scores come to one scale.
        embedders: One for each member; members of one backbone share its extractor, and equal ones the embedder.
        preprocessing: Resize and crop that the images have had.
        source: What the model is trained on.
        runtime: How the machine computes.

    Attributes:
        members: The models.
        scales_: One for each member, learned by `fit`; empty with "minmax", which learns none.

    Source: the ensembles of Roth et al. (CVPR 2022). Their repository averages scores scaled over the test set;
        the scale of normal images is ours.
    """

    method: ClassVar[str] = "ensemble"
    config_class: ClassVar[type] = EnsembleConfig

    def __init__(
        self,
        config: EnsembleConfig,
        embedders: Sequence[PatchEmbedder],
        preprocessing: PreprocessingConfig,
        source: TrainingSource | None = None,
        runtime: RuntimeConfig | None = None,
    ) -> None:
        super().__init__(preprocessing, source or TrainingSource())
        self.config = config
        self.members = [
            PatchCore(member, embedder, preprocessing, self.source, runtime, number)
            for number, (member, embedder) in enumerate(zip(config.members, embedders, strict=True))
        ]
        self.scales_: list[MemberScale] | None = None
        self._out_of_fold: list[PatchScores] | None = None

    @classmethod
    def prepare(
        cls, config: EnsembleConfig, preprocessing: PreprocessingConfig, runtime: RuntimeConfig
    ) -> DetectorBuilder:
        """Load each backbone once and return what makes a detector for each class.

        Raises:
            ConfigurationError: As for PatchCore, of any member.
        """
        for member in config.members:
            require_search_and_sampler(member)
        embedders = _build_embedders(config, preprocessing.imagesize_px)
        return lambda source, device: cls(
            config, [e.to(device, runtime.precision) for e in embedders], preprocessing, source, runtime
        )

    @property
    def can_calibrate(self) -> bool:
        return self.config.score_normalization != "minmax"

    def fit(self, loader: ImageBatches) -> Ensemble:
        """Fit every member, and learn its scale from out-of-fold scores of the training images.

        The members of one backbone are fitted together, from one pass over the images; those of the next follow.
        So the embeddings of one backbone are held at a time, once for all members that embed alike.

        Args:
            loader: Batches of normal images.

        Raises:
            DataError: There are no images, or only one, which gives no scale.
        """
        if loader.num_images == 1 and self.can_calibrate:
            raise DataError(
                "one training image does not tell the scale of an ensemble's members, expected two or more: "
                "give more images, or --score_normalization minmax"
            )
        for member in self.members:
            member.require_rows_to_learn_from(loader.num_images)
        out_of_fold: dict[int, PatchScores] = {}
        buffers = Buffers(self.members[0].runtime.memory_budget_bytes, self.plan.scratch_folder)
        for group in self._groups():
            names = f"{self.source.category}: features of {self.config.members[group[0]].backbone.name}"
            images = embed_images(loader, [self.members[i] for i in group], buffers, names)
            for i in group:
                member = self.members[i].fit_embeddings(images)
                if self.can_calibrate:
                    scores = member.out_of_fold_scores("use --score_normalization minmax")
                    assert scores is not None  # two images give two folds
                    out_of_fold[i] = scores
                member.release_training_data()
            del images  # before those of the next backbone are made
        self._out_of_fold = [out_of_fold[i] for i in sorted(out_of_fold)]
        self.scales_ = [MemberScale.of(scores.patches) for scores in self._out_of_fold]
        return self

    def _groups(self) -> list[list[int]]:
        """Return the numbers of the members that share an extractor, for each extractor."""
        groups: dict[FeatureExtractor, list[int]] = {}
        for number, member in enumerate(self.members):
            groups.setdefault(member.embedder.extractor, []).append(number)
        return list(groups.values())

    def out_of_fold_calibration(self) -> Calibration | None:
        """Calibrate on the fused out-of-fold scores of the training images.

        Raises:
            NotFittedError: The scores are there only between `fit` and `release_training_data`.
        """
        if self._out_of_fold is None:
            raise NotFittedError("out-of-fold calibration needs the training data: call it right after fit()")
        if not self.can_calibrate:
            return None
        num_images = len(self._out_of_fold[0].images)
        chunks = torch.arange(num_images).split(IMAGES_PER_SEARCH)
        fused = [self._fused([_rows(s, chunk) for s in self._out_of_fold]) for chunk in chunks]
        scores = np.concatenate([p.scores for p in fused])
        statistics = MapStatistics.of(p.maps for p in fused if p.maps is not None)
        return calibrate("kfold", len(fold_bounds(num_images)), scores, statistics)

    def release_training_data(self) -> None:
        self._out_of_fold = None

    def predict(self, images: torch.Tensor) -> Prediction:
        """Score images by the mean of the members' scores.

        Args:
            images: uint8 [B, 3, S, S], RGB.

        Returns:
            Scores and maps in standard deviations above normal images; with "minmax", scaled over these images.

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: The images have another size than the model's preprocessing gives.
        """
        self._require_fitted()
        require_images(images, self.preprocessing)
        scores = self._member_scores(images, None)
        if self.can_calibrate:
            return self._fused(scores)
        raw = tuple(Prediction(s.images.numpy(), self._maps(s.patches)) for s in scores)
        return self.join([Prediction(raw[0].scores, raw[0].maps, raw)])

    def predict_inside(self, images: torch.Tensor, inside: torch.Tensor) -> Prediction:
        if not self.can_calibrate:
            return super().predict_inside(images, inside)
        self._require_fitted()
        require_images(images, self.preprocessing)
        return self._fused(self._member_scores(images, inside))

    def _member_scores(self, images: torch.Tensor, inside: torch.Tensor | None) -> list[PatchScores]:
        """Return what each member gives for a batch; nothing that members share is computed twice."""
        scores: dict[int, PatchScores] = {}
        for group in self._groups():
            embedders = list(dict.fromkeys(self.members[i].embedder for i in group))
            embeddings = dict(zip(embedders, embed_batch(images, embedders), strict=True))
            for i in group:
                scores[i] = self.members[i].score_embeddings(embeddings[self.members[i].embedder], inside)
        return [scores[i] for i in range(len(self.members))]

    def _fused(self, scores: Sequence[PatchScores]) -> Prediction:
        """Return the mean over members of standardised scores [B] and of the maps [B, S, S] of standardised patches."""
        standardised = [scale.standardised(s) for scale, s in zip(self._require_fitted(), scores, strict=True)]
        images = torch.stack([s.images for s in standardised]).mean(dim=0)  # [B]
        maps = np.mean([self._maps(s.patches) for s in standardised], axis=0)  # [B, S, S]
        return Prediction(images.numpy(), maps)

    def _maps(self, patch_scores: torch.Tensor) -> np.ndarray:
        return anomaly_maps(patch_scores, self.preprocessing.imagesize_px).numpy()

    def join(self, predictions: Sequence[Prediction]) -> Prediction:
        """Join the batches of one test set; "minmax" scales each member over all of it, as the original does."""
        if self.can_calibrate:
            return super().join(predictions)
        members = [super(Ensemble, self).join(parts) for parts in zip(*(p.members for p in predictions), strict=True)]
        scores = np.mean([_min_max(m.scores) for m in members], axis=0)
        maps = np.mean([_min_max(m.maps) for m in members if m.maps is not None], axis=0)
        return Prediction(scores, maps, tuple(members))

    def _require_fitted(self) -> list[MemberScale]:
        if self.scales_ is None:
            raise NotFittedError("this ensemble has no memory banks: call fit() or load a model folder")
        return self.scales_

    def backbones(self) -> tuple[BackboneWeights, ...]:
        return tuple(dict.fromkeys(weights for member in self.members for weights in member.backbones()))

    @classmethod
    def require_graph(cls, config: EnsembleConfig) -> None:
        if config.score_normalization == "minmax":
            raise ConfigurationError(
                "an ensemble with --score_normalization minmax scales its scores over all images of a test set, which "
                "an exported model never sees: train it with --score_normalization calibrated"
            )

    def graph(self) -> torch.nn.Module:
        from patchcore.methods.graphs import PatchCoreGraph

        scales = self._require_fitted()
        self.require_graph(self.config)
        return PatchCoreGraph(self.members, [(scale.mean, scale.std) for scale in scales])

    def configuration(self) -> dict[str, Any]:
        return config_to_dict(self.config)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what was learned: the members' tensors as `Ensemble-i-n/<name>`, i from 1, and their scales [n, 2]."""
        scales = self._require_fitted()
        tensors = {
            f"{self._prefix(number)}/{name}": tensor
            for number, member in enumerate(self.members)
            for name, tensor in member.tensors().items()
        }
        if self.can_calibrate:
            tensors[SCALES] = torch.tensor([(s.mean, s.std) for s in scales], dtype=torch.float64)
        return tensors

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over stored members and their scales.

        Raises:
            ConfigurationError: They do not fit the configuration.
        """
        prefixes = tuple(f"{self._prefix(number)}/" for number in range(len(self.members)))
        unclaimed = [n for n in tensors if not n.startswith(prefixes) and not (n == SCALES and self.can_calibrate)]
        if unclaimed:
            raise ConfigurationError(f"found {unclaimed[0]!r}, which no member of this ensemble has: train it anew")
        for member, prefix in zip(self.members, prefixes, strict=True):
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            try:
                member.restore(own)
            except ConfigurationError as error:
                raise ConfigurationError(f"member {prefix[:-1]}: {error}") from error
        self.scales_ = self._stored_scales(tensors) if self.can_calibrate else []

    def _stored_scales(self, tensors: Mapping[str, torch.Tensor]) -> list[MemberScale]:
        scales = require_tensor(tensors, SCALES, ndim=2)
        expected = (len(self.members), 2)
        fits = tuple(scales.shape) == expected and scales.dtype == torch.float64
        if not fits or not bool(scales.isfinite().all()) or bool((scales[:, 1] <= 0).any()):
            raise ConfigurationError(
                f"model tensor {SCALES!r} of shape {tuple(scales.shape)} does not hold finite means and positive "
                f"standard deviations of shape {expected}: train the model anew"
            )
        return [MemberScale(*row) for row in scales.tolist()]

    def _prefix(self, number: int) -> str:
        return f"Ensemble-{number + 1}-{len(self.members)}"


def _build_embedders(config: EnsembleConfig, imagesize: int) -> list[PatchEmbedder]:
    """Return the embedder of each member; backbones are loaded once, and members that embed alike share one."""
    extractors = {_network(b): build_extractor(b, imagesize) for b in _shared_backbones(config)}
    embedders: dict[PatchCoreConfig, PatchEmbedder] = {}
    chosen = []
    for member in config.members:
        # What a member does with its embeddings plays no part.
        embedding = replace(
            member,
            sampler=SamplerConfig(),
            num_nn=1,
            patchscore="max",
            score_reweighting=None,
            seed=None,
            index="flat",
        )
        if embedding not in embedders:
            embedders[embedding] = PatchEmbedder(extractors[_network(member.backbone)], member)
        chosen.append(embedders[embedding])
    return chosen


def _network(backbone: BackboneConfig) -> tuple[str, str, str, int]:
    """Return what two backbones must have in common to share one network."""
    return backbone.name, backbone.weights, backbone.normalization, backbone.seed


def _shared_backbones(config: EnsembleConfig) -> list[BackboneConfig]:
    """Return each backbone once, with the layers that any member reads."""
    shared: dict[tuple[str, str, str, int], BackboneConfig] = {}
    for backbone in (member.backbone for member in config.members):
        known = shared.setdefault(_network(backbone), backbone)
        layers = tuple(dict.fromkeys([*known.layers, *backbone.layers]))
        shared[_network(backbone)] = replace(known, layers=layers)
    return list(shared.values())


def _rows(scores: PatchScores, rows: torch.Tensor) -> PatchScores:
    return PatchScores(scores.images[rows], scores.patches[rows])


def _min_max(values: np.ndarray) -> np.ndarray:
    """Scale to [0, 1] by minimum and maximum; all 0 where they are equal, as for a single image."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)

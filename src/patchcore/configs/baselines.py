"""Configurations of the baselines that the other methods are compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

from patchcore.configs.backbone import BackboneConfig
from patchcore.configs.checks import (
    require_at_least,
    require_choice,
    require_fraction,
    require_not_negative,
    require_positive,
)
from patchcore.configs.fastflow import IMAGE_SCORES, TrainingConfig
from patchcore.errors import ConfigurationError


@dataclass(frozen=True)
class ResNetKNNConfig:
    """Distance of an image's pooled features to those of its nearest training images.

    Attributes:
        backbone: Feature extractor; the map of its one layer is pooled.
        num_features: Features kept, those of the largest standard deviation over the training images; all of them
            where there are fewer.
        num_neighbours: Training images whose distances are averaged.
        clamp_neighbours: Take fewer neighbours where a class has too few training images, instead of failing.
    """

    backbone: BackboneConfig
    num_features: int = 500
    num_neighbours: int = 50
    clamp_neighbours: bool = False

    def __post_init__(self) -> None:
        if len(self.backbone.layers) > 1:
            raise ConfigurationError(
                f"resnet_knn pools one layer, found {len(self.backbone.layers)} ({', '.join(self.backbone.layers)}): "
                "name one with -le, or none for the last"
            )
        require_at_least("--num_features", self.num_features, 1)
        require_at_least("-k", self.num_neighbours, 1)


@dataclass(frozen=True)
class AutoencoderConfig:
    """A convolutional autoencoder of the images.

    Attributes:
        latent_channels: Channels of the bottleneck, whose sides are those of the image divided by 32.
        training: Optimiser and epochs.
        smoothing_px: Standard deviation of the Gaussian that smooths maps, px.
        image_score: What of an image's map is its score: one of IMAGE_SCORES.
        calibration_folds: Trainings that calibration repeats, each without a part of the images, >= 2.
    """

    latent_channels: int = 32
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(epochs=40, lr=2e-3, grad_clip=None))
    smoothing_px: float = 4.0
    image_score: str = "max"
    calibration_folds: int = 3

    def __post_init__(self) -> None:
        require_at_least("--latent_channels", self.latent_channels, 1, 65536)
        require_positive("--smoothing_px", self.smoothing_px, 256)
        require_choice("--image_score", self.image_score, IMAGE_SCORES)
        require_at_least("calibration folds", self.calibration_folds, 2)


@dataclass(frozen=True)
class FeatureAutoencoderConfig:
    """An autoencoder of the feature vectors at each place of a frozen backbone's maps.

    Attributes:
        backbone: Feature extractor; its layers are joined on the finest grid.
        patchsize: Side of the neighbourhood over which each map is averaged first, odd; 1 leaves it out.
        latent_channels: Width of the bottleneck; None takes what `explained_variance` asks for.
        explained_variance: Share of the training features' variance that so many principal components hold.
        variational: Learn a distribution over the bottleneck; sampled in training, its mean at test.
        kl_weight: Weight of the divergence from a standard normal distribution; variational only.
        feature_noise: Standard deviation of the Gaussian noise on the standardised features in training.
        training: Optimiser and epochs.
        smoothing_px: Standard deviation of the Gaussian that smooths maps, px.
        image_score: What of an image's map is its score: one of IMAGE_SCORES.
        calibration_folds: Trainings that calibration repeats, each without a part of the images, >= 2.

    The defaults were chosen on efficientnet_lite0, by defects drawn onto held-out training images and by rendered
    parts, never by the test images of a data set. What counts is that the training converges: 350 steps leave three
    times the error of as many principal components, and find far fewer defects. Neighbourhoods of 3 x 3 as
    published blur small defects away; noise, wider layers and bottlenecks from 80 % to 95 % change little.
    """

    backbone: BackboneConfig
    patchsize: int = 1
    latent_channels: int | None = None
    explained_variance: float = 0.9
    variational: bool = False
    kl_weight: float = 0.05
    feature_noise: float = 0.0
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(epochs=50, batch_size=4, lr=5e-3, grad_clip=None)
    )
    smoothing_px: float = 4.0
    image_score: str = "max"
    calibration_folds: int = 3

    def __post_init__(self) -> None:
        require_at_least("--patchsize", self.patchsize, 1, 63)
        if self.patchsize % 2 == 0:
            raise ConfigurationError(f"--patchsize is {self.patchsize}, expected an odd number such as 3")
        if self.latent_channels is not None:
            require_at_least("--latent_channels", self.latent_channels, 1, 65536)
        require_fraction("--explained_variance", self.explained_variance)
        require_not_negative("--kl_weight", self.kl_weight, 1e6)
        require_not_negative("--feature_noise", self.feature_noise, 100)
        require_positive("--smoothing_px", self.smoothing_px, 256)
        require_choice("--image_score", self.image_score, IMAGE_SCORES)
        require_at_least("calibration folds", self.calibration_folds, 2)

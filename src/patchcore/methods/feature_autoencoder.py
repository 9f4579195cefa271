"""An autoencoder of the feature vectors at each place of a frozen backbone's maps.

Source: Yang, Shi & Qi, "DFR: Deep Feature Reconstruction for Unsupervised Anomaly Segmentation" (2020): maps of several
    layers joined on one grid, a bottleneck as wide as the principal components of 90 % of the variance, 1x1
    convolutions. Ours standardises each channel, averages no neighbourhoods unless asked to, and has GELU between the
    convolutions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from patchcore.config_json import config_to_dict
from patchcore.configs import (
    BackboneWeights,
    FeatureAutoencoderConfig,
    PreprocessingConfig,
    RuntimeConfig,
    TrainingConfig,
    TrainingSource,
)
from patchcore.detector import DetectorBuilder, Prediction, register_detector, require_tensor
from patchcore.features.extractor import FeatureExtractor
from patchcore.features.layers import shared_extractor
from patchcore.methods.network_detector import NetworkDetector
from patchcore.methods.training import Training, load_weights, require_finite, seeded
from patchcore.scoring.anomaly_map import anomaly_maps, image_scores

VECTORS_OF_COMPONENTS = 16384  # that principal components are taken of: for a share of the variance they are enough
IMAGES_PER_PASS = 8  # of cached maps: bounds the joined maps that are held at once
RELATIVE_STD_FLOOR = 0.1  # of the root mean square over channels, as in the flows: one that hardly varies stays small


class FeatureAutoencoderNet(nn.Module):
    """Feature maps of several layers joined, standardised, and drawn again by 1x1 convolutions.

    Equal seeds give equal weights, and no global random state is changed.

    Args:
        num_channels: Channels of all layers together.
        latent_channels: Width of the bottleneck.
        config: Neighbourhood, noise, and whether there is a distribution over the bottleneck.
        seed: Gives the weights.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, num_channels: int, latent_channels: int, config: FeatureAutoencoderConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(1, num_channels, 1, 1))
        self.register_buffer("std", torch.ones(1, num_channels, 1, 1))
        outer, inner = (num_channels + 2 * latent_channels) // 2, 2 * latent_channels  # as published
        with seeded(seed):
            # Mean and log-variance of the bottleneck come from one convolution.
            moments = latent_channels * (2 if config.variational else 1)
            self.encoder = _convolutions(num_channels, outer, inner, moments)
            self.decoder = _convolutions(latent_channels, inner, outer, num_channels)

    def standardise_by(self, feature_maps: Sequence[torch.Tensor]) -> None:
        """Take mean and standard deviation of each channel over the joined training maps [N, C_l, H_l, W_l]."""
        mean, std = channel_statistics(feature_maps, self.config.patchsize)
        self.mean.copy_(mean)
        self.std.copy_(std)

    def standardised(self, feature_maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the joined maps [B, C, H, W] with mean 0 and variance 1 over the training images."""
        return (joined(feature_maps, self.config.patchsize) - self.mean) / self.std

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw standardised features again.

        Args:
            x: float [B, C, H, W].

        Returns:
            What comes out of the bottleneck [B, C, H, W], which is sampled in training if it is variational; and the
            divergence of its distribution from a standard normal one at each place [B, H, W], nats: 0 otherwise.
        """
        latent = self.encoder(x)
        divergence = torch.zeros((), device=x.device)
        if self.config.variational:
            latent, log_variance = latent.chunk(2, dim=1)  # [B, L, H, W] each
            divergence = normal_divergence(latent, log_variance)
            if self.training:
                latent = latent + torch.randn_like(latent) * torch.exp(0.5 * log_variance)
        return self.decoder(latent), divergence

    def loss(self, feature_maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the loss of training: the share of the variance that is not explained, and the weighted divergence.

        With Gaussian noise of variance s on the features, squared error + 2 s * divergence / channels is the negative
        evidence bound per channel, but for constants (Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014,
        Eq. 7), so that `kl_weight` stands for 2 s.
        """
        x = self.standardised(feature_maps)
        noise = self.config.feature_noise
        given = x + noise * torch.randn_like(x) if self.training and noise > 0 else x
        drawn, divergence = self(given)
        return (drawn - x).square().mean() + self.config.kl_weight / x.shape[1] * divergence.mean()

    def squared_error(self, feature_maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the squared error at each place, mean over channels: maps [B, C_l, H_l, W_l] -> [B, H, W]."""
        x = self.standardised(feature_maps)
        return (self(x)[0] - x).square().mean(dim=1)


def _convolutions(*channels: int) -> nn.Sequential:
    """Return 1x1 convolutions from the first number of channels to the last, with an activation between them."""
    layers: list[nn.Module] = []
    for number_in, number_out in itertools.pairwise(channels):
        layers += [nn.Conv2d(number_in, number_out, 1), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def normal_divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Return the divergence of normal distributions from the standard normal one, summed over channels, nats.

    Args:
        mean: float [B, L, H, W].
        log_variance: float [B, L, H, W].

    Returns:
        float [B, H, W], >= 0.

    Source: Kingma & Welling (ICLR 2014), appendix B.
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)


def joined(feature_maps: Sequence[torch.Tensor], patchsize: int) -> torch.Tensor:
    """Average maps over neighbourhoods and join them on the finest grid.

    Args:
        feature_maps: [B, C_l, H_l, W_l] of each layer.
        patchsize: Side of the neighbourhoods, odd; 1 leaves the maps as they are.

    Returns:
        [B, C, H, W] with C the sum of the channels.
    """
    if patchsize > 1:
        pad = patchsize // 2
        feature_maps = [F.avg_pool2d(m, patchsize, 1, pad, count_include_pad=False) for m in feature_maps]
    finest = max((m.shape[2:] for m in feature_maps), key=lambda grid: grid.numel())
    aligned = [
        m if m.shape[2:] == finest else F.interpolate(m, size=finest, mode="bilinear", align_corners=False)
        for m in feature_maps
    ]
    return torch.cat(aligned, dim=1)


def _joined_parts(feature_maps: Sequence[torch.Tensor], patchsize: int) -> Iterator[torch.Tensor]:
    """Yield the joined maps [b, C, H, W] of a few images at a time."""
    for part in zip(*(maps.split(IMAGES_PER_PASS) for maps in feature_maps), strict=True):
        yield joined(part, patchsize)


def channel_statistics(feature_maps: Sequence[torch.Tensor], patchsize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation [1, C, 1, 1] of each channel over images and places of the joined maps.

    A channel that hardly varies on normal images would turn a small deviation into a huge one: channels are scaled by
    no less than a tenth of the typical standard deviation.
    """
    num_images = len(feature_maps[0])

    def mean_over(parts: Iterator[torch.Tensor]) -> torch.Tensor:
        sums = [part.double().mean(dim=(2, 3)).sum(dim=0) for part in parts]
        return (torch.stack(sums).sum(dim=0) / num_images).view(1, -1, 1, 1)

    mean = mean_over(_joined_parts(feature_maps, patchsize))
    variance = mean_over((part - mean).square() for part in _joined_parts(feature_maps, patchsize))
    floor = RELATIVE_STD_FLOOR * variance.mean().sqrt()
    return mean, variance.sqrt().clamp(min=float(floor) or 1.0)


def num_components(feature_maps: Sequence[torch.Tensor], config: FeatureAutoencoderConfig) -> int:
    """Return how many principal components of the standardised features hold the wanted share of their variance.

    Args:
        feature_maps: Training maps [N, C_l, H_l, W_l] of each layer.
        config: Neighbourhood and share.
    """
    mean, std = channel_statistics(feature_maps, config.patchsize)
    num_images = len(feature_maps[0])
    vectors_per_image = -(-VECTORS_OF_COMPONENTS // num_images)
    chosen = []
    for part in _joined_parts(feature_maps, config.patchsize):
        vectors = ((part - mean) / std).float().flatten(2).transpose(1, 2)  # [b, H * W, C]
        step = max(1, vectors.shape[1] // vectors_per_image)
        chosen.append(vectors[:, ::step].flatten(0, 1))
    sample = torch.cat(chosen)  # [V, C]
    variances = torch.linalg.eigvalsh((sample.T @ sample).double()).flip(0).clamp(min=0)  # [C], largest first
    missing = variances.cumsum(0) < config.explained_variance * variances.sum()
    return min(int(missing.sum()) + 1, len(variances))


@register_detector
class FeatureAutoencoder(NetworkDetector[FeatureAutoencoderNet]):
    """Squared error of an autoencoder of feature vectors.

    Args:
        config: Layers, bottleneck, training, and how errors become maps and scores.
        extractor: Feature maps of a frozen backbone, shared between classes.
        preprocessing: Resize and crop that the images have had.
        source: What the model is trained on; its seed drives weights and order.
    """

    method: ClassVar[str] = "feature_autoencoder"
    config_class: ClassVar[type] = FeatureAutoencoderConfig
    network_name: ClassVar[str] = "autoencoder"
    kept_name: ClassVar[str] = "features"
    loss_unit: ClassVar[str] = "share of the variance of features"

    def __init__(
        self,
        config: FeatureAutoencoderConfig,
        extractor: FeatureExtractor,
        preprocessing: PreprocessingConfig,
        source: TrainingSource | None = None,
    ) -> None:
        device = extractor.mean.device
        super().__init__(config.training, config.calibration_folds, device, preprocessing, source)
        self.config = config
        self.extractor = extractor
        self.num_channels = sum(extractor.feature_shapes[layer][0] for layer in config.backbone.layers)

    @classmethod
    def prepare(
        cls, config: FeatureAutoencoderConfig, preprocessing: PreprocessingConfig, runtime: RuntimeConfig
    ) -> DetectorBuilder:
        """Load the backbone once and return what makes a detector for each class.

        Raises:
            ConfigurationError: Backbone, weights or layers are unknown or do not fit.
        """
        extractor = shared_extractor(config.backbone, preprocessing.imagesize_px)
        return lambda source, device: cls(config, extractor.to(device), preprocessing, source)

    def _feature_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        maps = self.extractor(images)
        return [maps[layer] for layer in self.config.backbone.layers]

    def _rows(self, images: torch.Tensor, first: int) -> tuple[list[torch.Tensor], list[int]]:
        """Return the maps of each layer at its own resolution: joined they would take several times the memory."""
        return self._feature_maps(images), list(range(first, first + len(images)))

    def _new_network(self, latent_channels: int, *purpose: str | int) -> FeatureAutoencoderNet:
        seed = self._seed(*purpose, "weights")
        return FeatureAutoencoderNet(self.num_channels, latent_channels, self.config, seed).to(self.device)

    def _new_training(self, rows: Sequence[torch.Tensor], config: TrainingConfig, *purpose: str | int) -> Training:
        latent_channels = self.config.latent_channels or num_components(rows, self.config)
        network = self._new_network(latent_channels, *purpose)
        network.standardise_by(rows)
        return self._training_of(network, network.loss, config, purpose)

    @property
    def _image_score(self) -> str:
        return self.config.image_score

    @torch.inference_mode()
    def _score(self, network: FeatureAutoencoderNet, images: torch.Tensor) -> Prediction:
        errors = network.squared_error(self._feature_maps(images))  # [B, h, w]
        maps = anomaly_maps(errors, self.preprocessing.imagesize_px, self.config.smoothing_px)  # [B, S, S]
        return Prediction(image_scores(maps, self._image_score).cpu().numpy(), maps.cpu().numpy())

    def backbones(self) -> tuple[BackboneWeights, ...]:
        return (self.extractor.weights,) if self.extractor.weights else ()

    def configuration(self) -> dict[str, Any]:
        return config_to_dict(self.config)

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over a stored network; the width of its bottleneck is that of the first weights behind it.

        Raises:
            ConfigurationError: It does not fit the configuration; the message names the tensors.
        """
        latent_channels = require_tensor(tensors, "decoder.0.weight", ndim=4).shape[1]
        network = self._new_network(self.config.latent_channels or latent_channels, self.network_name)
        load_weights(network, tensors)
        require_finite(network, positive=("std",))
        self._network = network.eval()

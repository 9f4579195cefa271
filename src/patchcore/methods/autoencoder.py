"""A convolutional autoencoder of the images: what it cannot draw again is anomalous.

Source: the idea of Bergmann et al., "Improving Unsupervised Defect Segmentation by Applying Structural Similarity to
    Autoencoders" (VISAPP 2019), with their squared error. Theirs has a bottleneck without places and images of 128 px.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from patchcore.config_json import config_to_dict
from patchcore.configs import AutoencoderConfig, PreprocessingConfig, RuntimeConfig, TrainingConfig, TrainingSource
from patchcore.detector import DetectorBuilder, Prediction, register_detector
from patchcore.methods.network_detector import NetworkDetector
from patchcore.methods.training import Training, load_weights, require_finite, seeded
from patchcore.scoring.anomaly_map import image_scores, smoothed

WIDTHS = (16, 32, 64, 64, 64)  # channels behind each halving; the bottleneck follows
STD_FLOOR = 1.0  # gray values; images of one colour are left in their own unit
SLOPE = 0.1  # of the activation below 0


class AutoencoderNet(nn.Module):
    """Five halvings by convolutions, a bottleneck, and the mirror image of them.

    Equal seeds give equal weights, and no global random state is changed.

    Args:
        latent_channels: Channels of the bottleneck.
        seed: Gives the weights.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, latent_channels: int, seed: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.register_buffer("std", torch.ones(1, 3, 1, 1))
        channels = (3, *WIDTHS)
        pairs = list(itertools.pairwise(channels))
        with seeded(seed):
            self.down = nn.ModuleList([nn.Conv2d(i, o, 4, stride=2, padding=1) for i, o in pairs])
            self.to_latent = nn.Conv2d(channels[-1], latent_channels, 1)
            self.from_latent = nn.Conv2d(latent_channels, channels[-1], 1)
            self.up = nn.ModuleList([nn.ConvTranspose2d(o, i, 4, stride=2, padding=1) for i, o in reversed(pairs)])
        self.activation = nn.LeakyReLU(SLOPE)
        self.to(memory_format=torch.channels_last)

    def standardise_by(self, images: torch.Tensor) -> None:
        """Take mean and standard deviation of each colour over images uint8 [N, 3, H, W] and places."""
        mean = torch.stack([image.double().mean(dim=(1, 2)) for image in images]).mean(dim=0)  # [3]
        squares = torch.stack([(image - mean[:, None, None]).square().mean(dim=(1, 2)) for image in images])
        self.mean.copy_(mean.view_as(self.mean))
        self.std.copy_(squares.mean(dim=0).sqrt().clamp(min=STD_FLOOR).view_as(self.std))

    def standardised(self, images: torch.Tensor) -> torch.Tensor:
        """Return images uint8 [B, 3, H, W] with mean 0 and variance 1 over the training images."""
        return (images.float() - self.mean) / self.std

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Draw standardised images [B, 3, H, W] again, at least 32 px a side."""
        sizes = []
        for layer in self.down:
            sizes.append(x.shape[2:])  # which of two sizes was halved is lost in the result
            x = self.activation(layer(x))  # [B, C, H / 2, W / 2]
        x = self.activation(self.from_latent(self.to_latent(x)))  # [B, 64, H / 32, W / 32]
        for number, layer in enumerate(self.up, start=1):
            x = layer(x, output_size=sizes[-number])
            if number < len(self.up):  # the pixels themselves have no bound
                x = self.activation(x)
        return x

    def squared_error(self, images: torch.Tensor) -> torch.Tensor:
        """Return the squared error of each pixel of images uint8 [B, 3, H, W], mean over colours: [B, H, W]."""
        x = self.standardised(images)
        return (self(x) - x).square().mean(dim=1)

    def mean_squared_error(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the loss of training on images uint8 [B, 3, H, W]: the share of the variance that is not explained."""
        (images,) = rows
        return self.squared_error(images).mean()


@register_detector
class Autoencoder(NetworkDetector[AutoencoderNet]):
    """Squared error of a convolutional autoencoder.

    The weakest of the methods, and a warning: a network that draws edges and textures in general draws a defect
    as well, and misses sharp normal detail.

    Args:
        config: Bottleneck, training, and how errors become maps and scores.
        device: Where the network is.
        preprocessing: Resize and crop that the images have had.
        source: What the model is trained on; its seed drives weights and order.
    """

    method: ClassVar[str] = "autoencoder"
    config_class: ClassVar[type] = AutoencoderConfig
    network_name: ClassVar[str] = "autoencoder"
    kept_name: ClassVar[str] = "images"
    loss_unit: ClassVar[str] = "share of the variance of pixels"

    def __init__(
        self,
        config: AutoencoderConfig,
        device: torch.device,
        preprocessing: PreprocessingConfig,
        source: TrainingSource | None = None,
    ) -> None:
        super().__init__(config.training, config.calibration_folds, device, preprocessing, source)
        self.config = config

    @classmethod
    def prepare(
        cls, config: AutoencoderConfig, preprocessing: PreprocessingConfig, runtime: RuntimeConfig
    ) -> DetectorBuilder:
        """Return what makes a detector for each class; there is no backbone."""
        return lambda source, device: cls(config, device, preprocessing, source)

    def _rows(self, images: torch.Tensor, first: int) -> tuple[list[torch.Tensor], list[int]]:
        """Return the images as they are: as uint8 they take a quarter of the memory."""
        return [images], list(range(first, first + len(images)))

    def _new_network(self, *purpose: str | int) -> AutoencoderNet:
        return AutoencoderNet(self.config.latent_channels, self._seed(*purpose, "weights")).to(self.device)

    def _new_training(self, rows: Sequence[torch.Tensor], config: TrainingConfig, *purpose: str | int) -> Training:
        network = self._new_network(*purpose)
        network.standardise_by(rows[0])
        return self._training_of(network, network.mean_squared_error, config, purpose)

    @property
    def _image_score(self) -> str:
        return self.config.image_score

    @torch.inference_mode()
    def _score(self, network: AutoencoderNet, images: torch.Tensor) -> Prediction:
        errors = network.squared_error(images.to(self.device))  # [B, H, W]
        maps = smoothed(errors, self.config.smoothing_px)
        return Prediction(image_scores(maps, self._image_score).cpu().numpy(), maps.cpu().numpy())

    def configuration(self) -> dict[str, Any]:
        return config_to_dict(self.config)

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over a stored network.

        Raises:
            ConfigurationError: It does not fit the configuration; the message names the tensors.
        """
        network = self._new_network(self.network_name)
        load_weights(network, tensors)
        require_finite(network, positive=("std",))
        self._network = network.eval()

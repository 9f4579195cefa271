"""FastFlow: one normalizing flow for each feature map of a frozen backbone.

Source: Yu et al., "FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing Flows" (2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F

from patchcore.config_json import config_to_dict
from patchcore.configs import (
    BackboneWeights,
    FastFlowConfig,
    PreprocessingConfig,
    RuntimeConfig,
    TrainingConfig,
    TrainingSource,
)
from patchcore.detector import (
    DetectorBuilder,
    Prediction,
    TrainingArtifacts,
    register_detector,
)
from patchcore.errors import ConfigurationError
from patchcore.features.extractor import FeatureExtractor
from patchcore.features.layers import shared_extractor
from patchcore.methods.network_detector import NetworkDetector
from patchcore.methods.tiles import cut_tiles, drawn_corners, resized, tiled_map
from patchcore.methods.training import Batch, Training, load_weights
from patchcore.runtime import over_threads
from patchcore.scoring.anomaly_map import image_scores
from patchcore.scoring.post_processing import post_processed

if TYPE_CHECKING:
    from patchcore.methods.normalizing_flow import FastFlowNet

IMAGES_PER_FORWARD = 8  # of cached features: bounds the latent variables that are held at once
SIZE_STEP_PX = 32  # what the strides of common backbones multiply to


@register_detector
class FastFlow(NetworkDetector["FastFlowNet"]):
    """Negative log-likelihood of feature maps under normalizing flows.

    Args:
        config: Flows, training, and how likelihoods become maps and scores.
        extractor: Feature maps of a frozen backbone, shared between classes.
        preprocessing: Resize and crop that the images have had.
        source: What the model is trained on; its seed drives weights and order.
    """

    method: ClassVar[str] = "fastflow"
    config_class: ClassVar[type] = FastFlowConfig
    network_name: ClassVar[str] = "flows"
    kept_name: ClassVar[str] = "features"
    loss_unit: ClassVar[str] = "bits per dimension"

    def __init__(
        self,
        config: FastFlowConfig,
        extractor: FeatureExtractor,
        preprocessing: PreprocessingConfig,
        source: TrainingSource | None = None,
    ) -> None:
        device = extractor.mean.device
        super().__init__(config.training, config.calibration_folds, device, preprocessing, source)
        self.config = config
        self.extractor = extractor
        self.shapes = [_map_shape(extractor, layer) for layer in config.backbone.layers]
        self.rows_per_image = config.tiles.training_tiles if config.tiles else 1

    @classmethod
    def prepare(
        cls, config: FastFlowConfig, preprocessing: PreprocessingConfig, runtime: RuntimeConfig
    ) -> DetectorBuilder:
        """Load the backbone once and return what makes a detector for each class.

        Raises:
            ConfigurationError: Backbone, weights or layers are unknown or do not fit.
        """
        _require_tiles(config, preprocessing)
        extractor = shared_extractor(config.backbone, preprocessing.imagesize_px)
        _require_scales(config, extractor, preprocessing.imagesize_px)
        return lambda source, device: cls(config, extractor.to(device), preprocessing, source)

    def _rows(self, images: torch.Tensor, first: int) -> tuple[list[torch.Tensor], list[int]]:
        """Return feature maps [R, C, H, W] of each layer, a row for each image or each tile drawn from it."""
        inputs, image_of_input = self._training_inputs(images, first)
        return self._feature_maps(inputs), image_of_input

    def _training_inputs(self, images: torch.Tensor, first: int) -> tuple[torch.Tensor, list[int]]:
        """Return what the backbone gets of images [B, 3, H, W], and the number of each one's image from `first`."""
        tiles = self.config.tiles
        if tiles is None:
            return images, list(range(first, first + len(images)))
        inputs: list[torch.Tensor] = []
        numbers: list[int] = []
        for number, image in enumerate(images, start=first):
            _, height, width = image.shape
            corners = drawn_corners(height, width, tiles, self._seed("tiles", number))
            inputs.append(cut_tiles(image, corners, tiles, self.preprocessing.imagesize_px))
            numbers += [number] * len(corners)
        return torch.cat(inputs), numbers

    def _feature_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        maps = self.extractor(images)
        return [maps[layer] for layer in self.config.backbone.layers]

    def _new_training(self, rows: Sequence[torch.Tensor], config: TrainingConfig, *purpose: str | int) -> Training:
        flows = self._new_flows(*purpose)
        flows.standardise_by(rows, self.plan.processes)

        def loss(batch: Batch) -> torch.Tensor:
            return flows.mean_bits_per_dimension(batch, batch.randn_like)

        return self._training_of(flows, loss, config, purpose)

    def _new_flows(self, *purpose: str | int) -> FastFlowNet:
        # Imported here: FrEIA brings scipy.stats, which takes a second that no other method should wait for.
        from patchcore.methods.normalizing_flow import FastFlowNet

        return FastFlowNet(self.shapes, self.config, self._seed(*purpose, "weights")).to(self.device)

    def _complete(self, network: FastFlowNet, rows: Sequence[torch.Tensor]) -> None:
        """Learn how far each flow's map spreads on the training images."""
        network.measure_spread(rows, IMAGES_PER_FORWARD, self.plan.processes)

    @property
    def smallest_side_px(self) -> int:
        return self.config.tiles.patch_size if self.config.tiles else 1

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
        return super().predict(images)

    @property
    def _image_score(self) -> str:
        return self.config.image_score

    @torch.inference_mode()
    def _score(self, network: FastFlowNet, images: torch.Tensor) -> Prediction:
        """Return scores [B] and maps [B, H, W] of images uint8 [B, 3, H, W]: the score is read off the final map."""
        maps = post_processed(self._maps(network, images), images, self.config.post_processing)
        return Prediction(image_scores(maps, self._image_score).cpu().numpy(), maps.cpu().numpy())

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

    def training_artifacts(self, log_group: str) -> TrainingArtifacts:
        """Return the history, and the model as one file that plain torch reads."""
        export = {f"fastflow_{log_group}_final.pth": self.torch_export}
        return replace(super().training_artifacts(log_group), exports=export)

    def backbones(self) -> tuple[BackboneWeights, ...]:
        return (self.extractor.weights,) if self.extractor.weights else ()

    @classmethod
    def require_graph(cls, config: FastFlowConfig) -> None:
        if config.tiles is not None:
            raise ConfigurationError(
                "a FastFlow that scores in tiles has no graph to export: train it without --enable_patch_inference"
            )

    def graph(self) -> torch.nn.Module:
        from patchcore.methods.graphs import FlowGraph

        flows = self._require_fitted()
        self.require_graph(self.config)
        return FlowGraph(self.config, self.extractor, flows, self.preprocessing.imagesize_px)

    def configuration(self) -> dict[str, Any]:
        return config_to_dict(self.config)

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over stored flows.

        Raises:
            ConfigurationError: They do not fit the configuration; the message names the tensors.
        """
        flows = self._new_flows("flows")
        load_weights(flows, tensors)
        flows.require_invertible()
        self._network = flows.eval()


def _map_shape(extractor: FeatureExtractor, layer: str) -> tuple[int, int, int]:
    channels, height, width = extractor.feature_shapes[layer]
    return channels, height, width


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

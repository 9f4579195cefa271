"""Configurations of training by gradients and of FastFlow."""

from __future__ import annotations

from dataclasses import dataclass, field

from patchcore.configs.backbone import BackboneConfig
from patchcore.configs.checks import require_at_least, require_choice, require_not_negative, require_positive
from patchcore.errors import ConfigurationError

SCHEDULES = ("constant", "cosine", "one_cycle")
MAP_MODES = ("nll", "prob", "weighted")
IMAGE_SCORES = ("max", "mean", "topk")
SMOOTHINGS = ("none", "gaussian", "guided")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained by gradients, with Adam.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images per step.
        lr: Highest learning rate of the schedule.
        weight_decay: Decoupled decay of the weights per step, as a share of the learning rate; >= 0.
        schedule: One of SCHEDULES.
        grad_clip: Longest gradient, as a Euclidean norm; None leaves gradients as they are.
        patience: Stop after so many epochs without a lower loss on held-out images, and keep the weights of the lowest;
            None trains all epochs and keeps the last weights.
    """

    epochs: int = 50
    batch_size: int = 8
    lr: float = 1e-3
    weight_decay: float = 1e-5
    schedule: str = "one_cycle"
    grad_clip: float | None = 0.1
    patience: int | None = None

    def __post_init__(self) -> None:
        require_at_least("--epochs", self.epochs, 1, 1_000_000)
        require_at_least("--batch_size", self.batch_size, 1, 65536)
        require_positive("--lr", self.lr, 1e6)
        require_not_negative("--weight_decay", self.weight_decay, 1e6)
        require_choice("--schedule", self.schedule, SCHEDULES)
        if self.grad_clip is not None:
            require_positive("--grad_clip", self.grad_clip)
        if self.patience is not None:
            require_at_least("--patience", self.patience, 1)


@dataclass(frozen=True)
class TileConfig:
    """Overlapping square tiles of an image, each scored as an image of its own.

    The flows are trained on tiles as well: they have to know the scale at which they score.

    Attributes:
        patch_size: Side of a tile, px of the image; each is resized to the backbone's input.
        patch_stride: Distance of neighbouring tiles, px; <= patch_size, so that no pixel is left out.
        training_tiles: Tiles drawn from each training image; all where it has no more.
        low_memory: Score 8 tiles at once instead of 64; the same maps.
    """

    patch_size: int
    patch_stride: int
    training_tiles: int = 4
    low_memory: bool = False

    def __post_init__(self) -> None:
        require_at_least("--patch_size", self.patch_size, 16, 16384)
        require_at_least("--patch_stride", self.patch_stride, 1)
        require_at_least("--training_tiles", self.training_tiles, 1)
        if self.patch_stride > self.patch_size:
            raise ConfigurationError(
                f"--patch_stride {self.patch_stride} is larger than --patch_size {self.patch_size}, which leaves "
                f"pixels out: use {self.patch_size} or less, such as {max(1, self.patch_size // 2)}"
            )


@dataclass(frozen=True)
class PostProcessingConfig:
    """What happens to a map before its image is scored; nothing by default.

    Attributes:
        smoothing: One of SMOOTHINGS; "guided" smooths along edges of the image instead of across them.
        smoothing_px: Standard deviation of the Gaussian, or radius of the guided filter's window, px of the map; > 0.
        adaptive_normalization: Measure each map from its own median in units of its own spread.
        scales: Sizes at which an image is scored, as multiples of the input; the maps are averaged.
    """

    smoothing: str = "none"
    smoothing_px: float = 4.0
    adaptive_normalization: bool = False
    scales: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        require_choice("--smoothing", self.smoothing, SMOOTHINGS)
        require_positive("--smoothing_px", self.smoothing_px, 256)
        if not self.scales or len(set(self.scales)) < len(self.scales):
            raise ConfigurationError(f"--multi_scale {self.scales}: name each scale once, at least one")
        for scale in self.scales:
            if not 0.25 <= scale <= 4:
                raise ConfigurationError(f"--multi_scale is {scale}, expected a factor from 0.25 to 4, such as 0.75")


@dataclass(frozen=True)
class FastFlowConfig:
    """FastFlow (Yu et al., 2021): one normalizing flow per feature map of a frozen backbone.

    Attributes:
        backbone: Feature extractor and layers, each of which gets a flow.
        flow_steps: Coupling steps per flow.
        hidden_ratio: Hidden channels of a coupling network, as a multiple of its input channels.
        conv3x3_only: Use 3x3 convolutions in every step; otherwise 3x3 and 1x1 in turn.
        clamp: Largest logarithm of a coupling's scale.
        feature_noise: Standard deviation of the Gaussian noise on the standardised features while a flow is trained.
        training: Optimiser and epochs.
        map_mode: How the flows' likelihoods become a map: one of MAP_MODES.
        image_score: What of an image's map is its score: one of IMAGE_SCORES.
        precision: Arithmetic of the coupling networks: "float32", or "bfloat16" where the hardware has it.
        post_processing: What happens to maps before images are scored.
        tiles: Train on and score tiles of the images; None takes whole images.
        calibration_folds: Trainings that calibration repeats, each without a part of the images, >= 2.
    """

    backbone: BackboneConfig
    flow_steps: int = 8
    hidden_ratio: float = 1.0
    conv3x3_only: bool = False
    clamp: float = 2.0
    feature_noise: float = 0.0
    training: TrainingConfig = field(default_factory=TrainingConfig)
    map_mode: str = "prob"
    image_score: str = "max"
    precision: str = "float32"
    post_processing: PostProcessingConfig = field(default_factory=PostProcessingConfig)
    tiles: TileConfig | None = None
    calibration_folds: int = 3

    def __post_init__(self) -> None:
        require_at_least("--flow_steps", self.flow_steps, 1, 64)
        require_positive("--hidden_ratio", self.hidden_ratio, 16)
        require_positive("--clamp", self.clamp, 20)
        require_not_negative("--feature_noise", self.feature_noise, 100)
        require_choice("--map_mode", self.map_mode, MAP_MODES)
        require_choice("--image_score", self.image_score, IMAGE_SCORES)
        require_choice("--precision", self.precision, PRECISIONS)
        require_at_least("calibration folds", self.calibration_folds, 2)

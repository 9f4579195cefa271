"""What was typed of FastFlow and its images, and the configurations that follow from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from patchcore.cli.backbones import absolute_weights
from patchcore.cli.typed_dataset import DEFAULT_IMAGESIZE_PX, TypedDataset
from patchcore.configs import (
    BackboneConfig,
    FastFlowConfig,
    PreprocessingConfig,
    TileConfig,
    near_matches,
)
from patchcore.configs.typed import ANY_VALUE, TypedSetting
from patchcore.errors import ConfigurationError
from patchcore.presets import Preset, fastflow_backbone, fastflow_backbone_names, fastflow_preset, with_settings

DEFAULT_BACKBONE = "resnet18"

# Where a typed option is in FastFlowConfig.
SETTING_PATHS: dict[str, tuple[str, ...]] = {
    "flow_steps": ("flow_steps",),
    "hidden_ratio": ("hidden_ratio",),
    "conv3x3_only": ("conv3x3_only",),
    "clamp": ("clamp",),
    "feature_noise": ("feature_noise",),
    "map_mode": ("map_mode",),
    "image_score": ("image_score",),
    "precision": ("precision",),
    "epochs": ("training", "epochs"),
    "lr": ("training", "lr"),
    "weight_decay": ("training", "weight_decay"),
    "schedule": ("training", "schedule"),
    "grad_clip": ("training", "grad_clip"),
    "patience": ("training", "patience"),
    "smoothing": ("post_processing", "smoothing"),
    "smoothing_px": ("post_processing", "smoothing_px"),
    "adaptive_normalization": ("post_processing", "adaptive_normalization"),
    "multi_scale": ("post_processing", "scales"),
}
LOW_MEMORY = ("config", "tiles", "low_memory")


@dataclass(frozen=True)
class TypedTiles:
    """The options of patch inference as typed; None where not."""

    enabled: bool
    patch_size: int | None
    patch_stride: int | None
    training_tiles: int | None
    low_memory: bool

    def config(self, imagesize_px: int) -> TileConfig | None:
        """Return the tiles; None where whole images are scored.

        Args:
            imagesize_px: Side to which tiles are resized.

        Raises:
            ConfigurationError: An option of tiles was typed without them.
        """
        if not self.enabled:
            option = next((setting.option for setting in self._typed()), None)
            if option is not None:
                raise ConfigurationError(
                    f"{option} without --enable_patch_inference: type both to score tiles of the images, or leave "
                    f"{option} out"
                )
            return None
        size = imagesize_px if self.patch_size is None else self.patch_size
        return TileConfig(
            patch_size=size,
            patch_stride=max(1, size // 2) if self.patch_stride is None else self.patch_stride,
            training_tiles=TileConfig.training_tiles if self.training_tiles is None else self.training_tiles,
            low_memory=self.low_memory,
        )

    def _typed(self) -> Iterator[TypedSetting]:
        """Yield what was typed besides --enable_patch_inference."""
        for name in ("patch_size", "patch_stride", "training_tiles"):
            if getattr(self, name) is not None:
                yield TypedSetting(f"--{name}", ("config", "tiles", name), getattr(self, name))
        if self.low_memory:
            yield TypedSetting("--low_memory", LOW_MEMORY, True)

    def stored_settings(self) -> list[TypedSetting]:
        """Return what stored models have to agree with."""
        enabled = TypedSetting("--enable_patch_inference", ("config", "tiles"), ANY_VALUE)
        sizes = [setting for setting in self._typed() if setting.path != LOW_MEMORY]
        return [enabled, *sizes] if self.enabled else sizes

    def overrides(self) -> list[TypedSetting]:
        """Return what may differ from stored models: it bounds memory and leaves every map as it is."""
        return [setting for setting in self._typed() if setting.path == LOW_MEMORY]


@dataclass(frozen=True)
class TypedFastFlow:
    """The options of the model as typed.

    Attributes:
        backbone: As typed; None if not.
        layers: As typed; empty for the backbone's own.
        weights: As in BackboneConfig; None if not typed.
        normalization: As in BackboneConfig; None if not typed.
        input_size: Side of the images that the backbone gets, px; None if not typed.
        use_class_specific: Take the preset of each class.
        tiles: Options of patch inference.
        settings: Every other option that was typed, by its name in SETTING_PATHS.
    """

    backbone: str | None
    layers: tuple[str, ...]
    weights: str | None
    normalization: str | None
    input_size: int | None
    use_class_specific: bool
    tiles: TypedTiles
    settings: Mapping[str, Any]

    def backbone_config(self) -> BackboneConfig:
        """Return the backbone, with the layers that stand for it when none is typed."""
        typed = DEFAULT_BACKBONE if self.backbone is None else self.backbone
        known = fastflow_backbone(typed)
        layers = self.layers or known.layers
        if not layers:
            raise ConfigurationError(
                f"backbone {typed!r} has no layers of its own here ({near_matches(typed, fastflow_backbone_names())}): "
                "mend the name, or name each layer with --layers"
            )
        weights = absolute_weights("pretrained" if self.weights is None else self.weights)
        return BackboneConfig(known.name, layers, weights, self.normalization or "imagenet")

    def preset(self, category: str) -> Preset | None:
        """Return the preset of a class, if presets are asked for."""
        return fastflow_preset(self.backbone_config().name, category) if self.use_class_specific else None

    def config_of(self, category: str, dataset: TypedDataset) -> FastFlowConfig:
        """Return the configuration of a class: default, then preset, then what was typed; the later beats the earlier.

        Args:
            category: The class.
            dataset: The images as typed; what is not typed of their batches is the default's or the preset's.

        Raises:
            ConfigurationError: A value is wrong or has no effect beside the others.
        """
        config = FastFlowConfig(self.backbone_config())
        if (preset := self.preset(category)) is not None:
            config = with_settings(config, preset.settings)
        batches = {} if dataset.batch_size is None else {"batch_size": dataset.batch_size}
        typed = {SETTING_PATHS[name][-1]: value for name, value in self.settings.items()}
        config = with_settings(config, {**batches, **typed})
        if "smoothing_px" in self.settings and config.post_processing.smoothing == "none":
            raise ConfigurationError(
                f"--smoothing_px {self.settings['smoothing_px']} without --smoothing: type --smoothing gaussian or "
                "guided as well, or leave --smoothing_px out"
            )
        return replace(config, tiles=self.tiles.config(self.preprocessing(dataset).imagesize_px))

    def preprocessing(self, dataset: TypedDataset) -> PreprocessingConfig:
        """Return what happens to images, of the typed sizes, the backbone's or 224 px.

        Raises:
            ConfigurationError: Two of the sizes differ, or an option was typed that has no effect.
        """
        made_for = fastflow_backbone(DEFAULT_BACKBONE if self.backbone is None else self.backbone).input_size
        sizes = {"--imagesize": dataset.imagesize, "--input_size": self.input_size, "the backbone's size": made_for}
        given = {name: size for name, size in sizes.items() if size is not None}
        (first, size), *others = given.items() or [("default", DEFAULT_IMAGESIZE_PX)]
        for name, other in others:
            if other != size:
                raise ConfigurationError(
                    f"{first} is {size} but {name} is {other}: leave {first} out or make it {other}"
                )
        return dataset.preprocessing(size)

    def stored_settings(self, dataset: TypedDataset) -> list[TypedSetting]:
        """Return what stored models have to agree with: everything typed but what bounds memory."""
        settings = [*dataset.stored_settings(), *self._backbone_settings(), *self.tiles.stored_settings()]
        if self.input_size is not None:
            settings.append(TypedSetting("--input_size", ("preprocessing", "imagesize_px"), self.input_size))
        for name, value in self.settings.items():
            settings.append(TypedSetting(f"--{name}", ("config", *SETTING_PATHS[name]), value))
        return settings

    def _backbone_settings(self) -> list[TypedSetting]:
        typed = {
            ("--backbone", "name"): None if self.backbone is None else fastflow_backbone(self.backbone).name,
            ("--layers", "layers"): list(self.layers) or None,
            ("--weights", "weights"): None if self.weights is None else absolute_weights(self.weights),
            ("--normalization", "normalization"): self.normalization,
        }
        return [
            TypedSetting(option, ("config", "backbone", name), value)
            for (option, name), value in typed.items()
            if value is not None
        ]

"""Layers of a backbone that stand for it where none is typed, and extractors that detectors share."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from patchcore.configs import BackboneConfig
from patchcore.errors import ConfigurationError
from patchcore.features.backbones import backbone_entry
from patchcore.features.extractor import FeatureExtractor, build_extractor

OUTLINE_SIDE_PX = 224  # of the image that an outline is run on: no map of a network has one position alone there

_EXTRACTORS: WeakValueDictionary[tuple[BackboneConfig, int], FeatureExtractor] = WeakValueDictionary()


def shared_extractor(config: BackboneConfig, imagesize_px: int) -> FeatureExtractor:
    """Return the extractor that detectors of other settings use already, or a new one: each class may have a preset.

    Raises:
        ConfigurationError: As `build_extractor`.
    """
    key = (config, imagesize_px)
    extractor = _EXTRACTORS.get(key) or build_extractor(config, imagesize_px)
    _EXTRACTORS[key] = extractor
    return extractor


def middle_layers(backbone: str) -> tuple[str, ...]:
    """Return the layers to begin with where feature maps are wanted, such as layer2 and layer3 of a ResNet.

    Raises:
        ConfigurationError: The backbone is unknown, or no layers are known of it.
    """
    layers = backbone_entry(backbone).good_layers
    if not layers:
        raise _unknown_layers(backbone)
    return layers


def last_layer(backbone: str) -> str:
    """Return the layer whose map a network pools for its classifier: layer4 of a ResNet.

    It is the last to give a map with more than one position. Of transformers, it is the last block.

    Raises:
        ConfigurationError: The backbone is unknown, or its layers give no such map.
    """
    with torch.device("meta"):  # shapes alone: no weights, no arithmetic
        outline = backbone_entry(backbone).build(False).eval()
    if num_blocks := _num_token_blocks(outline):
        return f"blocks.{num_blocks - 1}"
    last: list[str] = []

    def watch(name: str) -> Any:
        def after(part: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1:
                last[:] = [name]

        return after

    for name, part in outline.named_modules():
        if name:
            part.register_forward_hook(watch(name))
    try:
        outline(torch.zeros(1, 3, OUTLINE_SIDE_PX, OUTLINE_SIDE_PX, device="meta"))
    except (RuntimeError, AssertionError) as error:
        raise _unknown_layers(backbone) from error
    if not last:
        raise _unknown_layers(backbone)
    return last[0]


def _num_token_blocks(network: nn.Module) -> int:
    """Return the number of blocks of a network of tokens (ViT, DeiT, DINOv2), 0 for one of maps."""
    blocks = getattr(network, "blocks", None)
    is_of_tokens = hasattr(network, "patch_embed") and isinstance(blocks, (nn.Sequential, nn.ModuleList))
    return len(blocks) if is_of_tokens else 0  # type: ignore[arg-type]


def _unknown_layers(backbone: str) -> ConfigurationError:
    return ConfigurationError(
        f"backbone {backbone!r} has no layers of its own here: name what is wanted with -le LAYER"
    )

"""Feature maps of chosen layers of a frozen backbone, running nothing behind the last of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from patchcore.configs import BackboneConfig, near_matches
from patchcore.errors import ConfigurationError
from patchcore.features.backbones import IMAGENET_MEAN, IMAGENET_STD, Backbone, load_backbone


class FeatureExtractor(nn.Module):
    """Images to feature maps.

    The forward pass of most convolutional networks is a chain of modules, each fed with the output of the one
    before. The chain is found by watching one forward pass; it is followed into the module that holds the last
    layer needed, and everything behind is dropped. Where a network is no chain up to its last layer, the
    remaining part is run whole. The result does not depend on the order of the layers.

    Args:
        backbone: Network with weights.
        layers: Names of modules (as in `named_modules`) that give feature maps.
        normalization: "imagenet" for every backbone alike, or "backbone" for its own mean and std.
        imagesize: Side of the images, px.

    Raises:
        ConfigurationError: A layer is unknown, or its output is no feature map at this image size.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, backbone: Backbone, layers: Sequence[str], normalization: str, imagesize: int) -> None:
        super().__init__()
        named = dict(backbone.module.named_modules())
        for layer in layers:
            if layer not in named or not layer:
                near = near_matches(layer, [n for n in named if n.count(".") <= max(1, layer.count("."))])
                raise ConfigurationError(f"backbone {backbone.name!r} has no layer {layer!r}: {near[:300]}")
        self.layers = tuple(layers)
        own = (backbone.mean, backbone.std)
        mean, std = own if normalization == "backbone" else (IMAGENET_MEAN, IMAGENET_STD)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        example = torch.zeros(1, 3, imagesize, imagesize)
        with torch.no_grad():
            steps = _needed_chain(backbone.module, example, self.layers)
        self._step_names = [name for name, _ in steps]
        self.steps = nn.ModuleList([module for _, module in steps]).to(memory_format=torch.channels_last)
        # A layer inside a step is read by a hook; thread-local, so that one extractor may serve several threads.
        self._inner = threading.local()
        inner = [layer for layer in self.layers if layer not in self._step_names]
        for layer in inner:
            named[layer].register_forward_hook(self._keep_inner(layer))
        self.feature_shapes = self._shapes(example, backbone)

    def _keep_inner(self, layer: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._inner.maps[layer] = output

        return hook

    def _shapes(self, example: torch.Tensor, backbone: Backbone) -> dict[str, tuple[int, int, int]]:
        """Return {layer: (C, H, W)} at the image size of the example."""
        maps = self(example)
        for layer, output in maps.items():
            if not isinstance(output, torch.Tensor) or output.ndim != 4:
                found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
                good = f", for example {' and '.join(backbone.good_layers)}" if backbone.good_layers else ""
                raise ConfigurationError(
                    f"layer {layer!r} of {backbone.name!r} gives {found}, expected a feature map [B, C, H, W]: "
                    f"choose another layer{good}"
                )
        return {layer: (m.shape[1], m.shape[2], m.shape[3]) for layer, m in maps.items()}

    @torch.no_grad()  # not inference_mode: a flow trained on these maps saves them for its backward pass
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the feature maps.

        Args:
            images: uint8 or float [B, 3, S, S], RGB in [0, 255].

        Returns:
            {layer: float32 [B, C, H, W]}, in the order of `layers`.
        """
        x = images.to(self.mean.device, torch.float32, memory_format=torch.channels_last)
        x = (x - self.mean) / self.std
        self._inner.maps = {}
        outputs: dict[str, torch.Tensor] = {}
        for name, step in zip(self._step_names, self.steps, strict=True):
            x = step(x)
            outputs[name] = x
        outputs.update(self._inner.maps)
        return {layer: outputs[layer] for layer in self.layers}


def build_extractor(config: BackboneConfig, imagesize: int) -> FeatureExtractor:
    """Load a backbone with its weights and cut it down to the layers of the configuration.

    Raises:
        ConfigurationError: Backbone, weights or layers are unknown or do not fit.
    """
    backbone = load_backbone(config.name, config.weights, config.seed)
    return FeatureExtractor(backbone, config.layers, config.normalization, imagesize)


def _needed_chain(module: nn.Module, example: torch.Tensor, layers: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Return the modules to run one after another, named as seen from `module`, up to the last of `layers`.

    A child belongs to the chain while its input is the very tensor that the child before gave. Outputs inside
    the chain are those of the whole network, even if `module` goes on to do more with them (a skip connection).
    """
    chain: list[tuple[str, nn.Module, torch.Tensor]] = []
    current = example
    for name, child, first_input, output in _watch_children(module, example):
        if first_input is not current:
            break
        chain.append((name, child, first_input))
        current = output
    holders = {layer: [i for i, (name, _, _) in enumerate(chain) if _holds(name, layer)] for layer in layers}
    if not all(holders.values()):
        return [("", module)]  # no chain up to the last layer: run this module whole
    last = max(max(indices) for indices in holders.values())
    steps = [(name, child) for name, child, _ in chain[:last]]
    name, child, child_input = chain[last]
    inner = [layer.removeprefix(f"{name}.") for layer in layers if layer.startswith(f"{name}.")]
    if name in layers or not inner:
        return [*steps, (name, child)]
    deeper = _needed_chain(child, child_input, inner)
    return steps + [(f"{name}.{n}" if n else name, m) for n, m in deeper]


def _holds(name: str, layer: str) -> bool:
    return layer == name or layer.startswith(f"{name}.")


def _watch_children(module: nn.Module, example: torch.Tensor) -> list[tuple[str, nn.Module, Any, Any]]:
    """Run a module and return (name, child, first input, output) of its children in the order of their calls."""
    calls: list[tuple[str, nn.Module, Any, Any]] = []

    def watch(name: str) -> Any:
        def hook(child: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls.append((name, child, inputs[0] if len(inputs) == 1 else None, output))

        return hook

    handles = [child.register_forward_hook(watch(name)) for name, child in module.named_children()]
    try:
        module(example)
    finally:
        for handle in handles:
            handle.remove()
    return calls

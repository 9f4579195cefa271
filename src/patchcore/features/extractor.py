"""Feature maps of chosen layers of a frozen backbone, running nothing behind the last of them."""

from __future__ import annotations

import copy
import itertools
import logging
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patchcore.configs import BackboneConfig, near_matches
from patchcore.errors import ConfigurationError
from patchcore.features.backbones import IMAGENET_MEAN, IMAGENET_STD, Backbone, backbone_entry, load_backbone
from patchcore.features.folding import holds, run_hooked, without_batch_norms, work_in_place
from patchcore.features.tokens import MapLayout, block_aliases, map_layout, require_imagesize
from patchcore.runtime import PRECISION_TYPES

LOGGER = logging.getLogger(__name__)


class FeatureExtractor(nn.Module):
    """Images to feature maps.

    The forward pass of most convolutional networks is a chain of modules, each fed with the output of the one
    before. The chain is found by watching one forward pass; it is followed into the module that holds the last
    layer needed, and everything behind is dropped. Where a network is no chain up to its last layer, as in a ViT,
    which adds position embeddings between its modules, the remaining part runs as its own code does, but without
    the modules that it first calls behind that layer; if it does not run without them, it runs whole. The result
    does not depend on the order of the layers.

    A map is the output of the layer itself: that of a transformer block is the residual stream, without the norm
    that ends the network. Tokens become a grid, row by row; class, distillation and register tokens are dropped.

    Args:
        backbone: Network with weights; one that is made for one image size (ViT, Swin), made for `imagesize`.
        layers: Names of modules (as in `named_modules`) that give feature maps. `blocks.N` is the N-th block of a
            transformer, from 0, also where blocks stand in stages.
        normalization: "imagenet" for every backbone alike, or "backbone" for its own mean and std.
        imagesize: Side of the images, px.

    Raises:
        ConfigurationError: A layer is unknown, or the network does not run or gives no feature map there at this
            image size.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, backbone: Backbone, layers: Sequence[str], normalization: str, imagesize: int) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.weights = backbone.weights
        self._modules_of = _resolve_layers(backbone.name, backbone.module, layers)
        require_imagesize(backbone.name, backbone.module, imagesize)
        own = (backbone.mean, backbone.std)
        mean, std = own if normalization == "backbone" else (IMAGENET_MEAN, IMAGENET_STD)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        with torch.inference_mode(False), torch.no_grad():  # versions of tensors are counted outside inference alone
            example = torch.zeros(1, 3, imagesize, imagesize)
            try:
                network, activations = without_batch_norms(backbone.module, example, set(self._modules_of.values()))
                steps = _needed_chain(network, example, list(self._modules_of.values()))
            except (RuntimeError, AssertionError) as error:
                raise ConfigurationError(
                    f"backbone {backbone.name!r} does not run on images of {imagesize} px "
                    f"({' '.join(str(error).split())[:120]}): choose another --imagesize or backbone"
                ) from error
        self.autocast_dtype: torch.dtype | None = None  # float32 throughout
        self._step_names = [name for name, _ in steps]
        work_in_place(activations)
        self.steps = nn.ModuleList([module for _, module in steps]).to(memory_format=torch.channels_last)
        # A layer inside a step is read by a hook; thread-local, so that one extractor may serve several threads.
        self._inner = threading.local()
        named = dict(network.named_modules())
        for name in set(self._modules_of.values()) - set(self._step_names):
            named[name].register_forward_hook(self._keep_inner(name))
        outputs = self._run(example)
        self._layouts = self._find_layouts(outputs, backbone)
        self.feature_shapes = {layer: tuple(m.shape[1:]) for layer, m in self._maps(outputs).items()}

    def _keep_inner(self, layer: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            maps = getattr(self._inner, "maps", None)
            if maps is not None:  # else another extractor of the same backbone is running
                # A copy, because the block around the layer may add to its output in place.
                maps[layer] = output.clone() if isinstance(output, torch.Tensor) else output

        return hook

    def _find_layouts(self, outputs: Mapping[str, Any], backbone: Backbone) -> dict[str, MapLayout]:
        """Return {layer: where its output for one image has the feature map}."""
        layouts: dict[str, MapLayout] = {}
        for layer, name in self._modules_of.items():
            output = outputs.get(name)
            layout = map_layout(output, backbone.module)
            if layout is None:
                found: object = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
                if name not in outputs:
                    found = "no output, because the network never calls it"
                good = f", for example {' and '.join(backbone.good_layers)}" if backbone.good_layers else ""
                raise ConfigurationError(
                    f"layer {layer!r} of {backbone.name!r} gives {found}, expected a feature map [B, C, H, W]: "
                    f"choose another layer{good}"
                )
            layouts[layer] = layout
        return layouts

    def compute_in(self, precision: str) -> FeatureExtractor:
        """Choose the numbers of the network: "float32", "bf16" or "fp16", by autocast; maps are float32 always."""
        self.autocast_dtype = None if precision == "float32" else getattr(torch, PRECISION_TYPES[precision])
        return self

    @torch.no_grad()  # not inference_mode: a flow trained on these maps saves them for its backward pass
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the feature maps.

        Args:
            images: uint8 or float [B, 3, S, S], RGB in [0, 255].

        Returns:
            {layer: float32 [B, C, H, W]}, in the order of `layers`.
        """
        if self.autocast_dtype is None:
            return self._maps(self._run(images))
        with torch.autocast(self.mean.device.type, self.autocast_dtype):
            outputs = self._run(images)
        return {layer: feature_map.float() for layer, feature_map in self._maps(outputs).items()}

    def _maps(self, outputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {layer: self._layouts[layer].feature_map(outputs[name]) for layer, name in self._modules_of.items()}

    @torch.no_grad()
    def _run(self, images: torch.Tensor) -> dict[str, Any]:
        """Return the outputs of every step and inner layer by name."""
        device = self.mean.device  # only CUDA waits for a copy before the memory is used again
        x = images.to(device, torch.float32, non_blocking=device.type == "cuda", memory_format=torch.channels_last)
        x = (x - self.mean) / self.std
        inner_maps: dict[str, Any] = {}
        self._inner.maps = inner_maps
        outputs: dict[str, Any] = {}
        try:
            for name, step in zip(self._step_names, self.steps, strict=True):
                x = step(x)
                outputs[name] = x
        finally:  # a pass that runs out of memory must not keep its maps
            self._inner.maps = None
        return outputs | inner_maps


def _resolve_layers(backbone: str, network: nn.Module, layers: Sequence[str]) -> dict[str, str]:
    """Return {layer: the name of its module}.

    Raises:
        ConfigurationError: The backbone has no such layer; the message has near matches or the range of numbers.
    """
    known = block_aliases(network) | {name: name for name, _ in network.named_modules() if name}
    for layer in layers:
        if layer not in known:
            raise ConfigurationError(f"backbone {backbone!r} has no layer {layer!r}: {_near_layers(layer, known)}")
    return {layer: known[layer] for layer in layers}


def _near_layers(layer: str, known: Iterable[str]) -> str:
    """Say which layers a mistyped one may mean."""
    container, _, number = layer.rpartition(".")
    siblings = [name for name in known if re.fullmatch(rf"{re.escape(container)}\.\d+", name)]
    if siblings and number.isdecimal():
        numbers = sorted(int(name.rpartition(".")[2]) for name in siblings)
        return f"{container}.{numbers[0]} to {container}.{numbers[-1]} exist"
    return near_matches(layer, [name for name in known if name.count(".") <= max(1, layer.count("."))])


def build_extractor(config: BackboneConfig, imagesize: int) -> FeatureExtractor:
    """Load a backbone with its weights and cut it down to the layers of the configuration.

    Raises:
        ConfigurationError: Backbone, weights, layers or image size are unknown or do not fit.
    """
    with torch.device("meta"):  # only for its names: a mistyped layer must not cost a download
        outline = backbone_entry(config.name).build(False)
    _resolve_layers(config.name, outline, config.layers)
    require_imagesize(config.name, outline, imagesize)
    backbone = load_backbone(config.name, config.weights, config.seed, imagesize)
    return FeatureExtractor(backbone, config.layers, config.normalization, imagesize)


@dataclass(frozen=True)
class _Call:
    """One call of a child module.

    Attributes:
        name: Name of the child.
        module: The child.
        given: Its input; None where it had more than one, or another kind of input.
        output: What it returned.
        given_version: How often `given` had been changed in place before the call.
        output_version: The same of `output` when it was returned.
        kept: Whether the call left its input unchanged.
    """

    name: str
    module: nn.Module
    given: torch.Tensor | None
    output: Any
    given_version: int
    output_version: int
    kept: bool


def _needed_chain(module: nn.Module, example: torch.Tensor, layers: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Return the modules to run one after another, named as seen from `module`, up to the last of `layers`.

    A child belongs to the chain while its input is the very tensor that the child before gave, unchanged.
    Outputs inside the chain are those of the whole network, even if `module` goes on to do more with them (a skip
    connection). A layer that is called again behind the chain counts with its last call, as a hook on the whole
    network would see it.
    """
    calls = _watch_children(module, example)
    chain = _leading_chain(calls, example)
    holders = {layer: [i for i, call in enumerate(chain) if holds(call.name, layer)] for layer in layers}
    called_again = any(holds(call.name, layer) for call in calls[len(chain) :] for layer in layers)
    if called_again or not all(holders.values()):
        return [("", _without_later_modules(module, example, layers))]  # no chain up to the last layer
    last = max(max(indices) for indices in holders.values())
    steps = [(call.name, call.module) for call in chain[:last]]
    name, child, child_input = chain[last].name, chain[last].module, chain[last].given
    inner = [layer.removeprefix(f"{name}.") for layer in layers if layer.startswith(f"{name}.")]
    if name in layers or child_input is None:
        return [*steps, (name, child)]
    deeper = _needed_chain(child, child_input, inner)
    return steps + [(f"{name}.{n}" if n else name, m) for n, m in deeper]


class _Skipped(nn.Module):
    """Stands in for a module whose result nobody needs, whatever its arguments are."""

    def forward(self, x: Any, *_: Any, **__: Any) -> Any:
        return x


# What a forward pass may raise when it goes on with what `_Skipped` gave instead of the real thing.
_MISFITS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)


def _without_later_modules(module: nn.Module, example: torch.Tensor, layers: Sequence[str]) -> nn.Module:
    """Return a module without the parts that it first calls after the last of `layers` has returned.

    The copy shares the parts that are left and their weights. What comes before is untouched, so that the layers
    give what they gave. Returned unchanged where a layer is never called, or the rest does not run without the parts.
    """
    first_called, last_returned = _watch_order(module, example)
    if not set(layers) <= set(last_returned):
        return module
    end = max(last_returned[layer] for layer in layers)
    shortened = _with_skipped(module, "", {name for name, time in first_called.items() if time > end})
    try:
        shortened(example)
    except _MISFITS as error:
        LOGGER.debug("the network runs whole, beyond its last layer: without the rest it does not run (%s)", error)
        return module
    return shortened


def _watch_order(module: nn.Module, example: torch.Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Run a module and return {part: when it was first called} and {part: when it last returned}."""
    clock = itertools.count()
    first_called: dict[str, int] = {}
    last_returned: dict[str, int] = {}

    def entering(name: str) -> Any:
        def enter(part: nn.Module, inputs: Any) -> None:
            first_called.setdefault(name, next(clock))

        return enter

    def leaving(name: str) -> Any:
        def leave(part: nn.Module, inputs: Any, output: Any) -> None:
            last_returned[name] = next(clock)

        return leave

    handles = []
    for name, part in module.named_modules():
        if name:
            handles.append(part.register_forward_pre_hook(entering(name)))
            handles.append(part.register_forward_hook(leaving(name)))
    run_hooked(module, example, handles)
    return first_called, last_returned


def _with_skipped(module: nn.Module, name: str, later: set[str]) -> nn.Module:
    """Return a copy of a module in which the parts named in `later` are skipped, or itself where it has none."""
    parts = {key: f"{name}.{key}" if name else key for key in module._modules}
    if not any(part == other or other.startswith(f"{part}.") for part in parts.values() for other in later):
        return module
    clone = copy.copy(module)  # keeps parameters, buffers and hooks
    clone._modules = {
        key: _Skipped() if part in later else None if child is None else _with_skipped(child, part, later)
        for (key, child), part in zip(module._modules.items(), parts.values(), strict=True)
    }
    return clone


def _leading_chain(calls: Sequence[_Call], example: torch.Tensor) -> list[_Call]:
    """Return the first calls, as far as each was given exactly what the one before returned."""
    chain: list[_Call] = []
    current, version = example, example._version
    for call in calls:
        if call.given is not current or call.given_version != version or not call.kept:
            break
        chain.append(call)
        if not isinstance(call.output, torch.Tensor):
            break
        current, version = call.output, call.output_version
    return chain


def _watch_children(module: nn.Module, example: torch.Tensor) -> list[_Call]:
    """Run a module and return the calls of its children in their order."""
    calls: list[_Call] = []
    versions: list[int] = []

    def before(child: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        versions.append(_version(inputs[0]) if inputs else 0)

    def watch(name: str) -> Any:
        def after(child: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            alone = len(inputs) == 1 and not keywords and isinstance(inputs[0], torch.Tensor)
            version = versions.pop()
            kept = alone and _version(inputs[0]) == version
            calls.append(_Call(name, child, inputs[0] if alone else None, output, version, _version(output), kept))

        return after

    handles = []
    for name, child in module.named_children():
        handles.append(child.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(child.register_forward_hook(watch(name), with_kwargs=True))
    run_hooked(module, example, handles)
    return calls


def _version(value: Any) -> int:
    """Return how often a tensor has been changed in place."""
    return value._version if isinstance(value, torch.Tensor) else 0

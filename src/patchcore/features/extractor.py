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
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.hooks import RemovableHandle

from patchcore.configs import BackboneConfig, near_matches
from patchcore.errors import ConfigurationError
from patchcore.features.backbones import IMAGENET_MEAN, IMAGENET_STD, Backbone, backbone_entry, load_backbone
from patchcore.features.tokens import MapLayout, block_aliases, map_layout, require_imagesize

LOGGER = logging.getLogger(__name__)

FOLDING_TOLERANCE = 1e-4  # of a layer's largest value: rounding through dozens of layers, and no more


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
        self._modules_of = _resolve_layers(backbone.name, backbone.module, layers)
        require_imagesize(backbone.name, backbone.module, imagesize)
        own = (backbone.mean, backbone.std)
        mean, std = own if normalization == "backbone" else (IMAGENET_MEAN, IMAGENET_STD)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        with torch.inference_mode(False), torch.no_grad():  # versions of tensors are counted outside inference alone
            example = torch.zeros(1, 3, imagesize, imagesize)
            try:
                network = _without_batch_norms(backbone.module, example, set(self._modules_of.values()))
                steps = _needed_chain(network, example, list(self._modules_of.values()))
            except (RuntimeError, AssertionError) as error:
                raise ConfigurationError(
                    f"backbone {backbone.name!r} does not run on images of {imagesize} px "
                    f"({' '.join(str(error).split())[:120]}): choose another --imagesize or backbone"
                ) from error
        self._step_names = [name for name, _ in steps]
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

    @torch.no_grad()  # not inference_mode: a flow trained on these maps saves them for its backward pass
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the feature maps.

        Args:
            images: uint8 or float [B, 3, S, S], RGB in [0, 255].

        Returns:
            {layer: float32 [B, C, H, W]}, in the order of `layers`.
        """
        return self._maps(self._run(images))

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
    holders = {layer: [i for i, call in enumerate(chain) if _holds(call.name, layer)] for layer in layers}
    called_again = any(_holds(call.name, layer) for call in calls[len(chain) :] for layer in layers)
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


def _without_batch_norms(module: nn.Module, example: torch.Tensor, layers: set[str]) -> nn.Module:
    """Return a network whose frozen batch norms are part of the convolutions before them.

    The copy shares all other modules and weights. Only a norm that is fed with exactly what a convolution gave, each
    of them called once and neither of them asked for as a layer, is folded. A network that uses the output of such a
    convolution elsewhere as well would change; it is noticed by comparing the layers, and left as it is.
    """
    pairs = _foldable_norms(module, example, layers)
    if not pairs:
        return module
    replaced: dict[str, nn.Module] = {}
    for conv, norm in pairs.items():
        convolution, batch_norm = module.get_submodule(conv), module.get_submodule(norm)
        assert isinstance(convolution, nn.Conv2d) and isinstance(batch_norm, nn.BatchNorm2d)
        replaced[conv] = fuse_conv_bn_eval(convolution, batch_norm).requires_grad_(False)
        replaced[norm] = _activation_of(batch_norm)
    folded = _with_replaced(module, "", replaced)
    probe = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
    expected, found = (_layer_outputs(network, probe, layers) for network in (module, folded))
    same = all(
        torch.allclose(found[name], output, rtol=0, atol=FOLDING_TOLERANCE * float(output.abs().max()))
        for name, output in expected.items()
    )
    return folded if same else module


def _activation_of(norm: nn.BatchNorm2d) -> nn.Module:
    """Return what a batch norm does besides: nothing, but for those of timm that contain an activation."""
    activation = getattr(norm, "act", None)
    return activation if isinstance(activation, nn.Module) else nn.Identity()


def _foldable_norms(module: nn.Module, example: torch.Tensor, layers: set[str]) -> dict[str, str]:
    """Return {convolution: the batch norm that is fed with its output} by name."""
    produced: dict[int, tuple[str, torch.Tensor, int]] = {}  # holds the tensors, so that no address is used again
    pairs: dict[str, str] = {}
    calls: dict[str, int] = {}

    def watch(name: str) -> Any:
        def after(part: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(part, nn.Conv2d):
                produced[id(output)] = name, output, output._version
            elif inputs and (given := produced.get(id(inputs[0]))) is not None and given[2] == inputs[0]._version:
                pairs[given[0]] = name

        return after

    convolutions = {name: part for name, part in module.named_modules() if isinstance(part, nn.Conv2d)}
    norms = {
        name: part for name, part in module.named_modules() if isinstance(part, nn.BatchNorm2d) and not part.training
    }
    if not norms:
        return {}
    handles = [part.register_forward_hook(watch(name)) for name, part in (convolutions | norms).items()]
    _run_hooked(module, example, handles)
    fed = list(pairs.values())
    return {
        conv: norm
        for conv, norm in pairs.items()
        if calls[conv] == calls[norm] == fed.count(norm) == 1
        and not any(_holds(conv, layer) or _holds(norm, layer) for layer in layers)
    }


def _layer_outputs(module: nn.Module, images: torch.Tensor, layers: set[str]) -> dict[str, torch.Tensor]:
    """Run a network and return a copy of the last output of each layer that gives a tensor."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(part: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                outputs[name] = output.clone()

        return hook

    handles = [part.register_forward_hook(keep(name)) for name, part in module.named_modules() if name in layers]
    _run_hooked(module, images, handles)
    return outputs


def _with_replaced(module: nn.Module, name: str, replaced: Mapping[str, nn.Module]) -> nn.Module:
    """Return a copy of a module in which the named parts are others, or itself where it has none of them."""
    if name in replaced:
        return replaced[name]
    if name and not any(_holds(name, other) for other in replaced):
        return module
    clone = copy.copy(module)  # keeps parameters, buffers and hooks
    clone._modules = {
        key: None if child is None else _with_replaced(child, f"{name}.{key}" if name else key, replaced)
        for key, child in module._modules.items()
    }
    return clone


def _run_hooked(module: nn.Module, images: torch.Tensor, handles: Iterable[RemovableHandle]) -> None:
    """Run a module for what its hooks see, and remove them."""
    try:
        module(images)
    finally:
        for handle in handles:
            handle.remove()


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
    _run_hooked(module, example, handles)
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


def _holds(name: str, layer: str) -> bool:
    return layer == name or layer.startswith(f"{name}.")


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
    _run_hooked(module, example, handles)
    return calls


def _version(value: Any) -> int:
    """Return how often a tensor has been changed in place."""
    return value._version if isinstance(value, torch.Tensor) else 0

"""Frozen networks with fewer passes over memory: batch norms inside the convolutions, activations in place."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.hooks import RemovableHandle

FOLDING_TOLERANCE = 1e-4  # of a layer's largest value: rounding through dozens of layers, and no more


def without_batch_norms(
    module: nn.Module, example: torch.Tensor, layers: set[str]
) -> tuple[nn.Module, list[nn.Module]]:
    """Make a network whose frozen batch norms are part of the convolutions before them.

    The copy shares all other modules and weights. Only a norm that is fed with exactly what a convolution gave, each
    of them called once and neither of them asked for as a layer, is folded. An activation that is fed with what such
    a norm gave may work in place. A network that uses one of these outputs elsewhere as well would change; that is
    noticed by comparing the layers, and left as it is.

    Args:
        module: Network in evaluation mode.
        example: float [1, 3, S, S].
        layers: Names of the modules whose outputs are asked for; nothing overwrites them.

    Returns:
        The network, or `module` itself; and those of its activations that `work_in_place` may be called with.
    """
    pairs = _foldable_norms(module, example, layers)
    if not pairs:
        return module, []
    probe = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
    expected = _layer_outputs(module, probe, layers)
    for in_place in (_fed_activations(module, example, set(pairs.values()) - layers, layers), set[str]()):
        folded, activations = _folded(module, pairs, in_place)
        work_in_place(activations)
        found = _layer_outputs(folded, probe, layers)
        work_in_place(activations, False)
        if all(
            torch.allclose(found[name], output, rtol=0, atol=FOLDING_TOLERANCE * float(output.abs().max()))
            for name, output in expected.items()
        ):
            return folded, activations
    return module, []


def work_in_place(activations: Iterable[nn.Module], yes: bool = True) -> None:
    """Let activations overwrite what they are given, or not: whoever watches tensors wants each of them by itself."""
    for activation in activations:
        activation.inplace = yes  # type: ignore[assignment]  # all of them call it so


def _folded(module: nn.Module, pairs: Mapping[str, str], in_place: set[str]) -> tuple[nn.Module, list[nn.Module]]:
    """Return a copy with the norms of {convolution: norm} folded, and its own copies of the named activations."""
    activations = {name: copy.copy(module.get_submodule(name)) for name in in_place}
    replaced = dict(activations)
    for conv, norm in pairs.items():
        convolution, batch_norm = module.get_submodule(conv), module.get_submodule(norm)
        assert isinstance(convolution, nn.Conv2d) and isinstance(batch_norm, nn.BatchNorm2d)
        replaced[conv] = fuse_conv_bn_eval(convolution, batch_norm).requires_grad_(False)
        # What a batch norm does besides: nothing, but for those of timm that contain an activation.
        activation = activations.get(f"{norm}.act", getattr(batch_norm, "act", None))
        replaced[norm] = activation if isinstance(activation, nn.Module) else nn.Identity()
    return _with_replaced(module, "", replaced), list(activations.values())


def _fed_activations(module: nn.Module, example: torch.Tensor, norms: set[str], layers: set[str]) -> set[str]:
    """Return the activations that know how to work in place, and at each call get what one of the norms gave.

    The tensor may have been added to in place since, as at the end of a block. It must not be what a layer gave: a
    container that ends in a norm returns the norm's own tensor.
    """
    produced: dict[int, torch.Tensor] = {}  # holds the tensors, so that no address is used again
    asked_for: dict[int, torch.Tensor] = {}
    fed: dict[str, bool] = {}

    def keep_layer(part: nn.Module, inputs: Any, output: Any) -> None:
        asked_for[id(output)] = output

    def keep(part: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        produced[id(output)] = output

    def watch(name: str) -> Any:
        def before(part: nn.Module, inputs: tuple[Any, ...]) -> None:
            given = id(inputs[0]) if inputs else None
            fed[name] = fed.get(name, True) and given in produced and given not in asked_for

        return before

    parts = dict(module.named_modules())
    inside = {f"{norm}.act" for norm in norms}  # fed with what the norm itself computes
    handles = [parts[norm].register_forward_hook(keep) for norm in norms]
    handles += [parts[layer].register_forward_hook(keep_layer) for layer in layers]
    able = {name for name, part in parts.items() if getattr(part, "inplace", None) is False} - layers
    handles += [parts[name].register_forward_pre_hook(watch(name)) for name in able - inside]
    run_hooked(module, example, handles)
    return {name for name, always in fed.items() if always} | (able & inside)


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
    run_hooked(module, example, handles)
    fed = list(pairs.values())
    return {
        conv: norm
        for conv, norm in pairs.items()
        if calls[conv] == calls[norm] == fed.count(norm) == 1
        and not any(holds(conv, layer) or holds(norm, layer) for layer in layers)
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
    run_hooked(module, images, handles)
    return outputs


def _with_replaced(module: nn.Module, name: str, replaced: Mapping[str, nn.Module]) -> nn.Module:
    """Return a copy of a module in which the named parts are others, or itself where it has none of them."""
    if name in replaced:
        return replaced[name]
    if name and not any(holds(name, other) for other in replaced):
        return module
    clone = copy.copy(module)  # keeps parameters, buffers and hooks
    clone._modules = {
        key: None if child is None else _with_replaced(child, f"{name}.{key}" if name else key, replaced)
        for key, child in module._modules.items()
    }
    return clone


def run_hooked(module: nn.Module, images: torch.Tensor, handles: Iterable[RemovableHandle]) -> None:
    """Run a module for what its hooks see, and remove them."""
    try:
        module(images)
    finally:
        for handle in handles:
            handle.remove()


def holds(name: str, layer: str) -> bool:
    return layer == name or layer.startswith(f"{name}.")

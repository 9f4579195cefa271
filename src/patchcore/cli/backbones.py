"""What is typed for backbones: names with seeds, layers with the number of their backbone, weights."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import click

from patchcore.configs import BackboneConfig
from patchcore.errors import ConfigurationError


def typed_backbones(
    names: Sequence[str], layers: Sequence[str], weights: Sequence[str], normalization: str
) -> list[tuple[BackboneConfig, int | None]]:
    """Combine the options of one or several backbones.

    Args:
        names: Of each -b, with `.seed-N` behind it or not.
        layers: Of each -le; with several backbones, the number of the backbone and a dot before it.
        weights: Of each --weights: none, one for all backbones or one for each.
        normalization: As in BackboneConfig.

    Returns:
        Each backbone, and the seed typed for it or None. The seed also draws random weights.

    Raises:
        click.UsageError: Names, layers and weights do not fit one another.
    """
    if not names:
        raise click.UsageError("no backbone named, expected one -b, for example -b wideresnet50 -le layer2 -le layer3")
    chosen = _weights_of_each(weights, len(names))
    backbones = []
    for name, own_layers, own_weights in zip(names, _layers_of_each(layers, names), chosen, strict=True):
        plain_name, seed = _name_and_seed(name)
        random_seed = seed if own_weights == "random" and seed is not None else 0  # other weights are drawn by no seed
        backbones.append((BackboneConfig(plain_name, own_layers, own_weights, normalization, random_seed), seed))
    return backbones


def _name_and_seed(name: str) -> tuple[str, int | None]:
    """Split `wideresnet50.seed-3`."""
    plain, separator, number = name.partition(".seed-")
    if separator and not re.fullmatch(r"[0-9]{1,18}", number):
        raise click.UsageError(f"-b {name}: found the seed {number!r}, expected a whole number, as in {plain}.seed-3")
    return plain, int(number) if separator else None


def _layers_of_each(layers: Sequence[str], names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the layers of each backbone."""
    if len(names) == 1:
        return [tuple(layers)]
    of_each: list[list[str]] = [[] for _ in names]
    for layer in layers:
        number, _, own_name = layer.partition(".")
        if not (re.fullmatch(r"[0-9]{1,4}", number) and int(number) < len(names) and own_name):
            raise click.UsageError(
                f"-le {layer}: with {len(names)} backbones a layer begins with the number of its backbone, "
                f"0 to {len(names) - 1}, as in 0.layer2"
            )
        of_each[int(number)].append(own_name)
    for position, (name, own) in enumerate(zip(names, of_each, strict=True)):
        if not own:
            raise click.UsageError(
                f"backbone {position} ({name}) has no layer: name at least one, as in -le {position}.LAYER"
            )
    return [tuple(own) for own in of_each]


def _weights_of_each(weights: Sequence[str], num_backbones: int) -> list[str]:
    """Return the weights of each backbone."""
    if len(weights) not in (0, 1, num_backbones):
        raise click.UsageError(
            f"{len(weights)} --weights for {num_backbones} backbone(s), expected none, one for all, or one for each -b"
        )
    typed = list(weights) * (num_backbones if len(weights) == 1 else 1) or ["pretrained"] * num_backbones
    return [absolute_weights(w) for w in typed]


def absolute_weights(typed: str) -> str:
    """Return the weights of a backbone, a path absolute: a model must find them from any working directory."""
    if not typed:
        raise ConfigurationError("--weights is empty, expected pretrained, random or a path: an unset variable?")
    return typed if typed in ("pretrained", "random") else os.path.abspath(typed)

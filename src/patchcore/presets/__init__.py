"""Hyperparameters per backbone and class, as data files that a researcher edits.

`fastflow.json` holds {backbone: {class: settings}}; the class "default" stands for all that are not named. Each entry
says in `source` where its values come from. A setting is a field of the method's configuration or of its training.

Our own values were developed on efficientnet_lite0, without a look at test images; efficientnet_lite1 and
efficientnet_lite2, its larger siblings, take them over as they are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchcore.config_json import config_from_dict, config_to_dict
from patchcore.configs import (
    BackboneConfig,
    FastFlowConfig,
    PostProcessingConfig,
    TrainingConfig,
    near_matches,
)
from patchcore.errors import ConfigurationError

DEFAULT_CLASS = "default"
SOURCES = ("inherited, chosen on test results", "ours")
FASTFLOW_FILE = Path(__file__).with_name("fastflow.json")
BACKBONES_FILE = Path(__file__).with_name("fastflow_backbones.json")
NO_SETTINGS = ("backbone", "tiles")  # what a preset is looked up by, and what it has no say in
PARTS = {"training": TrainingConfig, "post_processing": PostProcessingConfig}  # fields whose own fields are settings

EXAMPLE = FastFlowConfig(BackboneConfig("any", ("any",)))


@dataclass(frozen=True)
class Preset:
    """Settings of one backbone and class.

    Attributes:
        backbone: Name of the backbone.
        category: Class it was made for, or "default".
        settings: Fields of the configuration or of its training, with their values.
        source: Where the values come from: one of SOURCES.
    """

    backbone: str
    category: str
    settings: Mapping[str, Any]
    source: str


@dataclass(frozen=True)
class FastFlowBackbone:
    """How FastFlow uses a backbone.

    Attributes:
        name: Name in the table of backbones.
        layers: Layers that get a flow when none is typed; empty where a user has to choose.
        input_size: Side of the images that the backbone is made for, px; None where it takes any.
    """

    name: str
    layers: tuple[str, ...]
    input_size: int | None


def fastflow_backbone(name: str, file: Path = BACKBONES_FILE) -> FastFlowBackbone:
    """Look up layers and input size of a backbone; one that the file does not name is used as it is typed.

    Raises:
        ConfigurationError: The file is damaged.
    """
    known = _read_object(file)
    if name not in known:
        return FastFlowBackbone(name, (), None)
    return config_from_dict(FastFlowBackbone, known[name], f"{file.name}: {name}")


def fastflow_backbone_names(file: Path = BACKBONES_FILE) -> tuple[str, ...]:
    """Return the backbones that the file names."""
    return tuple(_read_object(file))


def fastflow_preset(backbone: str, category: str, file: Path = FASTFLOW_FILE) -> Preset:
    """Return the preset of a class, or the backbone's default where the class has none of its own.

    Raises:
        ConfigurationError: The backbone has no presets, or the file is damaged.
    """
    presets = read_presets(file)
    if backbone not in presets:
        raise ConfigurationError(
            f"no presets for backbone {backbone!r} ({near_matches(backbone, presets)}): leave --use_class_specific out"
        )
    of_backbone = presets[backbone]
    if category not in of_backbone and DEFAULT_CLASS not in of_backbone:
        raise ConfigurationError(
            f"backbone {backbone!r} has neither a preset of class {category!r} nor a default one: add it to "
            f"{file.name}, or leave --use_class_specific out"
        )
    return of_backbone.get(category) or of_backbone[DEFAULT_CLASS]


def read_presets(file: Path) -> dict[str, dict[str, Preset]]:
    """Read all presets of a file, by backbone and class.

    Raises:
        ConfigurationError: The file is missing or no JSON, or an entry holds an unknown name or a wrong value.
    """
    presets: dict[str, dict[str, Preset]] = {}
    for backbone, classes in _read_object(file).items():
        presets[backbone] = {}
        for category, entry in _object(classes, f"{file.name}: {backbone}").items():
            where = f"{file.name}: {backbone}.{category}"
            settings = dict(_object(entry, where))
            source = settings.pop("source", None)
            if source not in SOURCES:
                raise ConfigurationError(f"{where}: source is {source!r}, expected one of {', '.join(SOURCES)}")
            try:
                with_settings(EXAMPLE, settings, where)  # finds unknown names and wrong values
            except ConfigurationError as error:  # of a value out of range, the option alone
                told = str(error)
                raise ConfigurationError(told if told.startswith(where) else f"{where}: {told}") from error
            presets[backbone][category] = Preset(backbone, category, settings, source)
    return presets


def _read_object(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"presets {str(file)!r} cannot be read ({error}): mend or restore the file") from error
    return _object(content, file.name)


def _object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{where}: found {type(value).__name__}, expected an object")
    return value


def with_settings(config: FastFlowConfig, settings: Mapping[str, Any], where: str = "settings") -> FastFlowConfig:
    """Return a configuration with some fields replaced; the later of two calls wins.

    Args:
        config: What holds where `settings` says nothing.
        settings: Fields of the configuration or of its training, by name.
        where: Name of the settings, for messages.

    Raises:
        ConfigurationError: A name is unknown, or a value of another type or out of range.
    """
    own_names = {f.name for f in dataclasses.fields(config)} - {*NO_SETTINGS, *PARTS}
    part_of = {f.name: part for part, cls in PARTS.items() for f in dataclasses.fields(cls)}
    merged = config_to_dict(config)
    for name, value in settings.items():
        if name not in own_names and name not in part_of:
            raise ConfigurationError(f"{where}: unknown name {name!r}: {near_matches(name, own_names | set(part_of))}")
        target = merged if name in own_names else merged[part_of[name]]
        target[name] = value
    return config_from_dict(FastFlowConfig, merged, where)

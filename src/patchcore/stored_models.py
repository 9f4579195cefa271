"""The stored models of a call: what they say of themselves, whether that agrees with what was typed, whose they are.

The configuration of a model rules. What was typed beside its path has to agree with it, describes it where it says
nothing of itself, or replaces what no result depends on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from patchcore.config_json import config_to_dict
from patchcore.configs import (
    PreprocessingConfig,
    RuntimeConfig,
    TrainingSource,
)
from patchcore.configs.typed import ANY_VALUE, TypedSetting, shown_value
from patchcore.detector import DetectorBuilder
from patchcore.errors import ConfigurationError
from patchcore.prediction import StoredModel, prepare_stored, read_header, stored_config, warn_unverified
from patchcore.runtime import progress
from patchcore.storage.model_folder import FORMAT_VERSION, ModelHeader

LOGGER = logging.getLogger(__name__)

RESIZE = ("preprocessing", "resize_px")


@dataclass(frozen=True)
class TypedModel:
    """What was typed of stored models besides where they are.

    Attributes:
        settings: What has to agree with the models.
        overrides: What replaces the value of the models: settings that change no result, only how it comes about.
        describe: Header of a bare state dict of a class; None where what was typed does not describe one.
    """

    settings: tuple[TypedSetting, ...] = ()
    overrides: tuple[TypedSetting, ...] = ()
    describe: Callable[[str], ModelHeader] | None = None


def typed_header(
    method: str, config: dict[str, Any], preprocessing: PreprocessingConfig, dataset: str, category: str
) -> ModelHeader:
    """Return what a bare state dict does not say of itself; it has no calibration."""
    return ModelHeader(FORMAT_VERSION, method, config, preprocessing, TrainingSource(dataset, category))


def match_models(
    model_paths: Sequence[str], methods: Sequence[str], typed: TypedModel, categories: Sequence[str]
) -> dict[str, tuple[Path, ModelHeader]]:
    """Find the model of each class.

    Args:
        model_paths: Model folders, exports or bare state dicts.
        methods: The methods the models may be of.
        typed: What was typed of the models.
        categories: Classes to evaluate; empty for those of the models.

    Returns:
        Path and header of the model of each class; all have the same preprocessing.

    Raises:
        ConfigurationError: A model cannot be read, contradicts what was typed or the other models, or has no partner.
    """
    if not all(path.strip() for path in model_paths):
        raise ConfigurationError("found an empty path, expected that of a model: is a variable of a script not set?")
    repeated = sorted({path for path in model_paths if model_paths.count(path) > 1})
    if repeated:
        raise ConfigurationError(f"model {repeated[0]!r} is named twice: name each -p once")
    headers: dict[Path, ModelHeader] = {}
    for path, header in _read_headers([Path(path) for path in model_paths], typed, categories).items():
        if header.method not in methods:
            raise ConfigurationError(
                f"model {str(path)!r} is of method {header.method!r}, expected {' or '.join(methods)}"
            )
        headers[path] = _agreed(path, header, typed)
    _require_same_preprocessing(headers)
    return {category: (path, headers[path]) for category, path in _by_category(headers, categories).items()}


def _read_headers(paths: Sequence[Path], typed: TypedModel, categories: Sequence[str]) -> dict[Path, ModelHeader]:
    """Read what each model says of itself; what was typed describes a bare state dict, of the class at its place."""
    headers: dict[Path, ModelHeader] = {}
    preprocessing = {s.path[1]: s.value for s in typed.settings if s.path[0] == "preprocessing"}
    for position, path in enumerate(paths):
        header = read_header(path, preprocessing)
        if header is None:
            if typed.describe is None or position >= len(categories):
                missing = "the options of its model, such as --backbone" if typed.describe is None else "its class (-d)"
                raise ConfigurationError(
                    f"{str(path)!r} is a bare state dict, which does not say what it belongs to: type {missing}"
                )
            header = typed.describe(categories[position])
        headers[path] = header
    warn_unverified(headers)
    return headers


def _agreed(path: Path, header: ModelHeader, typed: TypedModel) -> ModelHeader:
    """Return the header of a model with the overrides in their places.

    Raises:
        ConfigurationError: An option was typed with another value than the model's.
    """
    config = config_to_dict(stored_config(header, str(path)))  # with what older models do not name
    content = {"config": config, "preprocessing": config_to_dict(header.preprocessing)}
    keeps_shape = header.preprocessing.max_side_px is not None
    if keeps_shape:
        content["preprocessing"]["resize_mode"] = None
    for setting in typed.settings:
        if keeps_shape and setting.path == RESIZE:
            continue  # scripts type it for images of every kind
        stored = _stored(content, setting.path)
        if stored is None if setting.value is ANY_VALUE else stored != setting.value:
            raise _contradiction(setting, stored, path)
    for override in typed.overrides:
        for holder in _holders(content, override.path):
            if holder.get(override.path[-1]) is None:
                raise _contradiction(override, None, path)
            holder[override.path[-1]] = override.value
    return replace(header, config=content["config"])


def _contradiction(setting: TypedSetting, stored: Any, path: Path) -> ConfigurationError:
    found = "without it" if stored is None or stored is False else f"with {shown_value(stored)}"
    return ConfigurationError(
        f"{setting.shown} was typed, but model {str(path)!r} was trained {found}: leave {setting.option} out"
    )


def _part(content: Mapping[str, Any], path: Sequence[str]) -> Any:
    """Return the dictionary that holds a value; None where the model has no such part."""
    part: Any = content
    for name in path[:-1]:
        part = part.get(name) if isinstance(part, dict) else None
    return part


def _holders(content: Mapping[str, Any], path: Sequence[str]) -> list[dict[str, Any]]:
    """Return the dictionaries that hold a value: one, or that of each member of an ensemble."""
    part = _part(content, path)
    if not isinstance(part, dict):
        return [{}]
    return [part] if path[-1] in part or "members" not in part else list(part["members"])


def _stored(content: Mapping[str, Any], path: Sequence[str]) -> Any:
    """Return a value of a model, sequences as lists; None where the model has no such part."""
    part = _part(content, path)
    value = part.get(path[-1]) if isinstance(part, dict) else None
    return list(value) if isinstance(value, tuple) else value


def _require_same_preprocessing(headers: Mapping[Path, ModelHeader]) -> None:
    """Raise ConfigurationError if the models want different images."""
    (first_path, first), *others = headers.items()
    for path, header in others:
        if header.preprocessing != first.preprocessing:
            raise ConfigurationError(
                f"models {str(first_path)!r} and {str(path)!r} were trained with different resize or crop: "
                "evaluate them in two calls"
            )


def _by_category(headers: Mapping[Path, ModelHeader], categories: Sequence[str]) -> dict[str, Path]:
    """Return {category: model}, matched by the class stored in each model, by order where none is stored.

    Raises:
        ConfigurationError: A class has no model or two, or a model without a class has no partner.
    """
    models: dict[str, Path] = {}
    for position, (path, header) in enumerate(headers.items()):
        category = header.source.category
        if not category:
            if position >= len(categories):
                raise ConfigurationError(f"model {str(path)!r} stores no class: name it with a -d at the same place")
            category = categories[position]
        if category in models:
            raise ConfigurationError(f"models {str(models[category])!r} and {str(path)!r} are both of {category!r}")
        models[category] = path
    for category in categories:
        if category not in models:
            raise ConfigurationError(f"no model of class {category!r} among the -p, found {', '.join(models)}")
    for category in [c for c in models if categories and c not in categories]:
        LOGGER.warning("model %s is of class %s, which no -d names: left out", models[category], category)
    return {c: models[c] for c in (categories or models)}


def open_models(models: Mapping[str, tuple[Path, ModelHeader]], runtime: RuntimeConfig) -> dict[str, StoredModel]:
    """Read every model once, so that a damaged one is found before any work; models share equal backbones.

    Raises:
        ConfigurationError: A model is damaged, or needs something that is not there.
    """
    builders: dict[str, DetectorBuilder] = {}
    opened: dict[str, StoredModel] = {}
    for category, (path, header) in progress(models.items(), "models"):
        key = json.dumps([header.method, header.config], sort_keys=True)
        if key not in builders:
            builders[key] = prepare_stored(header, str(path), runtime)
        opened[category] = StoredModel(path, header, builders[key])
        opened[category].restore(torch.device("cpu"))  # dropped at once: all memory banks together may be large
    return opened

"""Configurations to JSON and back.

Reading checks names and types, so that an edited file is refused by field instead of failing later.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from patchcore.configs import near_matches
from patchcore.errors import ConfigurationError

C = TypeVar("C")


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as nested dictionaries of JSON values."""
    return dataclasses.asdict(config)


def config_from_dict(cls: type[C], mapping: object, where: str) -> C:
    """Build a configuration from JSON values, checking names and types.

    Args:
        cls: The dataclass to build.
        mapping: What the JSON file holds.
        where: Name of the file and part, for messages.

    Returns:
        An instance of `cls`.

    Raises:
        ConfigurationError: `mapping` is no object, or a name is unknown, missing or of another type.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigurationError(f"{where}: found {type(mapping).__name__}, expected an object")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in mapping:
        if name not in fields:
            raise ConfigurationError(f"{where}: unknown name {name!r}: {near_matches(str(name), fields)}")
    values = {name: _typed(hints[name], value, f"{where}.{name}") for name, value in mapping.items()}
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigurationError(f"{where}: {name!r} is missing")
    return cls(**values)


def _typed(hint: Any, value: object, where: str) -> Any:
    """Return `value` as the type that `hint` names, or raise ConfigurationError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        hint = next(a for a in arguments if a is not type(None))
        return _typed(hint, value, where)
    if dataclasses.is_dataclass(hint):
        return config_from_dict(typing.cast("type[Any]", hint), value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigurationError(f"{where}: found {type(value).__name__}, expected an object")
        return {name: _typed(arguments[1], v, f"{where}.{name}") for name, v in value.items()}
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise ConfigurationError(f"{where}: found {type(value).__name__}, expected a list")
        return origin(_typed(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise ConfigurationError(f"{where}: found {str(value)[:9]}..., larger than any float") from error
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigurationError(f"{where}: found {value!r}, expected {hint.__name__}")
    return value

"""What was typed: options for stored models, whose own configuration rules, and whole commands that train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from patchcore.configs.data import DatasetConfig
from patchcore.configs.run import RunConfig

ANY_VALUE = object()
"""The value of an option that agrees with every model that has the part named; one without it contradicts."""


@dataclass(frozen=True)
class TypedSetting:
    """An option that was typed for stored models.

    Attributes:
        option: As typed, such as "--flow_steps".
        path: Names that lead to its value in the header of a model, such as ("config", "training", "lr").
        value: The JSON value typed, or ANY_VALUE.
    """

    option: str
    path: tuple[str, ...]
    value: Any

    @property
    def shown(self) -> str:
        """The option with its value, as a user would type it."""
        is_flag = self.value is True or self.value is ANY_VALUE
        return self.option if is_flag else f"{self.option} {shown_value(self.value)}"


def shown_value(value: Any) -> str:
    """Return a JSON value as it would be typed."""
    if value is None:
        return "none"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


@dataclass(frozen=True)
class TypedRun:
    """A command that trains, as it was typed.

    Attributes:
        method: Name in the registry of detectors.
        config_of: Configuration of the method for a class.
        run: Where to write, seeds and outputs.
        dataset: What to read.
    """

    method: str
    config_of: Callable[[str], Any]
    run: RunConfig
    dataset: DatasetConfig

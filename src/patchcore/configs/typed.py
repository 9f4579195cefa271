"""Options that are typed for stored models, whose own configuration rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

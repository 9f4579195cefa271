"""What values are checked against, with the message a user gets."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

from patchcore.errors import ConfigurationError

MAX_LIST_LENGTH = 250  # of the known names in a message, characters: three lines
MAX_SEED = 2**63 - 1  # what torch takes


def near_matches(name: str, known: Iterable[str]) -> str:
    """Return "did you mean ...?" for a mistyped name, or the known names where none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    shown = names
    while len(", ".join(shown)) > MAX_LIST_LENGTH:
        shown = shown[:-1]
    more = f" and {len(names) - len(shown)} more" if len(shown) < len(names) else ""
    return f"known: {', '.join(shown)}{more}"


def require_choice(what: str, value: str, known: Iterable[str]) -> None:
    """Raise ConfigurationError with near matches unless `value` is one of the known names."""
    names = list(known)
    if value not in names:
        raise ConfigurationError(f"unknown {what} {value!r}: {near_matches(value, names)}")


def require_at_least(what: str, value: int, minimum: int, maximum: int | None = None) -> None:
    """Raise ConfigurationError unless `value` is `minimum` or more, and at most `maximum` where there is one."""
    if value < minimum:
        raise ConfigurationError(f"{what} is {value}, expected {minimum} or more")
    if maximum is not None and value > maximum:
        raise ConfigurationError(f"{what} is {value}, expected {maximum} or less")


def require_fraction(what: str, value: float) -> None:
    """Raise ConfigurationError unless `value` lies in (0, 1]."""
    if not (math.isfinite(value) and 0 < value <= 1):
        raise ConfigurationError(f"{what} is {value}, expected a share in (0, 1], for example 0.1 for 10 %")


def require_positive(what: str, value: float, maximum: float = math.inf) -> None:
    """Raise ConfigurationError unless `value` is a finite number above 0, and at most `maximum`."""
    if not (math.isfinite(value) and value > 0):
        raise ConfigurationError(f"{what} is {value}, expected a number above 0")
    if value > maximum:
        raise ConfigurationError(f"{what} is {value}, expected {maximum:g} or less")


def require_not_negative(what: str, value: float, maximum: float = math.inf) -> None:
    """Raise ConfigurationError unless `value` is a finite number, 0 or more, and at most `maximum`."""
    if not (math.isfinite(value) and value >= 0):
        raise ConfigurationError(f"{what} is {value}, expected a number of 0 or more")
    if value > maximum:
        raise ConfigurationError(f"{what} is {value}, expected {maximum:g} or less")

"""What may be wrong with the run folders that a comparison is given."""

from __future__ import annotations

import os
from pathlib import Path


def why_no_run(folder: Path, error: Exception) -> str:
    """Say what is wrong with a folder whose config.json could not be read."""
    if isinstance(error, FileNotFoundError):
        return "it has no config.json" if os.path.isdir(folder) else "there is no such folder"
    if isinstance(error, NotADirectoryError):
        return "it is a file"
    if isinstance(error, OSError):
        return f"its config.json cannot be read: {error.strerror}"
    if isinstance(error, KeyError):
        return f"its config.json has no {error.args[0]!r}"
    return "its config.json is damaged"


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def are_distinct_strings(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(v, str) for v in values) and len(set(values)) == len(values)

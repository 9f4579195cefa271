"""What config.json of a run folder says, read and checked for every command that compares runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchcore.errors import ConfigurationError


@dataclass(frozen=True)
class StoredConfig:
    """What config.json says of one run folder, whatever its method.

    Attributes:
        folder: The run folder.
        config: The whole configuration.
        environment: What the run was made on.
        dataset: Name of the data set.
        row_names: Per class, in order, the name of its row.
        limit_train: Number of training images that was asked for; None asks for all.
        seed: Its seed; None where stored models were evaluated, which have seeds of their own.
    """

    folder: Path
    config: dict[str, Any]
    environment: Mapping[str, Any]
    dataset: str
    row_names: dict[str, str]
    limit_train: int | None
    seed: int | None


def read_stored_config(folder: Path) -> StoredConfig:
    """Read config.json of a run folder.

    Raises:
        ConfigurationError: The folder is none of a run, or its config.json is damaged.
    """
    path = folder / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        config, environment = stored["config"], stored.get("environment", {})
        dataset = config["dataset"]
        name, categories, limit = dataset["name"], dataset["categories"], dataset["limit_train"]
        seed = None if "models" in config else config["seed"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise no_run_folder(folder, _why_no_run(folder, error)) from error
    if not (seed is None or is_integer(seed)) or not (limit is None or (is_integer(limit) and limit >= 1)):
        raise ConfigurationError(
            f"{path}: seed {seed!r} and limit_train {limit!r}, expected integers, limit_train >= 1"
        )
    if not _are_distinct_names(categories):
        raise ConfigurationError(f"{path}: categories {categories!r}, expected a list of names, each once")
    if not isinstance(name, str) or not isinstance(environment, dict):
        raise ConfigurationError(f"{path}: name {name!r} and environment {environment!r}, expected a text and a table")
    rows = {category: f"{name}_{category}" for category in categories}
    return StoredConfig(folder, config, environment, name, rows, limit, seed)


def no_run_folder(folder: Path, reason: str) -> ConfigurationError:
    """Return the error of a folder that cannot be compared."""
    return ConfigurationError(
        f"{str(folder)!r} is no run folder ({reason}): name folders that hold a results.csv and a config.json"
    )


def _why_no_run(folder: Path, error: Exception) -> str:
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


def _are_distinct_names(values: object) -> bool:
    if not isinstance(values, list) or not values:
        return False
    return all(isinstance(v, str) for v in values) and len(set(values)) == len(values)

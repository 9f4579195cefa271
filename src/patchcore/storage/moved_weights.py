"""Weights files that a stored model names by path, on a machine where they lie elsewhere."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from patchcore.errors import ConfigurationError

LOGGER = logging.getLogger(__name__)

WEIGHTS_VARIABLE = "PATCHCORE_WEIGHTS"
NO_PATHS = ("pretrained", "random")


def with_moved_weights(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the configuration of a stored model with its weights files where they are now.

    A path that is there stays. Otherwise the environment variable PATCHCORE_WEIGHTS names the file, or a folder with a
    file of that name; several are separated as in PATH. Whether it is the right file, its digest decides later.

    Args:
        config: As stored; backbones are found at any depth, as ensembles have several.
        where: Name of the model, for messages.

    Raises:
        ConfigurationError: A file is gone and the variable names none.
    """
    located: dict[str, Any] = _located(config, where)
    return located


def _located(value: Any, where: str) -> Any:
    """Return JSON values with every `weights` of a backbone that is the path of a missing file replaced."""
    if isinstance(value, (list, tuple)):
        return [_located(item, where) for item in value]
    if not isinstance(value, dict):
        return value
    inner = {name: _located(item, where) for name, item in value.items()}
    weights = inner.get("weights")
    if "layers" in inner and isinstance(weights, str) and weights not in NO_PATHS and not Path(weights).is_file():
        inner["weights"] = str(_file_elsewhere(Path(weights), where))
    return inner


def _file_elsewhere(path: Path, where: str) -> Path:
    """Return the file that stands for a missing one."""
    named = [Path(entry) for entry in os.environ.get(WEIGHTS_VARIABLE, "").split(os.pathsep) if entry]
    candidates = [entry / path.name if entry.is_dir() else entry for entry in named]
    files = [file for file in candidates if file.is_file()]
    if not files:
        looked = f", nor in {WEIGHTS_VARIABLE}={os.environ[WEIGHTS_VARIABLE]!r}" if named else ""
        raise ConfigurationError(
            f"model {where!r}: the weights of its backbone are not at {str(path)!r} any more{looked}: set the "
            f"environment variable {WEIGHTS_VARIABLE} to the file or to the folder that holds it"
        )
    found = next((file for file in files if file.name == path.name), files[0])
    LOGGER.info("model %s: weights %s are gone, taking %s", where, path, found)
    return found.absolute()

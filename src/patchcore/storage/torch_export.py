"""A model as one file of `torch.save`, for programs that know torch but not our model folders.

The file is a dictionary of plain values and tensors, so that `torch.load(path, weights_only=True)` reads it. It vouches
for itself, wherever it lies: `sha256` is the digest of the other two parts.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from patchcore.config_json import config_to_dict
from patchcore.digests import sha256_of_json, sha256_of_tensors
from patchcore.errors import ConfigurationError
from patchcore.storage.manifest import MANIFEST
from patchcore.storage.model_folder import ModelHeader, header_from_mapping, is_verified

HEADER, WEIGHTS, DIGEST = "model", "state_dict", "sha256"


@dataclass(frozen=True)
class TorchFile:
    """What a file of `torch.save` holds.

    Attributes:
        header: What the model is; None in a bare state dict.
        tensors: What was learned, by name.
    """

    header: ModelHeader | None
    tensors: dict[str, torch.Tensor]


def torch_export_bytes(header: ModelHeader, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return the content of an export."""
    described = {name: value for name, value in config_to_dict(header).items() if name != MANIFEST}  # of no folder
    content = {HEADER: described, WEIGHTS: {name: t.cpu() for name, t in tensors.items()}}
    return state_bytes({**content, DIGEST: _digest(content)})


def _vouches(content: Mapping[str, Any]) -> bool:
    """Return whether the parts of an export are those of its digest."""
    if any(t.layout is not torch.strided or t.is_quantized or t.is_meta for t in content[WEIGHTS].values()):
        return False  # no model has such tensors
    try:
        return bool(content.get(DIGEST) == _digest(content))
    except (TypeError, ValueError, RecursionError):  # values that JSON does not have
        return False


def _digest(content: Mapping[str, Any]) -> str:
    return sha256_of_json([content[HEADER], sha256_of_tensors(content[WEIGHTS])])


def state_bytes(state: Mapping[str, Any]) -> bytes:
    """Return what `torch.save` writes for plain values and tensors."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def read_state(path: Path) -> dict[str, Any]:
    """Read a dictionary of plain values and tensors, without unpickling objects.

    Raises:
        ConfigurationError: The file is missing, damaged, or holds something else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is odd in a file that is then refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConfigurationError(f"{str(path)!r} not found, expected a file that torch.save wrote") from error
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, pickle.UnpicklingError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__  # torch's own words are a page long
        raise ConfigurationError(
            f"{str(path)!r} cannot be read as plain values and tensors ({reason}), expected a model folder or what "
            "torch.save wrote: train the model anew"
        ) from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{str(path)!r} holds {type(content).__name__}, expected a dictionary")
    return content


def read_torch_file(path: Path) -> TorchFile:
    """Read an export, or a bare state dict.

    Raises:
        ConfigurationError: The file is missing, damaged, edited, or neither of the two.
    """
    content = read_state(path)
    header = header_from_mapping(content[HEADER], path) if HEADER in content else None
    tensors = content.get(WEIGHTS) if header is not None else content
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ConfigurationError(
            f"{str(path)!r} holds {', '.join(map(str, list(content)[:3])) or 'nothing'}, expected an export of a model "
            "or a dictionary of tensors by name"
        )
    if header is not None and is_verified(header) and not _vouches(content):
        raise ConfigurationError(
            f"{str(path)!r} was edited or damaged after it was written, its values are not those of its sha256: export "
            "it anew"
        )
    return TorchFile(header, tensors)

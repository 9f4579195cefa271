"""Model folders: `model.json` and `search_index.safetensors`, nothing that executes when it is read.

The tensors of a member of an ensemble, named `<member>/<tensor>`, are in a file of their own,
`<member>_search_index.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from patchcore.config_json import config_from_dict, config_to_dict
from patchcore.configs import PreprocessingConfig, TrainingSource
from patchcore.errors import ConfigurationError
from patchcore.scoring.calibration import Calibration
from patchcore.storage.files import write_bytes, write_folder, write_json

FORMAT_VERSION = 1
MODEL_FILE = "model.json"
TENSOR_FILE = "search_index.safetensors"


@dataclass(frozen=True)
class ModelHeader:
    """What model.json says.

    Attributes:
        format_version: Version of this layout.
        method: Name in the registry of detectors.
        config: Configuration of the method, checked by the method.
        preprocessing: Resize and crop.
        source: What the model was trained on.
        calibration: Scales and thresholds; None without calibration.
    """

    format_version: int
    method: str
    config: dict[str, Any]
    preprocessing: PreprocessingConfig
    source: TrainingSource
    calibration: Calibration | None = None


def write_model_folder(
    folder: Path, header: ModelHeader, tensors: Mapping[str, torch.Tensor], exports: Mapping[str, bytes] | None = None
) -> None:
    """Write a model folder; it appears whole or not at all, and replaces an older one.

    Args:
        folder: Where the model goes.
        header: Configuration and calibration.
        tensors: What was learned, by name; for a memory bank this is the flat search index, in a format that is
            readable with and without faiss.
        exports: Further files, name to content, that reading the folder does not need.
    """
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        member, _, own_name = name.rpartition("/")
        files.setdefault(member, {})[own_name] = tensor.cpu().contiguous()

    def fill(temporary: Path) -> None:
        for member, content in files.items():
            write_bytes(temporary / _tensor_file(member), save(content, {"member": member}))
        for name, content_of_file in (exports or {}).items():
            write_bytes(temporary / name, content_of_file)
        write_json(temporary / MODEL_FILE, config_to_dict(header))

    write_folder(folder, fill)


def read_model_header(folder: Path) -> ModelHeader:
    """Read model.json of a model folder.

    Raises:
        ConfigurationError: The folder or the file is missing, damaged or of a newer format.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"model folder {str(folder)!r} not found, expected models/<data set>_<class> of a run")
    path = folder / MODEL_FILE
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"{str(folder)!r} is no model folder: {MODEL_FILE} is missing, expected models/<data set>_<class> of a run"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{str(path)!r} is damaged ({_one_line(error)}): train the model anew") from error
    return header_from_mapping(mapping, path)


def header_from_mapping(mapping: object, path: Path) -> ModelHeader:
    """Build a header from the JSON values that a file held.

    Raises:
        ConfigurationError: They are no header, or one of a newer format.
    """
    version = mapping.get("format_version") if isinstance(mapping, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ConfigurationError(
            f"{str(path)!r} has format {version}, this version of patchcore reads up to {FORMAT_VERSION}: update it"
        )
    try:
        return config_from_dict(ModelHeader, mapping, MODEL_FILE)
    except ConfigurationError as error:
        raise ConfigurationError(f"{str(path)!r} is damaged ({error}): train the model anew") from error


def read_model_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read what was learned, under the names that were given to `write_model_folder`.

    Raises:
        ConfigurationError: There is no file of tensors, or one is damaged.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(f"*{TENSOR_FILE}")):
        member = path.name.removesuffix(TENSOR_FILE).removesuffix("_")
        try:
            with safe_open(path, "pt") as file:
                written_for = (file.metadata() or {}).get("member", member)
            content = load_file(path)
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigurationError(f"{str(path)!r} is damaged ({_one_line(error)}): train the model anew") from error
        if written_for != member:
            raise ConfigurationError(
                f"{str(path)!r} was written as {_tensor_file(written_for)!r}: the files were swapped or renamed"
            )
        tensors |= {f"{member}/{name}" if member else name: tensor for name, tensor in content.items()}
    if not tensors:
        raise ConfigurationError(f"{str(folder)!r} is no whole model folder: {TENSOR_FILE} is missing")
    return tensors


def _tensor_file(member: str) -> str:
    return f"{member}_{TENSOR_FILE}" if member else TENSOR_FILE


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]

"""Model folders: `model.json` and `search_index.safetensors`, nothing that executes when it is read.

The tensors of a member of an ensemble, named `<member>/<tensor>`, are in a file of their own,
`<member>_search_index.safetensors`. A tensor named `faiss_index` holds the bytes of an index that faiss wrote; it is
stored as these bytes, `search_index.faiss`, which other programs can read. model.json lists the files with their
SHA-256; nothing of a file is interpreted before it has been compared.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from patchcore.config_json import config_from_dict, config_to_dict
from patchcore.configs import BackboneWeights, PreprocessingConfig, TrainingSource
from patchcore.errors import ConfigurationError
from patchcore.scoring.calibration import Calibration
from patchcore.storage.files import write_bytes, write_folder, write_json
from patchcore.storage.manifest import Manifest, read_manifest, require_files, with_manifest

LOGGER = logging.getLogger(__name__)

FORMAT_VERSION = 2
MANIFEST_SINCE = 2  # models of format 1 are read, but nothing tells whether they are still what was written
MODEL_FILE = "model.json"
TENSOR_FILE = "search_index.safetensors"
INDEX_FILE = "search_index.faiss"
INDEX_TENSOR = "faiss_index"


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
        backbones: Which weights the frozen networks had; empty for methods without one, and in format 1.
        libraries: Versions of the libraries that the model was written with; empty in format 1.
        learned_images: Digests of the images that updates have added, not of those of the training.
        manifest: Digests of the files that belong to it; None in format 1, in exports, and until it is written.
    """

    format_version: int
    method: str
    config: dict[str, Any]
    preprocessing: PreprocessingConfig
    source: TrainingSource
    calibration: Calibration | None = None
    backbones: tuple[BackboneWeights, ...] = ()
    libraries: dict[str, str] = field(default_factory=dict)
    learned_images: tuple[str, ...] = ()
    manifest: Manifest | None = None


def write_model_folder(
    folder: Path, header: ModelHeader, tensors: Mapping[str, torch.Tensor], exports: Mapping[str, bytes] | None = None
) -> None:
    """Write a model folder; it appears whole or not at all, and replaces an older one.

    Args:
        folder: Where the model goes.
        header: Configuration and calibration.
        tensors: What was learned, by name; `faiss_index` is uint8 [bytes].
        exports: Further files, name to content, that reading the folder does not need.
    """
    files: dict[str, dict[str, torch.Tensor]] = {}
    indices: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        member, _, own_name = name.rpartition("/")
        if own_name == INDEX_TENSOR:
            indices[member] = tensor.cpu().contiguous()
        else:
            files.setdefault(member, {})[own_name] = tensor.cpu().contiguous()

    def fill(temporary: Path) -> None:
        for member, content in files.items():
            write_bytes(temporary / _file_of(member, TENSOR_FILE), save(content, {"member": member}))
        for member, index in indices.items():
            write_bytes(temporary / _file_of(member, INDEX_FILE), index.numpy().tobytes())
        for name, content_of_file in (exports or {}).items():
            write_bytes(temporary / name, content_of_file)
        write_json(temporary / MODEL_FILE, with_manifest(config_to_dict(header), temporary))

    write_folder(folder, fill)


def read_model_header(folder: Path) -> ModelHeader:
    """Read model.json of a model folder.

    Raises:
        ConfigurationError: The folder or the file is missing, damaged, edited or of a newer format.
    """
    return header_from_mapping(_read_model_file(folder), folder / MODEL_FILE)


def _read_model_file(folder: Path) -> dict[str, Any]:
    """Return the values of model.json, which its manifest has vouched for where the format has one."""
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
    version = _require_known_format(mapping, path)
    if version >= MANIFEST_SINCE:
        try:
            read_manifest(mapping, path)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{str(path)!r} is damaged ({error}): put the original file back, or train the model anew"
            ) from error
    return mapping


def _require_known_format(mapping: object, path: Path) -> int:
    """Return the format of a model, or raise ConfigurationError where the values are none that can be read."""
    version = mapping.get("format_version") if isinstance(mapping, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ConfigurationError(
            f"{str(path)!r} has format {version}, this version of patchcore reads up to {FORMAT_VERSION}: update it"
        )
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        found = f"format_version {version!r}" if isinstance(mapping, dict) else type(mapping).__name__
        raise ConfigurationError(
            f"{str(path)!r} is damaged (found {found}, expected an object with the number format_version): train the "
            "model anew"
        )
    return version


def is_verified(header: ModelHeader) -> bool:
    """Return whether the model's format has digests, which reading it compares."""
    return header.format_version >= MANIFEST_SINCE


def header_from_mapping(mapping: object, path: Path) -> ModelHeader:
    """Build a header from the JSON values that a file held.

    Raises:
        ConfigurationError: They are no header, or one of a newer format.
    """
    _require_known_format(mapping, path)
    try:
        return config_from_dict(ModelHeader, mapping, MODEL_FILE)
    except ConfigurationError as error:
        raise ConfigurationError(f"{str(path)!r} is damaged ({error}): train the model anew") from error


def read_model_tensors(folder: Path, header: ModelHeader | None = None) -> dict[str, torch.Tensor]:
    """Read what was learned, under the names that were given to `write_model_folder`.

    Args:
        folder: The model folder.
        header: What model.json said before, so that header and tensors are of one model; None: nothing was read yet.

    Raises:
        ConfigurationError: There is no file of tensors, the files are not those that were written, or the folder was
            replaced since its header was read.
    """
    mapping = _read_model_file(folder)
    replaced = f"{str(folder)!r} was replaced while it was read: call again"
    if header is not None and header_from_mapping(mapping, folder / MODEL_FILE).manifest != header.manifest:
        raise ConfigurationError(replaced)
    try:
        tensors = _read_tensor_files(folder, mapping)
    except (ConfigurationError, OSError) as error:
        if _holds(folder, mapping):
            if isinstance(error, OSError):
                raise ConfigurationError(
                    f"{os.fsdecode(error.filename or folder)!r} cannot be read ({error.strerror}): copy the whole "
                    "folder again"
                ) from error
            raise
        raise ConfigurationError(replaced) from error
    if not _holds(folder, mapping):  # digests and tensors are two readings of a file
        raise ConfigurationError(replaced)
    return tensors


def _holds(folder: Path, mapping: Mapping[str, Any]) -> bool:
    """Return whether model.json still has the values that were read of it."""
    try:
        return _read_model_file(folder) == mapping
    except ConfigurationError:
        return False


def _read_tensor_files(folder: Path, mapping: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of all members, compared with what model.json says of their files."""
    # Names with a dot in front are what file systems and killed programs leave.
    found = sorted(p for p in folder.glob("[!.]*") if p.name.endswith((TENSOR_FILE, INDEX_FILE)))
    if not found:
        raise ConfigurationError(f"{str(folder)!r} is no whole model folder: {TENSOR_FILE} is missing")
    if mapping["format_version"] >= MANIFEST_SINCE:
        manifest = read_manifest(mapping, folder / MODEL_FILE)
        needed = [name for name in manifest.files if name.endswith((TENSOR_FILE, INDEX_FILE))]
        require_files(folder, manifest, [p.name for p in found], needed)
    tensors: dict[str, torch.Tensor] = {}
    for path in found:
        tensors |= _read_index(path) if path.name.endswith(INDEX_FILE) else _read_tensor_file(path)
    return tensors


def _read_index(path: Path) -> dict[str, torch.Tensor]:
    """Return the bytes of an index that faiss wrote, under the name that its member gave it."""
    member = path.name.removesuffix(INDEX_FILE).removesuffix("_")
    content = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    return {_name_of(member, INDEX_TENSOR): content}


def _read_tensor_file(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of one member."""
    member = path.name.removesuffix(TENSOR_FILE).removesuffix("_")
    try:
        with safe_open(path, "pt") as file:
            written_for = (file.metadata() or {}).get("member", member)
        content = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigurationError(f"{str(path)!r} is damaged ({_one_line(error)}): train the model anew") from error
    if written_for != member:
        raise ConfigurationError(
            f"{str(path)!r} was written as {_file_of(written_for, TENSOR_FILE)!r}: the files were swapped or renamed"
        )
    return {_name_of(member, name): tensor for name, tensor in content.items()}


def _name_of(member: str, tensor: str) -> str:
    return f"{member}/{tensor}" if member else tensor


def _file_of(member: str, file: str) -> str:
    return f"{member}_{file}" if member else file


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]

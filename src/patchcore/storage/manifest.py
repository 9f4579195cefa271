"""What a stored model says of its own files, and whether they are still those that were written.

The manifest is the part `manifest` of model.json: size and SHA-256 of every other file, and the SHA-256 of model.json's
own values. It finds what is damaged, mixed up, or edited in passing; it is no signature: who can write the folder can
write a manifest that fits.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import patchcore
from patchcore.config_json import config_from_dict, config_to_dict
from patchcore.digests import sha256_of_file, sha256_of_json
from patchcore.errors import ConfigurationError

MANIFEST = "manifest"
# What the numbers of a model go through; faiss where it is installed, as it writes compressed indices.
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "safetensors", "faiss-cpu", "faiss-gpu")


@dataclass(frozen=True)
class FileEntry:
    """Size and digest of one file.

    Attributes:
        bytes: Size.
        sha256: Digest of the content.
    """

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """Measure a file."""
        return cls(path.stat().st_size, sha256_of_file(path))


@dataclass(frozen=True)
class Manifest:
    """What model.json says of the files.

    Attributes:
        files: Every other file of the folder, by name.
        sha256: Digest of all other values of model.json, `files` included.
    """

    files: dict[str, FileEntry]
    sha256: str


def library_versions() -> dict[str, str]:
    """Return the versions that a model is written with."""
    versions = {"patchcore": patchcore.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def with_manifest(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the values of model.json with the manifest of a folder that holds all other files."""
    files = {path.name: config_to_dict(FileEntry.of(path)) for path in sorted(folder.iterdir())}
    unsigned = {**content, MANIFEST: {"files": files}}
    return {**content, MANIFEST: {"files": files, "sha256": _own_digest(unsigned)}}


def read_manifest(content: Mapping[str, Any], path: Path) -> Manifest:
    """Return the manifest of a model.json whose values are still those that were written.

    Args:
        content: What the file holds.
        path: The file, for messages.

    Raises:
        ConfigurationError: There is no manifest, it is damaged, or a value was changed.
    """
    manifest = config_from_dict(Manifest, content.get(MANIFEST), f"{path.name}.{MANIFEST}")
    if _own_digest(content) != manifest.sha256:
        raise ConfigurationError(
            f"{path.name} was edited or damaged after it was written, its values are not those of its sha256"
        )
    return manifest


def _own_digest(content: Mapping[str, Any]) -> str:
    """Return the digest of all values of model.json but the digest itself."""
    files = {name: value for name, value in content[MANIFEST].items() if name != "sha256"}
    return sha256_of_json({**content, MANIFEST: files})


def require_files(folder: Path, manifest: Manifest, found: Collection[str], needed: Collection[str]) -> None:
    """Raise ConfigurationError unless the files of a model are exactly those of its manifest.

    Args:
        folder: The model folder.
        manifest: What model.json says of it.
        found: Names of the files that reading the model would take.
        needed: Names of those that the manifest lists.
    """
    for name in sorted(set(needed) - set(found)):
        raise ConfigurationError(f"{name} is missing, which model.json lists: copy the whole folder again")
    for name in sorted(set(found) - set(needed)):
        raise ConfigurationError(f"{name} is not listed in model.json: it belongs to another model, take it out")
    for name in sorted(needed):
        entry, size = manifest.files[name], (folder / name).stat().st_size
        if size != entry.bytes:
            raise ConfigurationError(
                f"{name} has {size} bytes, {entry.bytes} were written: it was cut off or replaced, copy it again"
            )
        if sha256_of_file(folder / name) != entry.sha256:
            raise ConfigurationError(
                f"{name} is not the file that was written (its sha256 differs): it was damaged or swapped with that "
                "of another model, copy it again"
            )

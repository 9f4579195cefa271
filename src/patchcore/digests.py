"""SHA-256 of tensors, files and JSON values: what tells whether a model is still the one that was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

BLOCK_BYTES = 1 << 20  # of a file that is held at once


def sha256_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the digest of named tensors, whatever their order: names, dtypes, shapes and bytes, sorted by name.

    Args:
        tensors: Of any shape and dtype, on any device.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        # A line that no other tensor has: without it, values could move from one tensor to the next unseen.
        digest.update(f"{name!r} {tensor.dtype} {list(tensor.shape)}\n".encode("utf-8", "surrogatepass"))
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the digest of a file, 64 hexadecimal digits.

    Raises:
        OSError: The file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_json(content: Any) -> str:
    """Return the digest of JSON values, whatever the order of their names and the layout of the file they are in."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()

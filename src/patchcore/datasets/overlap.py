"""Images that occur in two sets which must not share any."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from patchcore.runtime import progress


def shared_file(paths: Sequence[Path], others: Sequence[Path], description: str) -> tuple[Path, Path] | None:
    """Return the first of `paths` that is one of `others`, by its place or by its content, and that other one.

    Only files of equal size are read. One that cannot be read is passed over: who reads it as an image names it.

    Args:
        paths: Files that shall be new.
        others: Files that are known.
        description: Shown before the progress bar.
    """
    of_size: dict[int, list[Path]] = {}
    for other in others:
        with suppress(OSError):
            of_size.setdefault(other.stat().st_size, []).append(other)
    digests: dict[Path, bytes] = {}
    for path in progress(paths, description):
        with suppress(OSError):
            for other in of_size.get(path.stat().st_size, []):
                if _digest(path, digests) == _digest(other, digests):
                    return path, other
    return None


def _digest(path: Path, known: dict[Path, bytes]) -> bytes:
    if path not in known:
        known[path] = hashlib.sha256(path.read_bytes()).digest()
    return known[path]

"""Which files were meant: files, folders with all that lies below them, and globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from patchcore.datasets.inspection import IMAGE_SUFFIXES
from patchcore.errors import ConfigurationError


@dataclass(frozen=True)
class InputFile:
    """A file to score.

    Attributes:
        path: Where it is, as the user would type it.
        label: What its outputs are named after: its path below the typed folder, or its name.
    """

    path: Path
    label: str

    @property
    def key(self) -> str:
        """Return what tells it from every other file, from whichever folder the command is started."""
        return os.path.abspath(self.path)


def find_inputs(typed: Sequence[str], out: Path | None) -> Iterator[InputFile]:
    """Find the files that were meant, each once, in the order typed and by name within a folder.

    In folders, files with the suffix of an image count; hidden ones and what lies in `out` do not, and links to folders
    are not followed.

    Args:
        typed: Files, folders and globs (`**` for any number of folders).
        out: Folder of the outputs, which is never read.
    """
    seen: set[str] = set()
    for argument in typed:
        for path in _matches(argument):
            for found in _files(path, out):
                if found.key not in seen:
                    seen.add(found.key)
                    yield found


def require_inputs(typed: Sequence[str], out: Path | None, may_be_empty: bool) -> None:
    """Raise ConfigurationError if an argument names nothing, or something that the outputs would overwrite.

    Args:
        typed: Files, folders and globs.
        out: Folder of the outputs.
        may_be_empty: Whether images may still be to come.
    """
    for argument in typed:
        if not argument.strip():
            raise ConfigurationError("found an empty path, expected images: is a variable of a script not set?")
        paths = _matches(argument)
        if not paths and not (may_be_empty and glob.has_magic(argument)):
            raise ConfigurationError(f"{argument!r} not found, expected an image, a folder or a glob in quotes")
        inside = [path for path in paths if out is not None and _is_within(path, out)]
        if inside:
            raise ConfigurationError(
                f"{str(inside[0])!r} is the folder of --out or lies in it, where outputs may replace it: choose "
                "another --out"
            )
    if not may_be_empty and next(find_inputs(typed, out), None) is None:
        raise ConfigurationError(
            f"no images in {', '.join(map(repr, typed))}, expected files ending in {', '.join(IMAGE_SUFFIXES)}"
        )


def input_places(typed: Sequence[str]) -> list[Path]:
    """Return what has to be there wherever images are read: what was typed, and the folders above what is a glob."""
    places = []
    for argument in typed:
        place = Path(argument)
        while not os.path.lexists(place) and glob.has_magic(str(place)):
            place = place.parent
        places.append(place)
    return places


def _matches(argument: str) -> list[Path]:
    """Return what an argument stands for; a file whose name looks like a glob is that file."""
    if os.path.lexists(argument):
        return [Path(argument)]
    return [Path(match) for match in sorted(glob.glob(argument, recursive=True))]


def _files(path: Path, out: Path | None) -> Iterator[InputFile]:
    if not path.is_dir():
        yield InputFile(path, path.name)
        return
    for folder, folders, names in os.walk(path):
        here = Path(folder)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not (out and _is_within(here / f, out)))
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield InputFile(here / name, str((here / name).relative_to(path)))


def _is_within(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))

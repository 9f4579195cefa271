"""Files that appear whole or not at all."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

UNFINISHED = ".part"
REPLACED = ".old"
FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")  # also in the full width of East Asian fonts
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, and give it its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path.parent, UNFINISHED)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk: the temporary name, or none, would tell nobody what is missing
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def _temporary(folder: Path, suffix: str) -> Path:
    """Return a hidden name that nobody else uses; short, as the name it stands for may be as long as is allowed."""
    return folder / f".{uuid.uuid4().hex}{suffix}"


def write_json(path: Path, content: Any) -> None:
    """Write JSON with sorted keys, so that equal content gives equal files."""
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
    write_bytes(path, (text + "\n").encode("utf-8"))


def escaped(content: Any) -> Any:
    """Return JSON values as readers of any language take them: what of a name is no UTF-8 as a backslash and digits."""
    if isinstance(content, str):
        return content.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(content, Mapping):
        return {escaped(name): escaped(value) for name, value in content.items()}
    return [escaped(value) for value in content] if isinstance(content, (list, tuple)) else content


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a csv file; bytes of file names that are no UTF-8 are kept as they are."""
    text = "".join(csv_line(row) for row in (header, *rows))
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def csv_line(row: Sequence[str]) -> str:
    r"""Return a line that ends in \n, although the writer quotes what ends lines only if it is of its own line end.

    Names of files, classes and runs are anyone's: what a spreadsheet would run as a formula gets an apostrophe in
    front, which `read_csv` takes off.
    """
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\r\n").writerow(["'" + cell if _is_formula(cell) else cell for cell in row])
    return buffer.getvalue().removesuffix("\r\n") + "\n"


def _is_formula(cell: str) -> bool:
    """Return whether a cell begins as a formula, with or without apostrophes in front, and is no number."""
    return FORMULA.match(cell) is not None and NUMBER.fullmatch(cell) is None


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read what `write_csv` wrote, one dictionary per row.

    Raises:
        OSError, ValueError, csv.Error: The file cannot be read, or is no csv file.
    """
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file)
        header = [_content(cell) for cell in next(rows, [])]
        read: list[dict[str, str]] = []
        for row in filter(None, rows):
            if len(row) != len(header):
                raise ValueError(f"line {rows.line_num} has {len(row)} cells, expected {len(header)}")
            read.append(dict(zip(header, map(_content, row), strict=True)))
        return read


def _content(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary folder and give it its name; an older folder of that name is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(folder.parent, UNFINISHED)
    temporary.mkdir()
    try:
        fill(temporary)
        _replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_new_folder(names: Iterable[Path], fill: Callable[[Path], None]) -> Path:
    """Fill a temporary folder and give it the first free name; nothing is replaced, whoever else writes there.

    Args:
        names: Names in one folder, in order of preference, as many as it takes.
        fill: Receives the temporary folder.

    Returns:
        The name that it got.
    """
    temporary = None
    try:
        for name in names:
            if temporary is None:
                name.parent.mkdir(parents=True, exist_ok=True)
                temporary = _temporary(name.parent, UNFINISHED)
                temporary.mkdir()
                fill(temporary)
            try:
                os.rename(temporary, name)  # fails where there is a file or a folder with content
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                continue
            return name
        raise ValueError("no name is free")
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(new: Path, folder: Path) -> None:
    """Rename a folder; at no moment is there a half-removed one under the name."""
    if not folder.exists():
        os.replace(new, folder)
        return
    older = _temporary(folder.parent, REPLACED)
    os.replace(folder, older)
    try:
        os.replace(new, folder)
    except BaseException:
        os.replace(older, folder)
        raise
    shutil.rmtree(older, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what a process that was killed has left below a folder: files and folders without their names yet.

    Nobody else may be writing there.
    """
    for parent, folders, names in os.walk(folder):
        for name in names:
            if _is_unfinished(name):
                Path(parent, name).unlink(missing_ok=True)
        for name in filter(_is_unfinished, folders):
            shutil.rmtree(Path(parent, name), ignore_errors=True)
        folders[:] = [name for name in folders if not _is_unfinished(name)]


def _is_unfinished(name: str) -> bool:
    return name.startswith(".") and name.endswith((UNFINISHED, REPLACED))

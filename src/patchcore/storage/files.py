"""Files that appear whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, and give it its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


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
    r"""Return a line that ends in \n, although the writer quotes what ends lines only if it is of its own line end."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\r\n").writerow(row)
    return buffer.getvalue().removesuffix("\r\n") + "\n"


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary folder and give it its name; an older folder of that name is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".", suffix=".part"))
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        fill(temporary)
        if folder.exists():
            older = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".", suffix=".old"))
            os.replace(folder, older)  # at no moment is there a half-removed folder under the name
            os.replace(temporary, folder)
            shutil.rmtree(older, ignore_errors=True)
        else:
            os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise

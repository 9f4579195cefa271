"""One run at a time in a run folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from patchcore.errors import ConfigurationError

LOGGER = logging.getLogger(__name__)

LOCK_FILE = ".lock"
HELD_BY_ANOTHER = {errno.EACCES, errno.EAGAIN}
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # of the file system


class FolderInUseError(ConfigurationError):
    """Another run writes to the folder."""


@contextmanager
def locked(folder: Path, name: str = LOCK_FILE) -> Iterator[None]:
    """Keep other runs out of a folder, or other writers of one thing in it, while the context lasts.

    The lock is the operating system's and goes with the process that holds it, however that ends: none is ever stale.
    It is of the kind that also holds between machines that share a file system (lockf), and that no child process
    inherits, which may outlive a run that is killed. Where a file system has no locks, one warning says so.

    Args:
        folder: Where the file of the lock lies.
        name: What is locked, as the name of that file.

    Raises:
        FolderInUseError: Another process holds it; the message names it.
        ConfigurationError: Nothing can be written there.
    """
    path = folder / name
    handle = _acquire(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before it is let go: who has opened it in the meantime sees that it is gone
        os.close(handle)


def _acquire(path: Path) -> int:
    """Open and lock a file, and write into it who did."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigurationError(f"run folder {str(path.parent)!r} cannot be written ({error.strerror})") from error
        try:
            _lock(handle, path)
            if _is_named(handle, path):
                _sign(handle)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder has just removed it


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD_BY_ANOTHER:
            holder = os.read(handle, 1000).decode("utf-8", "replace") or "another process"
            raise FolderInUseError(
                f"{holder} is writing to {str(path.parent)!r}: wait for its end, or choose another --log_group"
            ) from error
        if error.errno not in WITHOUT_LOCKS:
            raise
        LOGGER.warning(
            "%s: its file system has no locks (%s): let no second run write there", path.parent, error.strerror
        )


def _is_named(handle: int, path: Path) -> bool:
    """Return whether an open file still is the one under its name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    with suppress(OSError):  # a full disk: the lock holds without a name in it
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())

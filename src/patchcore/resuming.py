"""Which folder a run writes to, kept from other runs, and what an earlier call has left to do there."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from patchcore.configs import OutputConfig
from patchcore.errors import ConfigurationError, DataError
from patchcore.storage import run_folder
from patchcore.storage.files import remove_unfinished
from patchcore.storage.folder_lock import FolderInUseError, locked
from patchcore.storage.run_folder import ClassResult
from patchcore.storage.torch_export import read_state

LOGGER = logging.getLogger(__name__)

Earlier = dict[str, ClassResult | str | None]
"""Of a class that an earlier call finished: its result, why that cannot be read, or None where files of it are gone."""


def reopen(
    folders: Mapping[int, Path], identities: Mapping[int, Mapping[str, Any]], locks: ExitStack
) -> dict[int, Path]:
    """Take over those run folders that exist, for --skip_existing.

    Args:
        folders: Run folder of each seed.
        identities: What makes two runs the same, of each seed.
        locks: Keeps other runs out of the folders until it closes.

    Returns:
        The folders that exist, without what a run that was killed has left half-written.

    Raises:
        ConfigurationError: One holds another run, or something else, or a run is at work there.
    """
    existing = {seed: folder for seed, folder in folders.items() if folder.exists()}
    for seed, folder in existing.items():
        _require_resumable(folder, identities[seed])  # before anything is touched
    for seed, folder in existing.items():
        locks.enter_context(locked(folder))
        _require_resumable(folder, identities[seed])  # another run may have begun there in between
        remove_unfinished(folder)
    return existing


def _require_resumable(folder: Path, identity: Mapping[str, Any]) -> None:
    if not run_folder.is_unused(folder):
        run_folder.require_same_config(folder, identity)


def new_folder(parent: Path, group: str, is_exact: bool, locks: ExitStack) -> Path:
    """Make a run folder.

    Args:
        parent: Folder above it.
        group: Its name; a number is appended where it is taken.
        is_exact: No number may be appended.
        locks: Keeps other runs out of it until it closes.

    Raises:
        ConfigurationError: Nothing can be written there, or another run has taken the exact name meanwhile.
    """
    while True:
        folder = run_folder.claim_folder(parent, group)
        if is_exact and folder.name != group:
            folder.rmdir()
            raise ConfigurationError(f"another run has just begun in {str(parent / group)!r}: wait for its end")
        try:
            locks.enter_context(locked(folder))
        except FolderInUseError:  # a run with --skip_existing was faster: it keeps the folder, this run takes another
            continue
        return folder


def finished_classes(folder: Path, row_names: Mapping[str, str], outputs: OutputConfig) -> Earlier:
    """Return what an earlier call left of each class that it finished, by category.

    Args:
        folder: The run folder.
        row_names: Row name of each category.
        outputs: What was asked for, and has to be there.
    """
    earlier: Earlier = {}
    for category, row_name in row_names.items():
        try:
            result = run_folder.load_class_result(folder, row_name)
        except DataError as error:
            earlier[category] = str(error)
            continue
        if result is not None:
            earlier[category] = result if _outputs_exist(folder, outputs, row_name) else None
    return earlier


def _outputs_exist(folder: Path, outputs: OutputConfig, row_name: str) -> bool:
    """Return whether what a run was asked for is there for a class; single pictures are not counted."""
    scores = folder / "anomaly_scores"
    wanted = [scores / f"{row_name}.csv"]
    if outputs.anomaly_maps:
        wanted.append(scores / f"{row_name}.npz")
    if outputs.models:
        wanted.append(folder / "models" / row_name)
    if outputs.segmentation_images:
        wanted.append(folder / "segmentation_images" / row_name)
    return all(path.exists() for path in wanted)


def checkpoint_path(folder: Path, row_name: str) -> Path:
    """Return where the state of a training in epochs is kept for as long as its class is not finished."""
    return folder / "checkpoints" / f"{row_name}.pt"


def read_checkpoint(path: Path, category: str) -> dict[str, Any]:
    """Read the state that an interrupted training left."""
    LOGGER.info("%s: resumes from %s", category, path)
    try:
        return read_state(path)
    except ConfigurationError as error:
        raise DataError(f"checkpoint {str(path)!r} is damaged ({error}): remove it") from error


def remove_checkpoint(path: Path) -> None:
    """Remove the state of a training, and the folder of the last one."""
    path.unlink(missing_ok=True)
    with suppress(OSError):  # there is none, or it holds those of other classes
        path.parent.rmdir()

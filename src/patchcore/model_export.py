"""A stored model as an ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from patchcore.datasets.images import PADDING_RGB
from patchcore.detector import DETECTORS, AnomalyDetector
from patchcore.errors import ConfigurationError
from patchcore.prediction import open_detector, read_header, stored_config
from patchcore.storage.export import ExportedModel, external_data_path, onnx_model, require_onnx, write_onnx

Say = Callable[[str], None]
"""Shows a line to the user."""


@dataclass(frozen=True)
class ExportJob:
    """What is exported, where to and how.

    Attributes:
        model: Folder of the model, or an export of it.
        out: The new file.
        resize_in_graph: The graph takes one image of any size, and resizes and crops it itself.
        resize_px: The model's resize, which folders of the original PatchCore do not store; None for what is stored.
    """

    model: Path
    out: Path
    resize_in_graph: bool = False
    resize_px: int | None = None


def export_model(job: ExportJob, say: Say) -> list[Path]:
    """Write a stored model as ONNX.

    Args:
        job: What to export.
        say: Tells what takes its time, and the result.

    Returns:
        The files.

    Raises:
        ConfigurationError: Nothing can be written there, a package is missing, there is no model, or it has no graph.
    """
    require_onnx()
    _require_new_file(job.out)
    _require_graph(job)
    detector = open_detector(job.model, torch.device("cpu"), resize_px=job.resize_px)
    say(f"translating {job.model} (a deep backbone takes a minute)")
    translated = onnx_model(exported_model(detector))
    if job.resize_in_graph:
        from patchcore.storage.export_resize import with_resize

        translated = with_resize(translated)
    files = write_onnx(translated, job.out)
    for file in files:
        say(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)")
    return files


def exported_model(detector: AnomalyDetector) -> ExportedModel:
    """Return what is exported of a fitted detector."""
    return ExportedModel(
        detector.graph(), detector.method, detector.source, detector.preprocessing, PADDING_RGB, detector.calibration_
    )


def _require_new_file(out: Path) -> None:
    """Raise ConfigurationError where the file could not be written, or would replace something."""
    if not out.name:
        raise ConfigurationError(f"--out {str(out)!r} is no name of a file, expected one such as model.onnx")
    if not out.parent.is_dir():
        raise ConfigurationError(f"--out {str(out)!r}: folder {str(out.parent)!r} not found: make it first")
    for path in (out, external_data_path(out)):
        if path.exists() or path.is_symlink():
            raise ConfigurationError(f"--out: {str(path)!r} exists: remove it, or type another name")


def _require_graph(job: ExportJob) -> None:
    """Raise ConfigurationError for a model without a graph, before its backbone is loaded."""
    header = read_header(job.model, {"resize_px": job.resize_px})
    if header is None:
        return  # what `open_detector` says of a bare state dict
    config = stored_config(header, str(job.model))
    try:
        DETECTORS[header.method].require_graph(config)
    except ConfigurationError as error:
        raise ConfigurationError(f"model {str(job.model)!r}: {error}") from error

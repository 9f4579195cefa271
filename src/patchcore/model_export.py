"""A stored model as an ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from patchcore.configs import PreprocessingConfig
from patchcore.datasets.images import PADDING_RGB, crop_image, place_of_file, read_image
from patchcore.detector import DETECTORS, AnomalyDetector
from patchcore.errors import ConfigurationError
from patchcore.inference.inputs import find_inputs, require_inputs
from patchcore.prediction import open_detector, read_header, stored_config
from patchcore.runtime import progress
from patchcore.storage.export import (
    LARGEST_FILE_BYTES,
    ExportedModel,
    external_data_path,
    onnx_model,
    require_onnx,
    weight_bytes,
    write_onnx,
)

CALIBRATION_IMAGES = 32

Say = Callable[[str], None]
"""Shows a line to the user."""


@dataclass(frozen=True)
class ExportJob:
    """What is exported, where to and how.

    Attributes:
        model: Folder of the model, or an export of it.
        out: The new file.
        resize_in_graph: The graph takes one image of any size, and resizes and crops it itself.
        calibration_images: Training images, files, folders or globs, for a file that computes in 8 bits; empty for
            float32.
        resize_px: The model's resize, which folders of the original PatchCore do not store; None for what is stored.
    """

    model: Path
    out: Path
    resize_in_graph: bool = False
    calibration_images: tuple[str, ...] = ()
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
        DataError: An image of the calibration cannot be read.
    """
    require_onnx(["onnxruntime"] if job.calibration_images else [])
    _require_new_file(job.out)
    if job.calibration_images:
        require_inputs(job.calibration_images, None, may_be_empty=False)
    _require_graph(job)
    detector = open_detector(job.model, torch.device("cpu"), resize_px=job.resize_px)
    images = _calibration_images(job.calibration_images, detector.preprocessing)
    say(f"translating {job.model} (a deep backbone takes a minute)")
    translated = onnx_model(exported_model(detector))
    if images:
        from patchcore.storage.export_int8 import in_8_bits

        if weight_bytes(translated) > LARGEST_FILE_BYTES:
            raise ConfigurationError(f"model {str(job.model)!r} has more than 2 GB of weights: use float32")
        say(f"measuring the range of each activation on {len(images)} images")
        translated = in_8_bits(translated, images)
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


def _calibration_images(typed: Sequence[str], preprocessing: PreprocessingConfig) -> list[np.ndarray]:
    """Read at most CALIBRATION_IMAGES images uint8 [3, S, S], evenly from those that were typed."""
    paths = [found.path for found in find_inputs(typed, None)]
    chosen = paths[:: max(1, -(-len(paths) // CALIBRATION_IMAGES))]
    images = []
    for path in progress(chosen, "reading images"):
        image = read_image(path)
        placement = place_of_file(path, image.height, image.width, preprocessing)
        images.append(np.ascontiguousarray(crop_image(image, placement).transpose(2, 0, 1)))
    return images


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

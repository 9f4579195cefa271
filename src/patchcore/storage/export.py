"""Models as ONNX files: from pixels to score and map in any runtime, without torch or this toolkit.

The graph takes images as the toolkit's resize and crop leave them, and normalises them itself. How to resize and crop
stands in the file's metadata, because no runtime resizes exactly as Pillow does.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import patchcore
from patchcore.configs import PreprocessingConfig, TrainingSource
from patchcore.errors import ConfigurationError
from patchcore.scoring.calibration import Calibration, ScoreScale

if TYPE_CHECKING:
    import onnx

OPSET = 18  # the first whose Resize knows antialiasing
METADATA_VERSION = 1
METADATA = "patchcore"  # name of the JSON object in the file's metadata
INPUT = "images"
SCORE, NORMALIZED_SCORE, MAP = "score", "normalized_score", "map"
PACKAGES = ("onnx", "onnxscript")
LARGEST_FILE_BYTES = 2**31 - 2**20  # a protocol buffer holds 2 GiB; what is no weight takes less than the rest
EXTERNAL_FROM_BYTES = 1024  # smaller tensors stay in the file
TRACED_BATCH = 2  # 0 and 1 would be taken for constants


@dataclass(frozen=True)
class ExportedModel:
    """What is exported.

    Attributes:
        graph: uint8 [B, 3, S, S] to scores [B] and maps [B, S, S].
        method: Name of the method.
        source: What it was trained on.
        preprocessing: Resize and crop that come before the graph.
        padding_rgb: What the crop shows beyond the image.
        calibration: Thresholds; None without calibration.
    """

    graph: nn.Module
    method: str
    source: TrainingSource
    preprocessing: PreprocessingConfig
    padding_rgb: tuple[int, int, int]
    calibration: Calibration | None


class ScoredGraph(nn.Module):
    """Adds the normalised score to what a graph gives.

    Args:
        graph: Images to scores and maps.
        scale: Of the image scores; None gives no normalised score.
    """

    def __init__(self, graph: nn.Module, scale: ScoreScale | None) -> None:
        super().__init__()
        self.raw = graph  # not `graph`: traced modules have an attribute of that name
        self.scale = scale

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return scores [B], with a scale what `ScoreScale.normalized` makes of them, and maps [B, S, S]."""
        scores, maps = self.raw(images)
        if self.scale is None:
            return scores, maps
        z = (scores.double() - self.scale.threshold) / self.scale.width
        tail = 0.5 / (1 + z.abs())
        return scores, torch.where(z < 0, tail, 1 - tail).float(), maps


def require_onnx(further: Sequence[str] = ()) -> None:
    """Raise ConfigurationError unless what writes ONNX files, and further packages, are installed; imports nothing."""
    missing = [package for package in (*PACKAGES, *further) if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigurationError(
            f"found no {' and no '.join(missing)}, which an export needs: pip install 'patchcore[onnx]', or in a clone "
            "pip install -e '.[onnx]'"
        )


def onnx_model(model: ExportedModel) -> onnx.ModelProto:
    """Translate a model for images that are resized and cropped, with its metadata.

    Args:
        model: What is exported.

    Returns:
        Input `images` uint8 [batch, 3, S, S]; outputs `score` [batch], with calibration `normalized_score` [batch],
        and `map` [batch, S, S], float32.
    """
    calibration, side = model.calibration, model.preprocessing.imagesize_px
    module = ScoredGraph(model.graph, calibration.image if calibration else None).eval()
    example = torch.zeros(TRACED_BATCH, 3, side, side, dtype=torch.uint8)
    with quiet(), _without_work_in_place(module), torch.no_grad():
        program = torch.onnx.export(
            module,
            (example,),
            input_names=[INPUT],
            output_names=[SCORE, NORMALIZED_SCORE, MAP] if calibration else [SCORE, MAP],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    translated = program.model_proto
    translated.producer_name, translated.producer_version = "patchcore", patchcore.__version__
    translated.doc_string = f"{model.method} of {model.source.category}, its metadata say how to resize and crop"
    del translated.metadata_props[:]
    set_metadata(translated, metadata(model))
    return translated


def metadata(model: ExportedModel) -> dict[str, Any]:
    """Return what the file says of itself, as JSON values."""
    calibration, preprocessing = model.calibration, model.preprocessing
    pixel = calibration.pixel if calibration else None
    return {
        "format_version": METADATA_VERSION,
        "toolkit_version": patchcore.__version__,
        "method": model.method,
        "dataset": model.source.dataset,
        "class": model.source.category,
        "resize_in_graph": False,
        "resize_px": preprocessing.resize_px,
        "resize_mode": preprocessing.resize_mode,
        "crop_px": preprocessing.imagesize_px,
        "interpolation": "bilinear",
        "padding_rgb": list(model.padding_rgb),
        "precision": "float32",
        "image_threshold": calibration.image.threshold if calibration else None,
        "image_scale": calibration.image.width if calibration else None,
        "pixel_threshold": pixel.threshold if pixel else None,
        "pixel_scale": pixel.width if pixel else None,
    }


def read_metadata(model: onnx.ModelProto) -> dict[str, Any]:
    """Return the metadata of an exported model."""
    return dict(json.loads(next(entry.value for entry in model.metadata_props if entry.key == METADATA)))


def set_metadata(model: onnx.ModelProto, values: Mapping[str, Any]) -> None:
    """Write the metadata of a model in place."""
    text = json.dumps(values, sort_keys=True, allow_nan=False)
    for entry in model.metadata_props:
        if entry.key == METADATA:
            entry.value = text
            return
    model.metadata_props.add(key=METADATA, value=text)


def external_data_path(path: Path) -> Path:
    """Return where the weights of a file lie that are too large for it."""
    return path.with_name(f"{path.name}.data")


def write_onnx(model: onnx.ModelProto, path: Path) -> list[Path]:
    """Write a new file, with its weights beside it if they are too large for it; whole or not at all.

    Args:
        model: What is written.
        path: Its name; the weights beside it are `external_data_path`.

    Returns:
        The files.
    """
    import onnx

    beside = external_data_path(path)
    is_large = weight_bytes(model) > LARGEST_FILE_BYTES
    with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=path.parent) as folder:
        temporary = Path(folder)
        onnx.save_model(
            model,
            temporary / path.name,
            save_as_external_data=is_large,
            location=beside.name,
            size_threshold=EXTERNAL_FROM_BYTES,
        )
        files = [beside, path] if is_large else [path]  # the one that names the other comes last
        for file in files:
            with (temporary / file.name).open("rb") as written:
                os.fsync(written.fileno())
        try:
            for file in files:
                os.replace(temporary / file.name, file)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    return files


def weight_bytes(model: onnx.ModelProto) -> int:
    """Return how much the weights of a model take."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


@contextmanager
def _without_work_in_place(module: nn.Module) -> Iterator[None]:
    """Let activations return new tensors meanwhile: tracing those that overwrite theirs takes twice as long."""
    in_place = [part for part in module.modules() if getattr(part, "inplace", False) is True]
    for part in in_place:
        part.inplace = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for part in in_place:
            part.inplace = True  # type: ignore[assignment]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what the translation tells of itself from the terminal."""
    loggers = [logging.getLogger(name) for name in (None, "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

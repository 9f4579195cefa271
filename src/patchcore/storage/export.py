"""Models as ONNX files: from pixels to score and map in any runtime, without torch or this toolkit.

The graph takes images as the toolkit's resize and crop leave them, and normalises them itself. How to resize and crop
stands in the file's metadata, because no runtime resizes exactly as Pillow does.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from patchcore.configs import PreprocessingConfig
from patchcore.errors import ConfigurationError
from patchcore.scoring.calibration import Calibration, ScoreScale

if TYPE_CHECKING:
    import onnx

OPSET = 18  # the first whose Resize has antialiasing
INPUT = "images"
METADATA = "patchcore"
EXTRA = "found no {}, expected what writes ONNX files: pip install 'patchcore[onnx]'"
LARGEST_FILE_BYTES = 2**31 - 2**20  # of a protocol buffer, less what is not weights
EXTERNAL_FROM_BYTES = 1024  # smaller tensors stay in the file
TRACED_BATCH = 2  # 0 and 1 would be taken for constants


@dataclass(frozen=True)
class ExportedModel:
    """What is exported.

    Attributes:
        graph: uint8 [B, 3, S, S] to scores [B] and maps [B, S, S].
        method: Name of the method.
        category: Class that the model is of.
        preprocessing: Resize and crop that come before the graph.
        calibration: Thresholds; None without calibration.
    """

    graph: nn.Module
    method: str
    category: str
    preprocessing: PreprocessingConfig
    calibration: Calibration | None


class _ScoredGraph(nn.Module):
    """Adds the normalised score to what a graph gives.

    Source: `ScoreScale.normalized`.
    """

    def __init__(self, graph: nn.Module, scale: ScoreScale | None) -> None:
        super().__init__()
        self.graph = graph
        self.scale = scale

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores, maps = self.graph(images)
        if self.scale is None:
            return scores, maps
        z = (scores.double() - self.scale.threshold) / self.scale.width
        tail = 0.5 / (1 + z.abs())
        return scores, torch.where(z < 0, tail, 1 - tail).float(), maps


def onnx_model(model: ExportedModel, resize_in_graph: bool = False) -> onnx.ModelProto:
    """Translate a model.

    Args:
        model: What is exported.
        resize_in_graph: The graph takes one image of any size, uint8 [1, 3, H, W], and resizes and crops it itself.

    Raises:
        ConfigurationError: A package that this needs is not installed.
    """
    require_onnx()
    side = model.preprocessing.imagesize_px
    module = _ScoredGraph(model.graph, model.calibration.image if model.calibration else None).eval()
    names = ["score", "normalized_score", "map"] if model.calibration else ["score", "map"]
    example = torch.zeros(TRACED_BATCH, 3, side, side, dtype=torch.uint8)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            (example,),
            input_names=[INPUT],
            output_names=names,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    translated = program.model_proto
    if resize_in_graph:
        translated = _with_resize(translated, model.preprocessing)
    _describe(translated, model, resize_in_graph)
    return translated


def metadata(model: ExportedModel, resize_in_graph: bool) -> dict[str, Any]:
    """Return what the file says of itself, as JSON values."""
    calibration = model.calibration
    return {
        "method": model.method,
        "class": model.category,
        "input": "uint8 RGB, [1, 3, height, width] of any size" if resize_in_graph else "uint8 RGB, resized and cropped",
        "preprocessing": asdict(model.preprocessing),
        "image_threshold": calibration.image.threshold if calibration else None,
        "pixel_threshold": calibration.pixel.threshold if calibration and calibration.pixel else None,
    }


def require_onnx() -> None:
    """Raise ConfigurationError unless what writes ONNX files is installed."""
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ImportError as error:
            raise ConfigurationError(EXTRA.format(package)) from error

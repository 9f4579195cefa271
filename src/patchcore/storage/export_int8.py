"""Exported models in whole numbers of 8 bits: smaller, and faster where the processor multiplies such numbers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from patchcore.storage.export import INPUT, quiet, read_metadata, set_metadata

INT8 = "int8"
# Convolutions, the search, and what stands between convolutions: else each result would become float32 and go back.
OPERATIONS = ("Conv", "Gemm", "Add", "Clip")


class _Images(CalibrationDataReader):
    """Hands images uint8 [3, S, S] to onnxruntime, one at a time."""

    def __init__(self, images: Sequence[np.ndarray]) -> None:
        self._left: Iterator[np.ndarray] = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self._left, None)
        return None if image is None else {INPUT: image[None]}


def in_8_bits(model: onnx.ModelProto, images: Sequence[np.ndarray]) -> onnx.ModelProto:
    """Return a model whose weights, memory bank and activations are stored and multiplied in 8 bits.

    Weights have a step for each output channel, activations one step each, from the lowest to the highest value that
    they take on the images.

    Args:
        model: What `onnx_model` gave, below 2 GB.
        images: uint8 [3, S, S], images of the training, resized and cropped.
    """
    with tempfile.TemporaryDirectory() as folder, quiet():
        whole, prepared, reduced = (Path(folder, name) for name in ("whole.onnx", "prepared.onnx", "reduced.onnx"))
        onnx.save_model(model, whole)
        quant_pre_process(whole, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            reduced,
            _Images(images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(OPERATIONS),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        translated = onnx.load(reduced)
    set_metadata(translated, {**read_metadata(model), "precision": INT8})
    return translated

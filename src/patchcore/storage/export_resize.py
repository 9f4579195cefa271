"""Resize and crop as a part of an exported graph, in front of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from onnx import compose, helper, parser

from patchcore.storage.export import INPUT, OPSET, read_metadata, set_metadata

CROPPED = "cropped_images"  # between the two parts

# The sizes of `datasets.images.place`, in whole numbers as there.
NEW_SIZE = {
    "shorter": """
        reference = ReduceMin <keepdims = 1> (size)
        scaled = Mul (size, resize)
        floor = Div (scaled, reference)
        new_size = Max (floor, one)""",
    "letterbox": """
        reference = ReduceMax <keepdims = 1> (size)
        scaled = Mul (size, resize)
        floor = Div (scaled, reference)
        new_size = Max (floor, one)""",
    "square": """
        new_size = Concat <axis = 0> (resize, resize)""",
}

# Pad knows one value for all channels: so the colour is taken off before, and put back after.
PADDED = """
        numbers = Cast <to = 6> (resized)
        centred = Sub (numbers, padding_rgb)
        missing = Neg (excess)
        total = Max (missing, zeros)
        to_corner = Neg (corner)
        before = Max (to_corner, zeros)
        after = Sub (total, before)
        padding = Concat <axis = 0> (zeros, before, zeros, after)
        framed = Pad (centred, padding)
        coloured = Add (framed, padding_rgb)
        canvas = Cast <to = 2> (coloured)"""
UNPADDED = """
        canvas = Identity (resized)"""

# The runtime resizes bytes, one axis after the other with a rounding between, as Pillow does. Round is to even, as in
# Python.
FRONT = """
    resize (uint8[1, 3, height, width] {input}) => (uint8[1, 3, {crop}, {crop}] {output})
    <int64[1] resize = {{{resize}}}, int64[2] crop = {{{crop}, {crop}}}, int64[1] one = {{1}},
     int64[2] zeros = {{0, 0}}, int64[2] planes = {{1, 3}}, int64[2] axes = {{2, 3}}, float half = {{0.5}},
     int32[1, 3, 1, 1] padding_rgb = {{{padding}}}>
    {{
        size = Shape <start = 2> ({input}){new_size}
        sizes = Concat <axis = 0> (planes, new_size)
        resized = Resize <antialias = 1, mode = "linear", coordinate_transformation_mode = "half_pixel">
            ({input}, , , sizes)
        excess = Sub (new_size, crop)
        excess_px = Cast <to = 1> (excess)
        half_excess = Mul (excess_px, half)
        corner_px = Round (half_excess)
        corner = Cast <to = 7> (corner_px){canvas}
        first = Max (corner, zeros)
        end = Add (first, crop)
        {output} = Slice (canvas, first, end, axes)
    }}
"""


def with_resize(model: onnx.ModelProto) -> onnx.ModelProto:
    """Put resize and crop in front of a model, in place.

    Args:
        model: What `onnx_model` gave.

    Returns:
        The same with the input `images` uint8 [1, 3, H, W]; the outputs are those of one image.
    """
    said = read_metadata(model)
    resizing = resizing_model(said, model.ir_version)
    front = compose.add_prefix(resizing, "resize/", rename_inputs=False, rename_outputs=False).graph
    graph = model.graph
    for node in graph.node:
        node.input[:] = [CROPPED if name == INPUT else name for name in node.input]
    nodes = [*front.node, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in front.node for name in node.input}  # which depends on the mode
    graph.initializer.extend(tensor for tensor in front.initializer if tensor.name in used)
    graph.input[0].CopyFrom(front.input[0])
    for output in graph.output:
        output.type.tensor_type.shape.dim[0].dim_value = 1
    set_metadata(model, {**said, "resize_in_graph": True})
    return model


def resizing_model(said: Mapping[str, Any], ir_version: int) -> onnx.ModelProto:
    """Return resize and crop as a model: `images` uint8 [1, 3, H, W] to `cropped_images` uint8 [1, 3, S, S].

    Args:
        said: Metadata of an exported model.
        ir_version: Version of the file.
    """
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_model(parser.parse_graph(_front(said)), opset_imports=opset, ir_version=ir_version)


def _front(said: Mapping[str, Any]) -> str:
    """Return the graph that resizes and crops, as text."""
    return FRONT.format(
        input=INPUT,
        output=CROPPED,
        resize=said["resize_px"],
        crop=said["crop_px"],
        padding=", ".join(map(str, said["padding_rgb"])),
        new_size=NEW_SIZE[said["resize_mode"]],
        canvas=PADDED if said["resize_mode"] == "letterbox" else UNPADDED,
    )

"""The files and records that a prediction leaves of each image."""

from __future__ import annotations

import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from patchcore.configs import require_choice
from patchcore.errors import ConfigurationError
from patchcore.evaluation.plots.overlays import contour_overlay
from patchcore.inference.results import Findings, ImageResult
from patchcore.scoring.calibration import ScoreScale
from patchcore.storage.files import write_bytes

HEAT_MAPS = ("png16", "npy", "none")
SUFFIXES = {"png16": "png", "npy": "npy"}
OVERLAYS, MASKS, MAPS = "overlays", "masks", "heat_maps"
RECORD = (
    "path", "score", "normalized_score", "decision", "threshold", "pixel_threshold", "image_width", "image_height",
    "inspected_px", "defect_px", "defect_share", "regions", "overlay", "mask", "heat_map", "error",
)  # fmt: skip
MAX_NAME_BYTES = 150  # of an output without number and suffix; file systems end at 255
DEEPEST_LEVEL = 2**16 - 1
MM_PER_PX = 1e-9, 1e9  # whatever is photographed, and far from where its square overflows
COMPRESSION = zlib.Z_RLE  # of PNGs: on photographs smaller than zlib's default at level 1, and faster


@dataclass(frozen=True)
class OutputChoice:
    """Which files are written for each image, and in which unit areas are told as well.

    Attributes:
        overlays: The image with contours.
        masks: Black and white masks of what is above the pixel threshold.
        heat_maps: One of HEAT_MAPS.
        mm_per_px: Side of a pixel of the images, mm; None where it is unknown.
    """

    overlays: bool = True
    masks: bool = True
    heat_maps: str = "png16"
    mm_per_px: float | None = None

    def __post_init__(self) -> None:
        require_choice("--heat_maps", self.heat_maps, HEAT_MAPS)
        if self.mm_per_px is not None and not MM_PER_PX[0] <= self.mm_per_px <= MM_PER_PX[1]:  # NaN fails, too
            low, high = MM_PER_PX
            raise ConfigurationError(
                f"--mm_per_px {self.mm_per_px}: expected the side of a pixel in mm, from {low:g} to {high:g}"
            )

    @property
    def needs_image(self) -> bool:
        return self.overlays

    @property
    def columns(self) -> list[str]:
        """Return the columns of the table."""
        areas = ["inspected_px", "defect_px", "defect_share", *(["defect_mm2"] if self.mm_per_px else [])]
        found = ["path", "score", "normalized_score", "decision", *areas, "boxes"]
        return [*found, "image_width", "image_height", "overlay", "mask", "heat_map", "error"]


class OutputNames:
    """Names for the outputs of files, no two alike, also where upper and lower case are one."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = {name.casefold() for name in taken}
        self._next_number: dict[str, int] = {}

    def claim(self, label: str) -> str:
        """Return the name of a file's outputs, without suffix: letters, digits, dots, dashes and underscores alone.

        Args:
            label: The file's path below what was typed; folders become part of the name.
        """
        base = re.sub(r"[^\w.\-]", "_", os.path.splitext(label)[0]).lstrip(".-") or "image"
        while len(base.encode("utf-8")) > MAX_NAME_BYTES:
            base = base[:-1]
        key = base.casefold()
        name = base
        while name.casefold() in self._taken:
            self._next_number[key] = self._next_number.get(key, 0) + 1
            name = f"{base}_{self._next_number[key]}"
        self._taken.add(name.casefold())
        return name

    def release(self, name: str) -> None:
        """Give a name back."""
        self._taken.discard(name.casefold())
        self._next_number.clear()  # or the next one would not be tried


def failure_record(path: Path, reason: str) -> dict[str, Any]:
    """Return what is told of a file that cannot be scored."""
    return dict.fromkeys(RECORD) | {"path": str(path), "error": " ".join(reason.removeprefix(f"{path}: ").split())}


def record(
    path: Path, result: ImageResult, findings: Findings | None, choice: OutputChoice, files: Mapping[str, str]
) -> dict[str, Any]:
    """Return what is told of an image, as JSON values; what the model does not know is None.

    Args:
        path: The file.
        result: What the model says.
        findings: Where the defects are; None for methods without maps.
        choice: Whether areas are told in mm2, too.
        files: The outputs: "overlay", "mask" and "heat_map" to paths below the folder of the outputs.
    """
    told: dict[str, Any] = dict.fromkeys(RECORD)
    told |= {
        "path": str(path),
        "score": result.score,
        "normalized_score": result.normalized,
        "decision": None if result.is_anomalous is None else int(result.is_anomalous),
        "threshold": result.threshold,
        "pixel_threshold": result.pixel_threshold,
        "image_width": result.width,
        "image_height": result.height,
        "inspected_px": findings.inspected_px if findings else None,
        "defect_px": findings.defect_px if findings else None,
        "defect_share": findings.defect_share if findings else None,
        **files,
    }
    regions = findings.regions if findings else None
    if regions is not None:
        told["regions"] = [vars(region).copy() for region in regions]
    if choice.mm_per_px is not None:
        square_mm = choice.mm_per_px**2
        told["defect_mm2"] = None if told["defect_px"] is None else told["defect_px"] * square_mm
        for region in told["regions"] or ():
            region["area_mm2"] = region["area_px"] * square_mm
    return told


def table_row(told: Mapping[str, Any], choice: OutputChoice) -> list[str]:
    """Return the cells of a record; what is unknown is blank."""
    regions = told.get("regions")
    boxes = None if regions is None else [[r["left"], r["top"], r["width"], r["height"]] for r in regions]
    cells = {**told, "boxes": None if boxes is None else json.dumps(boxes)}
    return ["" if cells.get(column) is None else str(cells[column]) for column in choice.columns]


def output_files(name: str, choice: OutputChoice) -> dict[str, str]:
    """Return where the chosen outputs of a name are: "overlay", "mask", "heat_map" to paths below their folder."""
    places = {
        "overlay": f"{OVERLAYS}/{name}.png" if choice.overlays else "",
        "mask": f"{MASKS}/{name}.png" if choice.masks else "",
        "heat_map": f"{MAPS}/{name}.{SUFFIXES[choice.heat_maps]}" if choice.heat_maps != "none" else "",
    }
    return {kind: place for kind, place in places.items() if place}


def write_outputs(
    out: Path,
    name: str,
    image: Image.Image | None,
    result: ImageResult,
    findings: Findings,
    choice: OutputChoice,
    scale: ScoreScale | None,
) -> dict[str, str]:
    """Write the files of an image.

    Args:
        out: Folder of the outputs.
        name: Name of the image's files.
        image: RGB, upright; not needed without overlays.
        result: What the model says.
        findings: Where the defects are.
        choice: Which files.
        scale: Scale of the anomaly maps; None without calibration.

    Returns:
        Their paths below `out`: "overlay", "mask" and "heat_map".
    """
    places, files = output_files(name, choice), dict[str, str]()
    if choice.overlays and image is not None:
        picture = contour_overlay(
            image,
            findings.defect_mask,
            findings.inspected,
            verdict(result),
            result.is_anomalous,
            _place_to_look(result, findings),
        )
        files["overlay"] = _write_png(out, places["overlay"], picture)
    if choice.masks and findings.defect_mask is not None:
        mask = Image.fromarray(findings.defect_mask.astype(np.uint8) * 255)
        files["mask"] = _write_png(out, places["mask"], mask)
    if choice.heat_maps == "npy":
        buffer = io.BytesIO()
        np.save(buffer, findings.anomaly_map, allow_pickle=False)
        files["heat_map"] = places["heat_map"]
        write_bytes(out / files["heat_map"], buffer.getvalue())
    elif choice.heat_maps == "png16":
        levels, meaning = heat_levels(findings.anomaly_map, scale)
        files["heat_map"] = _write_png(out, places["heat_map"], Image.fromarray(levels), meaning)
    return files


def _place_to_look(result: ImageResult, findings: Findings) -> tuple[int, int] | None:
    """Return row and column of the highest map value of an anomalous image none of whose pixels is a defect."""
    if not result.is_anomalous or findings.defect_px or not findings.inspected_px:
        return None
    row, column = np.unravel_index(int(np.nanargmax(findings.anomaly_map)), findings.anomaly_map.shape)
    return int(row), int(column)


def verdict(result: ImageResult) -> str:
    """Return what stands on an overlay."""
    if result.is_anomalous is None or result.normalized is None:
        return f"score {result.score:.4g}, no threshold"
    return f"{'ANOMALOUS' if result.is_anomalous else 'normal'}  {result.normalized:.3f}"


def heat_levels(anomaly_map: np.ndarray, scale: ScoreScale | None) -> tuple[np.ndarray, str]:
    """Return an anomaly map as 16-bit levels, and what they mean.

    With a scale the levels of all images can be compared: they are 65535 times the normalised score of each pixel, so
    that the pixel threshold lies at 32767.5. Without, they span the values of the one map.

    Args:
        anomaly_map: float [H, W], raw; NaN where nothing was inspected.
        scale: Scale of the maps of normal images.

    Returns:
        uint16 [H, W], 0 where nothing was inspected and from 1 on elsewhere; a sentence.
    """
    inspected = ~np.isnan(anomaly_map)
    levels = np.zeros(anomaly_map.shape, np.uint16)
    values = anomaly_map[inspected]
    if not values.size:
        return levels, "0: not inspected"
    if scale is not None:
        share, meaning = scale.normalized(values), "65535 times the normalised score, pixel threshold at 32767.5"
    else:
        low, high = float(values.min()), float(values.max())
        share = (values - low) / ((high - low) or 1.0)
        meaning = f"1 to 65535: raw values from {low:.9g} to {high:.9g}, no threshold"
    levels[inspected] = np.clip(np.rint(share * DEEPEST_LEVEL), 1, DEEPEST_LEVEL).astype(np.uint16)
    return levels, f"{meaning}; 0: not inspected"


def _write_png(out: Path, relative: str, picture: Image.Image, comment: str | None = None) -> str:
    """Write a picture below the folder of the outputs, and return its path in it."""
    buffer, info = io.BytesIO(), PngInfo()
    if comment is not None:
        info.add_text("Comment", comment)
    picture.save(buffer, format="PNG", compress_type=COMPRESSION, pnginfo=info)
    write_bytes(out / relative, buffer.getvalue())
    return relative


def folders_of(choice: OutputChoice) -> Sequence[str]:
    """Return the names of the folders that the files go to."""
    chosen = ((OVERLAYS, choice.overlays), (MASKS, choice.masks), (MAPS, choice.heat_maps != "none"))
    return [name for name, wanted in chosen if wanted]

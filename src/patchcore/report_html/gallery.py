"""The gallery of the page as data: scores of every test image, and the pictures of those that fit."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchcore.evaluation.plots.pictures import HeatScale
from patchcore.report_html.pictures import display_scale, heat_bytes, image_bytes, outline_path
from patchcore.runtime import progress

GOOD_QUANTILE = 0.95  # of good test images below the level that stands for a threshold where there is none
NORMALIZED_THRESHOLD = 0.5


@dataclass(frozen=True)
class MethodMaps:
    """The maps of one method on one class.

    Attributes:
        maps: float32 [N, H, W].
        masks: uint8 [N, H, W] in {0, 1, 255}: normal, defect, no part of the image; None without ground truth.
        sizes: int64 [N, 2], height and width of each image, px; None where all have the size of the maps.
        pixel_scale: Map values of an ordinary normal pixel and of the pixel threshold; None without calibration.
    """

    maps: np.ndarray
    masks: np.ndarray | None
    sizes: np.ndarray | None
    pixel_scale: tuple[float, float] | None

    def own(self, arrays: np.ndarray, i: int) -> np.ndarray:
        """Return the part of a map or mask that belongs to image i."""
        if self.sizes is None:
            return arrays[i]
        height, width = self.sizes[i]
        return arrays[i, :height, :width]


@dataclass(frozen=True)
class GalleryMethod:
    """One method on one class.

    Attributes:
        label: The method.
        seed: Of the run that is shown; None where it is not known.
        scores: float64 [N], raw image scores.
        normalized: float64 [N], the run's threshold at 0.5; None without calibration.
        read_maps: Reads the maps; None in place of them where there are none.
        no_maps: Why there are none, for a reader.
    """

    label: str
    seed: int | None
    scores: np.ndarray
    normalized: np.ndarray | None
    read_maps: Callable[[], MethodMaps | None]
    no_maps: str

    @property
    def values(self) -> np.ndarray:
        """What the threshold of the page is compared with, [N]."""
        return self.scores if self.normalized is None else self.normalized

    def start(self, labels: np.ndarray) -> float:
        """Return where the threshold of the page stands first.

        Args:
            labels: bool [N], True for defective.

        Returns:
            The run's threshold; without one, a quantile of the good images.
        """
        if self.normalized is not None:
            return NORMALIZED_THRESHOLD
        good = self.scores[~labels]
        return float(np.quantile(good if len(good) else self.scores, GOOD_QUANTILE, method="higher"))


@dataclass(frozen=True)
class GalleryClass:
    """One class.

    Attributes:
        name: Row name of the class.
        paths: [N] of the test images, relative to the data set.
        defect_types: [N].
        labels: bool [N], True for defective.
        methods: Those that finished the class.
        crop: Returns what was scored of an image, uint8 [H, W, 3]; None where it is not to be had.
        folder: Where the images were, for a reader.
    """

    name: str
    paths: Sequence[str]
    defect_types: Sequence[str]
    labels: np.ndarray
    methods: Sequence[GalleryMethod]
    crop: Callable[[str], np.ndarray | None]
    folder: str


def gallery_data(classes: Sequence[GalleryClass], max_bytes: int) -> list[dict[str, Any]]:
    """Return the JSON values that report.js reads.

    Args:
        classes: What is shown.
        max_bytes: What all pictures may take, as they stand in the page. Classes share it; of a class that needs more,
            the images on which methods err or disagree most have pictures, all others their scores alone.
    """
    rows = []
    for number, shown in enumerate(classes):
        row, used = _class_row(shown, max_bytes // (len(classes) - number))
        max_bytes -= used
        rows.append(row)
    return rows


def display_text(name: str) -> str:
    """Return a name as text that any file holds and that cannot hide or turn around what stands beside it."""
    return "".join(c if c.isprintable() else "?" for c in name.encode("utf-8", "backslashreplace").decode("utf-8"))


def _class_row(shown: GalleryClass, max_bytes: int) -> tuple[dict[str, Any], int]:
    """Return the values of a class, and what its pictures take."""
    images: list[dict[str, Any]] = [
        {"path": display_text(path), "type": display_text(str(kind)), "bad": bool(bad), "maps": {}}
        for path, kind, bad in zip(shown.paths, shown.defect_types, shown.labels, strict=True)
    ]
    methods = [_method_row(method, shown, images) for method in shown.methods]
    ranks = _ranks(shown.methods)
    highest = max(1, len(shown.paths) - 1)
    mean_rank, disagreement = ranks.mean(axis=0) / highest, np.ptp(ranks, axis=0) / highest
    for i, path in enumerate(progress(shown.paths, f"{shown.name}: images")):
        image, crop = images[i], shown.crop(path)
        image |= {"rank": float(mean_rank[i]), "disagreement": float(disagreement[i])}
        if crop is not None:
            image["picture"] = _data_uri(image_bytes(crop))
            image.setdefault("size", list(crop.shape[1::-1]))
    used = _keep_within(images, _importance(shown, disagreement), max_bytes)
    row = {
        "name": display_text(shown.name),
        "folder": display_text(shown.folder),
        "methods": methods,
        "images": images,
    }
    return row, used


def _method_row(method: GalleryMethod, shown: GalleryClass, images: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the values of a method; its maps are entered into `images`."""
    found = method.read_maps()
    row: dict[str, Any] = {
        "label": display_text(method.label),
        "seed": method.seed,
        "calibrated": method.normalized is not None,
        "values": method.values.tolist(),
        "scores": method.scores.tolist(),
        "start": method.start(shown.labels),
        "scale": None,
        "noMaps": method.no_maps if found is None else "",
    }
    if found is not None:
        number = str(shown.methods.index(method))
        scale = _enter_maps(number, found, shown, images)
        row["scale"] = {"low": scale.low, "threshold": scale.threshold, "calibrated": found.pixel_scale is not None}
    return row


def _enter_maps(number: str, found: MethodMaps, shown: GalleryClass, images: list[dict[str, Any]]) -> HeatScale:
    """Give every image the heat map of a method, its outline and its area; return the colour scale."""
    maps = [found.own(found.maps, i) for i in range(len(images))]
    if found.pixel_scale is not None:
        scale = HeatScale.up_to_threshold(*found.pixel_scale)
    else:
        scale = display_scale(maps, ~shown.labels, GOOD_QUANTILE)
    for i, anomaly_map in enumerate(progress(maps, f"{shown.name}: heat maps")):
        image = images[i]
        valid = np.ones(anomaly_map.shape, bool)
        if found.masks is not None:
            mask = found.own(found.masks, i)
            valid = mask <= 1
            image.setdefault("truth", outline_path(mask == 1, 0.5))
            image.setdefault("truthPx", int((mask == 1).sum()))
        image.setdefault("size", list(anomaly_map.shape[::-1]))
        entry: dict[str, Any] = {"heat": _data_uri(heat_bytes(anomaly_map, scale))}
        if scale.threshold is not None:
            area = int((anomaly_map[valid] > scale.threshold).sum())
            entry |= {"areaPx": area, "areaShare": area / max(1, int(valid.sum()))}
            entry["outline"] = outline_path(anomaly_map, scale.threshold)
        image["maps"][number] = entry
    return scale


def _importance(shown: GalleryClass, disagreement: np.ndarray) -> np.ndarray:
    """Return the images in the order in which they need pictures: most wrong decisions, then most disagreement."""
    wrong = np.zeros(len(shown.labels))
    for method in shown.methods:
        wrong += (method.values > method.start(shown.labels)) != shown.labels
    return np.lexsort((-disagreement, -wrong))


def _ranks(methods: Sequence[GalleryMethod]) -> np.ndarray:
    """Return [M, N] the rank of each image among the scores of a method, from 0; ties share the middle of theirs."""
    ranks = []
    for method in methods:
        ordered = np.sort(method.scores)
        lower, not_higher = (np.searchsorted(ordered, method.scores, side) for side in ("left", "right"))
        ranks.append((lower + not_higher - 1) / 2)
    return np.array(ranks)


def _keep_within(images: list[dict[str, Any]], order: np.ndarray, max_bytes: int) -> int:
    """Take pictures away from the images that do not fit, the last in `order` first; return what the others take."""
    used = 0
    for i in order:
        image = images[i]
        parts = [image.get("picture", ""), image.get("truth", "")]
        parts += [text for entry in image["maps"].values() for text in (entry["heat"], entry.get("outline", ""))]
        size = sum(map(len, parts))
        if used + size > max_bytes:
            image.pop("picture", None)
            image.pop("truth", None)
            for entry in image["maps"].values():  # the areas are numbers, and stay
                entry.pop("heat")
                entry.pop("outline", None)
            image["left_out"] = True
        else:
            used += size
    return used


def _data_uri(content: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(content).decode('ascii')}"

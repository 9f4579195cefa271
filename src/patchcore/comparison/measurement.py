"""The numbers of one class for every method: stored metrics, bootstrap samples, defect types and sizes."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from patchcore.comparison.alignment import class_runs
from patchcore.comparison.methods import Method
from patchcore.comparison.runs import ClassRun, ImageScores
from patchcore.errors import ConfigurationError, DataError
from patchcore.evaluation.defect_sizes import SizeQuartile, size_quartiles
from patchcore.evaluation.metrics import image_metrics
from patchcore.evaluation.paired import NUM_RESAMPLES, stratified_weights, weighted_image_metrics
from patchcore.evaluation.pixel_histograms import (
    PixelHistograms,
    pixel_histograms,
    region_numbers,
    weighted_pixel_metrics,
)
from patchcore.evaluation.summary import class_metrics, defect_metrics
from patchcore.runtime import progress

METRICS = {
    "instance_auroc": "image AUROC",
    "full_pixel_auroc": "full pixel AUROC",
    "anomaly_pixel_auroc": "anomaly pixel AUROC",
    "full_pro": "PRO",
    "image_f1_max": "image F1 (max)",
}
PIXEL_METRICS = ("full_pixel_auroc", "anomaly_pixel_auroc", "full_pro")
DEFECT_METRICS = ("instance_auroc", "full_pixel_auroc", "full_pro", "recall")
BOOTSTRAP_SEED = 0
GOOD = "good"


@dataclass
class MethodOnClass:
    """One method on one class.

    Attributes:
        label: The method.
        seeds: Seed of each run.
        metrics: Per seed one value for each of METRICS; None is a blank cell.
        resampled: Per metric and seed its value on each resample, [R]; None where it could not be resampled.
        by_defect: Per seed one row per defect type, with DEFECT_METRICS.
        by_size: Per seed one row per quartile of size, with DEFECT_METRICS.
        timings: Per seed the times and sizes of timings.csv.
    """

    label: str
    seeds: list[int | None] = field(default_factory=list)
    metrics: list[dict[str, float | None]] = field(default_factory=list)
    resampled: dict[str, list[np.ndarray | None]] = field(default_factory=dict)
    by_defect: list[list[dict[str, Any]]] = field(default_factory=list)
    by_size: list[list[dict[str, Any]]] = field(default_factory=list)
    timings: list[Mapping[str, Any]] = field(default_factory=list)


@dataclass
class ClassMeasurement:
    """All methods on one class.

    Attributes:
        row_name: The class.
        labels: bool [N], True for defective.
        methods: One entry per method that finished the class.
        quartiles: Of defect size; empty where sizes are not known.
        without_maps: Run folders with pixel metrics, but without maps.
        damaged_maps: One sentence for each run whose maps are damaged; it counts as a run without maps.
        without_sizes: Run folders, if none of them says how large the defects are.
    """

    row_name: str
    labels: np.ndarray
    methods: list[MethodOnClass]
    quartiles: list[SizeQuartile]
    without_maps: list[Path]
    damaged_maps: list[str]
    without_sizes: list[Path]

    def of(self, label: str) -> MethodOnClass | None:
        """Return the numbers of one method; None where it has not finished the class."""
        return next((entry for entry in self.methods if entry.label == label), None)


def measure_class(row_name: str, methods: Sequence[Method], reduced: bool, image_only: bool) -> ClassMeasurement:
    """Collect the numbers of one class.

    Args:
        row_name: The class.
        methods: Aligned: every run of the class has the same images in the same order.
        reduced: Whether images were left out, so that the metrics are computed anew.
        image_only: Leave pixel metrics blank.

    Returns:
        The numbers; the bootstrap has a seed of its own for each class, so that they do not depend on other classes.

    Raises:
        ConfigurationError: Maps of two runs are over different masks.
    """
    runs = list(class_runs(methods, row_name))
    labels = runs[0].images.labels
    rng = np.random.default_rng([BOOTSTRAP_SEED, zlib.crc32(row_name.encode("utf-8", "surrogateescape"))])
    weights = stratified_weights(labels, NUM_RESAMPLES, rng)
    defect_px = next((run.images.defect_px for run in runs if run.images.defect_px is not None), None)
    quartiles = size_quartiles(defect_px, labels) if defect_px is not None and not image_only else []
    meter = _Meter(_Masks(row_name), weights, quartiles, reduced, image_only)
    entries = [
        meter.measure(method.label, method.classes[row_name]) for method in methods if row_name in method.classes
    ]
    without_sizes = [] if image_only or defect_px is not None else [run.run.folder for run in runs]
    return ClassMeasurement(row_name, labels, entries, quartiles, meter.without_maps, meter.damaged_maps, without_sizes)


@dataclass
class _Meter:
    """What the measurement of every method on a class has in common.

    Attributes:
        masks: The masks of the class.
        weights: float32 [R, N], the resamples of its test images.
        quartiles: Its defective images by size.
        reduced: Whether images were left out, so that the metrics are computed anew.
        image_only: Leave pixel metrics blank.
        without_maps: Run folders met that have pixel metrics, but no maps.
        damaged_maps: One sentence for each run met whose maps are damaged.
    """

    masks: _Masks
    weights: np.ndarray
    quartiles: Sequence[SizeQuartile]
    reduced: bool
    image_only: bool
    without_maps: list[Path] = field(default_factory=list)
    damaged_maps: list[str] = field(default_factory=list)

    def measure(self, label: str, runs: Sequence[ClassRun]) -> MethodOnClass:
        """Return the numbers of one method, given its runs of the class."""
        entry = MethodOnClass(label, resampled={metric: [] for metric in METRICS})
        for run in progress(runs, f"{self.masks.row_name}: {label}"):
            maps = None if self.image_only else self._maps(run)
            histograms = None
            if maps is not None and self.masks.masks is not None:
                histograms = pixel_histograms(maps, self.masks.masks, self.masks.regions)
            metrics, by_defect = self._metrics(run, maps)
            entry.seeds.append(run.seed)
            entry.metrics.append({metric: metrics[metric] for metric in METRICS})
            entry.by_defect.append(by_defect)
            entry.by_size.append(_by_size(run, self.quartiles, histograms))
            entry.timings.append(run.result.timings)
            resampled = weighted_image_metrics(run.images.scores, run.images.labels, self.weights)
            resampled |= weighted_pixel_metrics(histograms, self.weights) if histograms is not None else {}
            for metric in METRICS:
                entry.resampled[metric].append(resampled.get(metric))
        return entry

    def _maps(self, run: ClassRun) -> np.ndarray | None:
        """Return the maps of a run; where there are none to be read, note why."""
        try:
            maps = self.masks.checked_maps(run)
        except DataError as error:
            self.damaged_maps.append(f"the maps of {self.masks.row_name} of {run.run.folder} are left out: {error}")
            return None
        if maps is None and run.result.metrics["full_pixel_auroc"] is not None:
            self.without_maps.append(run.run.folder)
        return maps

    def _metrics(self, run: ClassRun, maps: np.ndarray | None) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
        """Return the metrics of a run and those of its defect types: the stored ones, or anew on fewer images."""
        if self.reduced:
            metrics, rows = _new_metrics(run.images, maps, None if maps is None else self.masks.masks)
        else:
            metrics, rows = dict(run.result.metrics), [dict(row) for row in run.result.by_defect]
        blank: dict[str, Any] = dict.fromkeys(PIXEL_METRICS) if self.image_only else {}
        return metrics | blank, [row | blank for row in rows]


class _Masks:
    """The masks of one class, which all maps must share, with the regions in them."""

    def __init__(self, row_name: str) -> None:
        self.row_name = row_name
        self.masks: np.ndarray | None = None
        self.regions: list[np.ndarray] = []
        self.folder = ""

    def checked_maps(self, run: ClassRun) -> np.ndarray | None:
        """Return the maps [N, H, W] of a run, None where it has none."""
        found = run.maps_and_masks()
        if found is None:
            return None
        maps, masks = found
        if self.masks is None:
            self.masks, self.regions, self.folder = masks, region_numbers(masks), str(run.run.folder)
        elif not np.array_equal(masks, self.masks):
            raise ConfigurationError(
                f"{self.folder!r} and {str(run.run.folder)!r} have different masks of {self.row_name}: name runs on "
                "one version of the data set, or --image_metrics_only"
            )
        return maps


def _new_metrics(
    images: ImageScores, maps: np.ndarray | None, masks: np.ndarray | None
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """Compute the metrics of some images and those of their defect types."""
    metrics = class_metrics(images.scores, images.labels, maps, masks, None)
    rows = defect_metrics(images.scores, [str(t) for t in images.defect_types], maps, masks, None, GOOD)
    for row in rows:  # the decisions are stored, the threshold is not
        chosen = images.defect_types == row["defect_type"]
        row["recall"] = None if images.decisions is None else float(images.decisions[chosen].mean())
    return metrics, rows


def _by_size(
    run: ClassRun, quartiles: Sequence[SizeQuartile], histograms: PixelHistograms | None
) -> list[dict[str, Any]]:
    """Return the numbers of each quartile of defect size, against all good images."""
    images, rows = run.images, []
    for quartile in quartiles:
        chosen = np.concatenate([np.flatnonzero(~images.labels), quartile.images])
        row: dict[str, Any] = dict.fromkeys(DEFECT_METRICS)
        row["instance_auroc"] = image_metrics(images.scores[chosen], images.labels[chosen]).auroc
        if images.decisions is not None:
            row["recall"] = float(images.decisions[quartile.images].mean())
        if histograms is not None:
            weights = np.zeros((1, len(images.paths)))
            weights[0, chosen] = 1
            pixel = weighted_pixel_metrics(histograms, weights)
            row |= {name: float(pixel[name][0]) for name in ("full_pixel_auroc", "full_pro")}
        rows.append({"quartile": quartile.number, "num_images": len(quartile.images), **row})
    return rows

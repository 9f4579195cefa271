"""What a stored model says of one image, in the frame of the whole image.

The frame is that of the upright image: the EXIF orientation is applied, pixel (0, 0) is at the top left.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from skimage.measure import regionprops

from patchcore.datasets.images import Placement, map_on_image
from patchcore.evaluation.metrics import label_regions


@dataclass(frozen=True)
class Region:
    """A connected region above the pixel threshold (8 neighbours), px of the upright image.

    Attributes:
        left, top, width, height: Smallest box around it.
        area_px: Pixels above the threshold.
        peak: Highest value of the anomaly map in it, raw.
    """

    left: int
    top: int
    width: int
    height: int
    area_px: int
    peak: float


@dataclass(frozen=True)
class Findings:
    """Where in an image the defects are.

    Attributes:
        anomaly_map: float32 [H, W], raw; NaN where nothing was inspected.
        inspected: bool [H, W]: inside the crop of the model and the region of interest.
        defect_mask: bool [H, W], above the pixel threshold; None without calibration.
        regions: Its connected regions, largest first; None without calibration.
    """

    anomaly_map: np.ndarray
    inspected: np.ndarray
    defect_mask: np.ndarray | None
    regions: tuple[Region, ...] | None

    @property
    def inspected_px(self) -> int:
        return int(self.inspected.sum())

    @property
    def defect_px(self) -> int | None:
        return None if self.defect_mask is None else int(self.defect_mask.sum())

    @property
    def defect_share(self) -> float | None:
        """Share of the inspected pixels that are above the threshold; None where there are none or no threshold."""
        return None if self.defect_px is None or not self.inspected_px else self.defect_px / self.inspected_px


@dataclass(frozen=True)
class ImageResult:
    """What a model says of one image.

    Attributes:
        path: The file; None for what came as an array.
        height, width: Size of the upright image, px.
        score: Raw image score, higher is more anomalous.
        normalized: The score in (0, 1), 0.5 at the threshold; None without calibration.
        is_anomalous: Whether the score is above the threshold; None without calibration.
        threshold: Image threshold; None without calibration.
        pixel_threshold: Threshold of the anomaly map; None without calibration or maps.
        model_map: float32 [crop_height, crop_width], the map as the model gives it; None for methods without maps.
        placement: The resize and crop that the image had.
        roi: bool [H, W], what counts; None for the whole image.
    """

    path: Path | None
    height: int
    width: int
    score: float
    normalized: float | None
    is_anomalous: bool | None
    threshold: float | None
    pixel_threshold: float | None
    model_map: np.ndarray | None
    placement: Placement
    roi: np.ndarray | None = None

    def findings(self) -> Findings | None:
        """Work out map, mask and regions in the frame of the image; None for methods without maps.

        Computed at each call, as maps of many large images would fill the memory.
        """
        if self.model_map is None:
            return None
        anomaly_map = map_on_image(self.model_map, self.placement, self.height, self.width)
        if self.roi is not None:
            anomaly_map[~self.roi] = np.nan
        inspected = ~np.isnan(anomaly_map)
        if self.pixel_threshold is None:
            return Findings(anomaly_map, inspected, None, None)
        defect = anomaly_map > self.pixel_threshold  # False where NaN
        return Findings(anomaly_map, inspected, defect, _regions(defect, anomaly_map))

    @property
    def anomaly_map(self) -> np.ndarray | None:
        """float32 [H, W] in the frame of the image, raw, NaN where nothing was inspected; None without maps."""
        found = self.findings()
        return found.anomaly_map if found else None

    @property
    def defect_mask(self) -> np.ndarray | None:
        """bool [H, W], above the pixel threshold; None without calibration or maps."""
        found = self.findings()
        return found.defect_mask if found else None

    @property
    def regions(self) -> tuple[Region, ...] | None:
        """Connected regions above the pixel threshold, largest first; None without calibration or maps."""
        found = self.findings()
        return found.regions if found else None


def _regions(defect: np.ndarray, anomaly_map: np.ndarray) -> tuple[Region, ...]:
    """Measure the connected regions of a mask [H, W], largest first."""
    rows, columns = np.flatnonzero(defect.any(axis=1)), np.flatnonzero(defect.any(axis=0))
    if not len(rows):
        return ()
    top, left = int(rows[0]), int(columns[0])
    box = slice(top, rows[-1] + 1), slice(left, columns[-1] + 1)  # labelling the rest of a large image takes time
    labels, _ = label_regions(defect[box].astype(np.uint8))
    regions = [
        Region(
            left + int(region.bbox[1]),
            top + int(region.bbox[0]),
            int(region.bbox[3] - region.bbox[1]),
            int(region.bbox[2] - region.bbox[0]),
            int(region.area),
            float(region.intensity_max),
        )
        for region in regionprops(labels, anomaly_map[box])
    ]
    return tuple(sorted(regions, key=lambda region: (-region.area_px, region.top, region.left)))

"""The numbers of one class: from scores, maps and masks to the columns of the tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from patchcore.evaluation.metrics import image_metrics, label_regions, pixel_metrics, threshold_metrics
from patchcore.runtime import progress


def class_metrics(
    scores: np.ndarray,
    labels: np.ndarray,
    maps: np.ndarray | None,
    masks: np.ndarray | None,
    threshold: float | None,
) -> dict[str, float | None]:
    """Compute the columns of results.csv for one class.

    Args:
        scores: float [N], raw image scores.
        labels: bool [N], True for anomalous images.
        maps: float32 [N, H, W], raw anomaly maps; None for methods without maps.
        masks: uint8 [N, H, W] in {0, 1, 255}; None for classes without ground truth.
        threshold: Image threshold; None without calibration.

    Returns:
        One value per column; None is a blank cell (undefined for these images).
    """
    image = image_metrics(scores, labels)
    metrics: dict[str, float | None] = {
        "instance_auroc": image.auroc,
        "image_ap": image.average_precision,
        "image_f1_max": image.f1_max,
    }
    pixel = pixel_metrics(maps, masks) if maps is not None and masks is not None else None
    metrics |= {
        "full_pixel_auroc": pixel.auroc if pixel else None,
        "full_pro": pixel.pro if pixel else None,
        "anomaly_pixel_auroc": pixel.anomaly_auroc if pixel else None,
        "anomaly_pro": pixel.anomaly_pro if pixel else None,
        "pixel_ap": pixel.average_precision if pixel else None,
        "pixel_f1_max": pixel.f1_max if pixel else None,
    }
    decision = threshold_metrics(scores, labels, threshold) if threshold is not None else None
    return metrics | {
        "precision": decision.precision if decision else None,
        "recall": decision.recall if decision else None,
        "f1": decision.f1 if decision else None,
    }


def defect_metrics(
    scores: np.ndarray,
    defect_types: Sequence[str],
    maps: np.ndarray | None,
    masks: np.ndarray | None,
    threshold: float | None,
    good: str,
) -> list[dict[str, Any]]:
    """Compute the rows of results_by_defect.csv: each defect type against all normal images.

    Args:
        scores: float [N], raw image scores.
        defect_types: Defect type of each image, `good` for normal ones.
        maps: As in `class_metrics`.
        masks: As in `class_metrics`.
        threshold: As in `class_metrics`.
        good: The name that marks normal images.

    Returns:
        One dictionary per defect type, sorted by name.
    """
    types = np.asarray(defect_types)
    rows: list[dict[str, Any]] = []
    for defect_type in progress(sorted(set(defect_types) - {good}), "metrics of each defect type"):
        chosen = np.flatnonzero((types == defect_type) | (types == good))
        metrics = class_metrics(
            scores[chosen],
            types[chosen] != good,
            maps[chosen] if maps is not None else None,
            masks[chosen] if masks is not None else None,
            threshold,
        )
        row: dict[str, Any] = {"defect_type": defect_type, "num_images": int((types == defect_type).sum())}
        of_type = masks[types == defect_type] if masks is not None else None
        row["num_regions"] = sum(label_regions(mask)[1] for mask in of_type) if of_type is not None else None
        rows.append(row | metrics)
    return rows

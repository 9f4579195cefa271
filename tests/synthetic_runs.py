"""Run folders as a run writes them, with made-up scores and maps of a chosen quality."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patchcore.evaluation.summary import class_metrics, defect_metrics
from patchcore.storage.run_folder import (
    DEFECT_COLUMNS,
    TIMING_COLUMNS,
    ClassResult,
    save_class_result,
    write_anomaly_maps,
    write_image_scores,
    write_run_config,
)

SIDE_PX = 32
PREPROCESSING = {"resize_px": 36, "imagesize_px": SIDE_PX, "resize_mode": "shorter", "max_side_px": None}
DEFECT_TYPES = ("dent", "scratch")
THRESHOLD = 1.5
PIXEL_SCALE = (0.0, 2.5)


def ground_truth(category: str, num_good: int, num_per_type: int) -> tuple[list[str], list[str], np.ndarray]:
    """Return paths, defect types and masks [N, S, S] of a class; every defect has another size."""
    paths = [f"{category}/test/good/{i:03d}.png" for i in range(num_good)]
    types = ["good"] * num_good
    masks = np.zeros((num_good + len(DEFECT_TYPES) * num_per_type, SIDE_PX, SIDE_PX), np.uint8)
    for i, defect_type in enumerate(DEFECT_TYPES):
        for j in range(num_per_type):
            masks[len(paths), 4 : 6 + i + 2 * j % 20, 6 : 10 + j % 20] = 1
            paths.append(f"{category}/test/{defect_type}/{j:03d}.png")
            types.append(defect_type)
    return paths, types, masks


def write_run(
    root: Path,
    name: str,
    classes: Sequence[str] = ("plate",),
    *,
    method: str = "patchcore",
    method_config: Mapping[str, Any] | None = None,
    config_of_class: Mapping[str, Any] | None = None,
    seed: int = 0,
    quality: float = 2.0,
    maps: bool = True,
    save_maps: bool = True,
    limit_train: int | None = None,
    unfinished: Sequence[str] = (),
    num_good: int = 8,
    num_per_type: int = 6,
    leave_out: Sequence[str] = (),
    calibrated: bool = True,
    defect_px: bool = True,
    preprocessing: Mapping[str, Any] = PREPROCESSING,
    latency_ms: float = 20.0,
    dataset: str = "mpdd",
    data_path: str | Path = "/data",
    command: str | None = None,
) -> Path:
    """Write one run folder; scores of defective images and defect pixels lie `quality` standard deviations higher.

    Args:
        root: Folder above it.
        name: Its name.
        classes: Its classes; those in `unfinished` are only announced in config.json.
        method_config: Configuration of the method for all classes.
        config_of_class: Instead of it, one configuration per class.
        maps: Whether the method has maps.
        save_maps: Whether they are stored.
        leave_out: Paths of test images that the run has not.
        calibrated: Whether there is a threshold.
        defect_px: Whether the scores have the column of that name.
        data_path: Where the images are said to be.
        command: What is said to have been typed.
    """
    folder = root / name
    config: dict[str, Any] = {
        "method": method,
        "dataset": {
            "name": dataset,
            "path": str(data_path),
            "categories": [*classes],
            "preprocessing": dict(preprocessing),
            "train_val_split": 1.0,
            "limit_train": limit_train,
            "limit_test": None,
        },
        "seed": seed,
        "calibration": "kfold" if calibrated else "none",
        "outputs": {"models": False, "segmentation_images": False, "anomaly_maps": save_maps},
    }
    if config_of_class is not None:
        config["method_config_of_class"] = dict(config_of_class)
    else:
        config["method_config"] = dict(method_config or {"num_nn": 1})
    environment = {"device": "cpu", "threads": 1} | ({"command": command} if command else {})
    write_run_config(folder, config, environment)
    for category in classes:
        if category in unfinished:
            continue
        paths, types, masks = ground_truth(category, num_good, num_per_type)
        kept = [i for i, path in enumerate(paths) if path not in leave_out]
        rng = np.random.default_rng([seed, *os.fsencode(name), *os.fsencode(category)])
        labels = np.array(types) != "good"
        scores = (rng.normal(0, 1, len(paths)) + quality * labels).astype(np.float32)[kept]
        all_maps = (rng.normal(0, 1, masks.shape) + quality * masks).astype(np.float32)[kept]
        paths, types, masks, labels = [paths[i] for i in kept], [types[i] for i in kept], masks[kept], labels[kept]
        row_name = f"{dataset}_{category}"
        threshold = THRESHOLD if calibrated else None
        own_maps, own_masks = (all_maps if maps else None), masks
        by_defect = defect_metrics(scores, types, own_maps, own_masks, threshold, "good")
        timings = dict.fromkeys(TIMING_COLUMNS, 1.0) | {
            "train_images": limit_train or 40,
            "train_seconds": 3.0 + seed,
            "latency_p50_ms": latency_ms + seed,
            "images_per_second": 1000 / latency_ms,
        }
        rows = [dict.fromkeys(DEFECT_COLUMNS) | {"num_regions_lost": 0} | row for row in by_defect]
        metrics = class_metrics(scores, labels, own_maps, own_masks, threshold)
        write_scores(folder / "anomaly_scores" / f"{row_name}.csv", paths, types, scores, masks, calibrated, defect_px)
        if maps and save_maps:
            pixel_scale = PIXEL_SCALE if calibrated else None
            maps_path = folder / "anomaly_scores" / f"{row_name}.npz"
            write_anomaly_maps(maps_path, all_maps, masks, paths, pixel_scale=pixel_scale)
        save_class_result(folder, ClassResult(row_name, metrics, rows, timings))
    return folder


def write_scores(
    path: Path,
    paths: Sequence[str],
    types: Sequence[str],
    scores: np.ndarray,
    masks: np.ndarray,
    calibrated: bool,
    defect_px: bool,
) -> None:
    """Write the image scores; the normalised ones put the threshold at 0.5."""
    z = scores.astype(np.float64) - THRESHOLD
    normalized = 0.5 * (1 + z / (1 + np.abs(z)))
    rows = [
        [
            paths[i],
            types[i],
            int(types[i] != "good"),
            float(scores[i]),
            float(normalized[i]) if calibrated else None,
            int(scores[i] > THRESHOLD) if calibrated else None,
            int(masks[i].sum()) if defect_px else None,
        ]
        for i in range(len(paths))
    ]
    write_image_scores(path, rows)


def write_images(root: Path, paths: Sequence[str], side_px: int = 40) -> None:
    """Write a picture for each of the paths: stripes that differ between images."""
    for i, path in enumerate(paths):
        rows = np.arange(side_px)[:, None, None]
        pixels = 120 + 60 * np.sin(rows / 3 + i) + np.zeros((side_px, side_px, 3))
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(root / path, format="PNG")

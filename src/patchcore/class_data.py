"""The images of one class: opened as a run asks for them, and what resize and crop cost of their defects."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np

from patchcore.configs import DatasetConfig
from patchcore.datasets.images import crop_labels, place
from patchcore.datasets.inspection import DatasetSplit, InspectionDataset
from patchcore.datasets.registry import dataset_class
from patchcore.evaluation.metrics import label_regions

LOGGER = logging.getLogger(__name__)


def open_dataset(config: DatasetConfig, category: str, split: DatasetSplit, seed: int) -> InspectionDataset:
    """Return the images of a class and split; the seed draws the held-out and the limited ones."""
    limit = config.limit_test if split is DatasetSplit.TEST else config.limit_train
    return dataset_class(config.name)(
        config.path,
        category,
        split,
        config.preprocessing,
        train_val_split=config.train_val_split,
        limit=limit,
        seed=seed,
    )


def open_validation(config: DatasetConfig, path: str, category: str) -> InspectionDataset:
    """Return the labelled images of a class that choose thresholds: all of `test` below a folder of their own."""
    return open_dataset(replace(config, path=path, limit_test=None), category, DatasetSplit.TEST, seed=0)


def count_lost_regions(test: InspectionDataset, by_defect: list[dict[str, Any]]) -> None:
    """Add to each defect type how many regions of its full-size masks resize and crop emptied."""
    lost = dict.fromkeys((row["defect_type"] for row in by_defect), 0)
    empty = 0
    for index, record in enumerate(test.records):
        if record.mask_path is None or record.defect_type not in lost:
            continue
        mask = test.full_mask(index)
        labels, num_regions = label_regions(mask)
        empty += num_regions == 0
        placement = place(mask.shape[0], mask.shape[1], test.preprocessing)
        kept = np.unique(crop_labels(labels, placement, padding=0))
        lost[record.defect_type] += num_regions - int((kept > 0).sum())
    for row in by_defect:
        row["num_regions_lost"] = lost[row["defect_type"]] if test.has_masks else None
    if empty:
        LOGGER.warning(
            "%s: %d mask(s) of anomalous images are empty: their pixels count as normal", test.category, empty
        )
    total = sum(lost.values())
    if total:
        LOGGER.warning("%s: resize and crop emptied %d defect region(s), which PRO leaves out", test.category, total)

"""The facts of a class in numbers, as they stand in exploration.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from patchcore.configs import RESIZE_MODES, PreprocessingConfig
from patchcore.datasets.exploration import TEST, TRAIN, ClassFacts, ImageFacts, MaskFacts, duplicates
from patchcore.datasets.images import place
from patchcore.datasets.inspection import GOOD
from patchcore.datasets.problems import Problem

MAX_FILES = 100  # of a problem, and groups of duplicates: a set of 100,000 images may have as many of either


def class_summary(facts: ClassFacts, preprocessing: PreprocessingConfig, root: Path) -> dict[str, Any]:
    """Return what exploration.json says of a class.

    Args:
        facts: What was found of it.
        preprocessing: Resize and crop that the figures of `crops` are for.
        root: Folder of the data set; files are named relative to it.

    Returns:
        counts: {split: {defect type: number of images}}.
        sizes, modes: {"<width>x<height>" or Pillow mode: number of images}, of the images that can be read.
        num_unreadable, num_turned_by_exif, num_transparent: Numbers of images.
        has_masks: Whether a run has pixel metrics.
        defects: {defect type: `defect_summary`}.
        crops: {resize mode: `crop_summary`}.
        colours: {"train good" and so on: mean and standard deviation over images of their mean colour}.
        num_duplicate_groups, duplicates: Images that read as the same pixels; the first MAX_FILES groups.
    """
    readable = [i for i in facts.images if i.pixels is not None]
    groups = duplicates(facts.images)
    return {
        "counts": {split: dict(_counts(facts.of(split))) for split in (TRAIN, TEST)},
        "sizes": dict(Counter(f"{i.pixels.width}x{i.pixels.height}" for i in readable if i.pixels).most_common()),
        "modes": dict(Counter(i.pixels.form.mode for i in readable if i.pixels).most_common()),
        "num_unreadable": len(facts.images) - len(readable),
        "num_turned_by_exif": sum(i.pixels.form.is_turned for i in readable if i.pixels),
        "num_transparent": sum(i.pixels.form.is_transparent for i in readable if i.pixels),
        "has_masks": facts.has_masks,
        "defects": {name: defect_summary(_masks(facts, name)) for name in _counts(facts.of(TEST)) if name != GOOD},
        "crops": {mode: crop_summary(facts, preprocessing, mode) for mode in RESIZE_MODES},
        "colours": {name: _colours(images) for name, images in grouped(facts).items()},
        "num_duplicate_groups": len(groups),
        "duplicates": [[relative(i.record.path, root) for i in group] for group in groups[:MAX_FILES]],
    }


def problem_summary(problem: Problem, root: Path) -> dict[str, Any]:
    """Return what exploration.json says of a problem; its first MAX_FILES files are named."""
    return {
        "severity": problem.severity,
        "kind": problem.kind,
        "class": problem.category,
        "found": problem.found,
        "consequence": problem.consequence,
        "remedy": problem.remedy,
        "num_files": len(problem.files),
        "files": [relative(path, root) for path in problem.files[:MAX_FILES]],
    }


def relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def grouped(facts: ClassFacts) -> dict[str, list[ImageFacts]]:
    """Return the images by what the distributions compare."""
    return {
        "train good": facts.of(TRAIN),
        "test good": facts.of(TEST, good=True),
        "test anomalous": facts.of(TEST, good=False),
    }


def defect_summary(masks: Sequence[MaskFacts]) -> dict[str, Any]:
    """Return the sizes of the defects that some masks mark.

    Args:
        masks: Masks that can be used.

    Returns:
        num_masks, num_empty, num_regions: Numbers; regions are 8-connected, of the full-size masks.
        defect_fraction: Quartiles of the share of an image that is defect, over the masks that mark any.
        region_area_px: Quartiles of the areas of regions.
    """
    marked = [mask for mask in masks if mask.defect_px]
    areas = sum((mask.region_areas for mask in marked), Counter[int]())
    return {
        "num_masks": len(masks),
        "num_empty": len(masks) - len(marked),
        "num_regions": areas.total(),
        "defect_fraction": _quartiles(Counter(mask.defect_fraction for mask in marked)),
        "region_area_px": _quartiles(areas),
    }


def crop_summary(facts: ClassFacts, preprocessing: PreprocessingConfig, mode: str) -> dict[str, Any]:
    """Return what one resize mode cuts off.

    Returns:
        area_lost_fraction: Mean share of an image's area; None without images.
        defect_px_lost_fraction: Share of all defect pixels; None without any.
        num_regions, num_regions_lost: Defect regions, and those of which no pixel is left.
        num_masks_emptied: Masks of which nothing is left.
    """
    config = PreprocessingConfig(preprocessing.resize_px, preprocessing.imagesize_px, mode)
    lost_areas = [place(i.pixels.height, i.pixels.width, config).lost_fraction for i in facts.images if i.pixels]
    pairs = [(i.mask, i.mask.crops[mode]) for i in facts.images if i.mask is not None and mode in i.mask.crops]
    defect_px = sum(mask.defect_px for mask, _ in pairs)
    return {
        "area_lost_fraction": float(np.mean(lost_areas)) if lost_areas else None,
        "defect_px_lost_fraction": sum(loss.defect_px for _, loss in pairs) / defect_px if defect_px else None,
        "num_regions": sum(mask.region_areas.total() for mask, _ in pairs),
        "num_regions_lost": sum(loss.num_regions for _, loss in pairs),
        "num_masks_emptied": sum(loss.is_emptied for _, loss in pairs),
    }


def _counts(images: Sequence[ImageFacts]) -> Counter[str]:
    return Counter(i.record.defect_type for i in images)


def _masks(facts: ClassFacts, defect_type: str) -> list[MaskFacts]:
    """Return the usable masks of a defect type."""
    images = (i for i in facts.of(TEST) if i.record.defect_type == defect_type)
    return [i.mask for i in images if i.mask is not None and i.mask.error is None]


def _colours(images: Sequence[ImageFacts]) -> dict[str, list[float]] | None:
    """Return mean and standard deviation over images of their mean colour; None without images."""
    means = np.array([i.pixels.mean_rgb for i in images if i.pixels is not None])  # [N, 3]
    if not len(means):
        return None
    return {"mean_rgb": means.mean(axis=0).tolist(), "std_rgb": means.std(axis=0).tolist()}


def _quartiles(counts: Mapping[Any, int]) -> list[float] | None:
    """Return minimum, quartiles and maximum of values that occur so often; None without any.

    A quartile is the smallest value with at least that share of all values at or below it.
    """
    if not counts:
        return None
    values = np.array(sorted(counts), dtype=np.float64)
    ends = np.cumsum([counts[value] for value in sorted(counts)])
    places = np.searchsorted(ends, np.array((0, 0.25, 0.5, 0.75, 1)) * ends[-1])
    return values[places].tolist()

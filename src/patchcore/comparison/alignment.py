"""The same images, masks and resolution for every method, or an error that names what differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from patchcore.comparison.methods import Method
from patchcore.comparison.runs import ClassRun
from patchcore.errors import ConfigurationError

NAMED_FILES = 3  # of those that one run has and the other lacks
RESOLUTION_FIELDS = ("resize_px", "imagesize_px", "resize_mode", "max_side_px")


def row_names(methods: Sequence[Method]) -> list[str]:
    """Return the classes that some method has finished, in the order of the runs."""
    ordered = dict.fromkeys(name for method in methods for name in method.settings)
    return [name for name in ordered if any(name in method.classes for method in methods)]


def class_runs(methods: Sequence[Method], row_name: str) -> Iterator[ClassRun]:
    """Yield all finished runs of a class."""
    for method in methods:
        yield from method.classes.get(row_name, [])


def require_same_resolution(methods: Sequence[Method]) -> None:
    """Raise ConfigurationError if the masks of a class cannot be the same for all methods."""
    for row_name in row_names(methods):
        first, *others = class_runs(methods, row_name)
        for other in others:
            if other.setting.preprocessing != first.setting.preprocessing:
                raise ConfigurationError(
                    f"{str(first.run.folder)!r} has {_text(first.setting.preprocessing)}, "
                    f"{str(other.run.folder)!r} has {_text(other.setting.preprocessing)}: pixel metrics of {row_name} "
                    "are over other masks; name runs of one resolution, or --image_metrics_only"
                )


def align_images(methods: Sequence[Method], intersect: bool) -> dict[str, bool]:
    """Give all runs of a class the same test images in the same order.

    Args:
        methods: Their class runs are replaced.
        intersect: Keep the images that all runs of a class have, instead of refusing others.

    Returns:
        Per row name whether images were left out, so that stored metrics are of other images.

    Raises:
        ConfigurationError: Runs of a class are of different images, call the same image good and defective, or are of
            different masks.
    """
    reduced = {}
    for row_name in row_names(methods):
        runs = list(class_runs(methods, row_name))
        common = set(runs[0].images.paths).intersection(*(run.images.paths for run in runs))
        different = next((run for run in runs if set(run.images.paths) != set(runs[0].images.paths)), None)
        if different is not None and not intersect:
            raise ConfigurationError(_difference_text(row_name, runs[0], different))
        if not common:
            raise ConfigurationError(f"the runs of {row_name} have no test image in common: name runs on one data set")
        reduced[row_name] = any(len(run.images.paths) > len(common) for run in runs)
        paths = sorted(common)
        for method in methods:
            found = method.classes.get(row_name, [])
            method.classes[row_name] = [replace(run, images=run.images.of(paths)) for run in found]
            if not found:
                del method.classes[row_name]
        _require_same_ground_truth(row_name, list(class_runs(methods, row_name)))
    return reduced


def _difference_text(row_name: str, first: ClassRun, other: ClassRun) -> str:
    parts = []
    for here, there in ((first, other), (other, first)):
        alone = sorted(set(here.images.paths) - set(there.images.paths))
        if alone:
            more = f" and {len(alone) - NAMED_FILES} more" if len(alone) > NAMED_FILES else ""
            parts.append(f"{str(here.run.folder)!r} alone has {', '.join(alone[:NAMED_FILES])}{more}")
    return (
        f"the test images of {row_name} differ: {'; '.join(parts)}: name runs on the same images, "
        "or --intersect to compare on those that all have"
    )


def _require_same_ground_truth(row_name: str, runs: Sequence[ClassRun]) -> None:
    """Raise ConfigurationError if aligned runs disagree on labels, or on the size of a defect at equal resolution."""
    first = runs[0]
    for run in runs[1:]:
        same_masks = run.setting.preprocessing == first.setting.preprocessing
        sizes, own = first.images.defect_px, run.images.defect_px
        wrong = run.images.labels != first.images.labels
        if same_masks and sizes is not None and own is not None:
            wrong = wrong | (sizes != own)
        if wrong.any():
            path = first.images.paths[int(np.flatnonzero(wrong)[0])]
            raise ConfigurationError(
                f"{str(first.run.folder)!r} and {str(run.run.folder)!r} disagree on label or mask of "
                f"{int(wrong.sum())} test image(s) of {row_name}, such as {path}: name runs on the same data"
            )


def _text(preprocessing: Mapping[str, object]) -> str:
    named = [f"{name.removesuffix('_px')} {preprocessing.get(name)}" for name in RESOLUTION_FIELDS]
    return " ".join(named)

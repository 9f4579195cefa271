"""What report.html shows of a comparison."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from patchcore.comparison.alignment import row_names
from patchcore.comparison.methods import Method
from patchcore.comparison.runs import ClassRun, Run
from patchcore.config_json import config_from_dict
from patchcore.configs import PreprocessingConfig
from patchcore.errors import DataError
from patchcore.report_html.gallery import GalleryClass, GalleryMethod, MethodMaps, gallery_data
from patchcore.report_html.page import ReportContent, RunDescription, render_page
from patchcore.report_html.pictures import ImageFolder

LOGGER = logging.getLogger(__name__)

MAX_PICTURE_BYTES = 22_000_000  # leaves room for plots and numbers in a page of 25 MB
PLOT_TITLES = {
    "performance_bars.png": "Metrics per class and method",
    "roc_curves.png": "ROC curves",
    "pr_curves.png": "Precision and recall",
    "score_distributions.png": "Distribution of the scores of good and defective images",
    "pareto.png": "Quality against latency",
    "fewshot_curve.png": "Quality over the number of training images",
}
NOT_SAVED = "no heat maps: the run was made without --save_anomaly_scores"
NO_MAPS = "no heat maps: the method has none, or the run was made without --save_anomaly_scores"
DAMAGED = "no heat maps: their file is damaged"
OTHER_RESOLUTION = "no heat maps: the run has another resolution than the first one"


def report_page(summary: Mapping[str, Any], methods: Sequence[Method], plots: Mapping[str, bytes]) -> bytes:
    """Return the page of a comparison.

    Args:
        summary: What summary.json holds.
        methods: The methods with their aligned runs.
        plots: Name and content of the plots.
    """
    classes = [_gallery_class(name, methods) for name in row_names(methods)]
    gallery = gallery_data(classes, MAX_PICTURE_BYTES)
    content = ReportContent(
        summary=summary,
        plots=[(title, plots[name]) for name, title in PLOT_TITLES.items() if name in plots],
        gallery=gallery,
        runs=[_description(run, method) for method in methods for run in method.runs],
        notes=list(_notes(gallery, methods)),
        made_at=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    return render_page(content)


def _gallery_class(row_name: str, methods: Sequence[Method]) -> GalleryClass:
    """Return what the gallery shows of a class: of each method the run with the first seed."""
    shown = [(method.label, method.classes[row_name][0]) for method in methods if row_name in method.classes]
    first = shown[0][1]
    preprocessing = config_from_dict(PreprocessingConfig, first.setting.preprocessing, str(first.run.folder))
    folder = ImageFolder(Path(first.run.config["dataset"]["path"]), preprocessing)
    return GalleryClass(
        name=row_name,
        paths=first.images.paths,
        defect_types=[str(kind) for kind in first.images.defect_types],
        labels=first.images.labels,
        methods=[_gallery_method(label, run, first) for label, run in shown],
        crop=folder.crop,
        folder=str(folder.root),
    )


def _gallery_method(label: str, run: ClassRun, first: ClassRun) -> GalleryMethod:
    same = run.setting.preprocessing == first.setting.preprocessing
    reason = OTHER_RESOLUTION
    if same and run.maps_path.is_file():
        reason = DAMAGED
    elif same:
        reason = NO_MAPS if run.result.metrics["full_pixel_auroc"] is None else NOT_SAVED
    return GalleryMethod(
        label, run.seed, run.images.scores, run.images.normalized, lambda: _maps(run) if same else None, reason
    )


def _maps(run: ClassRun) -> MethodMaps | None:
    """Return the maps of a run, None where there are none to be read; the comparison has named damaged ones."""
    try:
        stored = run.stored_maps()
    except DataError as error:
        LOGGER.debug("%s", error)
        return None
    return None if stored is None else MethodMaps(stored.maps, stored.masks, stored.sizes, stored.pixel_scale)


def _description(run: Run, method: Method) -> RunDescription:
    return RunDescription(str(run.folder), method.label, run.environment.get("command"), run.config)


def _notes(gallery: Sequence[Mapping[str, Any]], methods: Sequence[Method]) -> Iterator[str]:
    """Yield what is not to be seen in the gallery, and why."""
    if any(len(runs) > 1 for method in methods for runs in method.classes.values()):
        yield "Images: scores, decisions and heat maps are those of the first seed of each method."
    for row in gallery:
        left_out = sum("left_out" in image for image in row["images"])
        missing = sum("picture" not in image for image in row["images"]) - left_out
        if left_out:
            yield (
                f"{row['name']}: {left_out} of {len(row['images'])} images are shown without pictures, to keep the "
                "page below 25 MB; those with pictures are the ones that methods get wrong or disagree on most."
            )
        if missing:
            yield (
                f"{row['name']}: {missing} of {len(row['images'])} test images are not in {row['folder']}, "
                "where the run read them: the gallery is without them."
            )
    without = [(m["label"], m["noMaps"], row["name"]) for row in gallery for m in row["methods"] if m["noMaps"]]
    for label, reason in dict.fromkeys((label, reason) for label, reason, _ in without):
        names = ", ".join(name for *found, name in without if found == [label, reason])
        yield f"{label} ({names}): {reason}."

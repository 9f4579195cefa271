"""From run folders to a comparison: read, align, measure, write."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patchcore.comparison.alignment import align_images, class_runs, require_same_resolution, row_names
from patchcore.comparison.measurement import ClassMeasurement, measure_class
from patchcore.comparison.methods import Method, enter_classes, fewshot_family, fewshot_label, group_runs
from patchcore.comparison.report import report_page
from patchcore.comparison.runs import NOT_KNOWN, read_classes, read_runs
from patchcore.comparison.summary import FORMAT, build_summary
from patchcore.errors import ConfigurationError
from patchcore.evaluation.comparison_tables import markdown_report, overview, plain_rows, result_rows
from patchcore.evaluation.fewshot import FEWSHOT_METRICS, FewShotPoint, Observation, fewshot_points
from patchcore.evaluation.plots.bars import performance_picture
from patchcore.evaluation.plots.curves import fewshot_picture
from patchcore.evaluation.plots.pictures import png_bytes
from patchcore.evaluation.plots.rankings import (
    ScoredClass,
    ScoredMethod,
    distribution_picture,
    precision_recall_picture,
    roc_picture,
)
from patchcore.evaluation.plots.tradeoff import pareto_picture
from patchcore.evaluation.report import text_table
from patchcore.presets.published import published_numbers
from patchcore.storage import run_folder
from patchcore.storage.files import escaped, write_bytes, write_csv, write_json
from patchcore.storage.run_folder import MEAN_ROW

LOGGER = logging.getLogger(__name__)

NAMED_FOLDERS = 6  # in a note
SUMMARY_FILE = "summary.json"
TABLES = {
    "comparison_speed.csv": "speed",
    "comparison_by_defect.csv": "by_defect",
    "comparison_by_size.csv": "by_size",
}
FEWSHOT_FILE = "fewshot_curve.png"
REPORT_FILE = "report.html"
FILES = (
    "comparison.md",
    "comparison.csv",
    *TABLES,
    "performance_bars.png",
    "roc_curves.png",
    "pr_curves.png",
    "score_distributions.png",
    "pareto.png",
    FEWSHOT_FILE,
    REPORT_FILE,
)


@dataclass(frozen=True)
class ComparisonOptions:
    """What a comparison may be asked for.

    Attributes:
        intersect: Compare on the test images that all runs of a class have, instead of refusing other ones.
        published: Put published numbers of the same classes beside the measured ones.
        image_metrics_only: Leave pixel metrics blank, so that runs of different resolution can be compared.
        html: Write report.html as well.
    """

    intersect: bool = False
    published: bool = False
    image_metrics_only: bool = False
    html: bool = False


@dataclass(frozen=True)
class Comparison:
    """A comparison in memory.

    Attributes:
        summary: What summary.json holds, without the list of files.
        methods: The methods with their aligned runs.
        fewshot: Points of each group of methods that differ in --limit_train alone.
        incomplete: What is left out, one sentence each.
    """

    summary: dict[str, Any]
    methods: list[Method]
    fewshot: dict[str, list[FewShotPoint]]
    incomplete: list[str]


def compare_results(
    folders: Sequence[Path], out: Path, options: ComparisonOptions, announce: Callable[[str], None]
) -> bool:
    """Compare run folders and write tables, plots and summary.json.

    Args:
        folders: Run folders of any method, several seeds each.
        out: Where the files go; those of an earlier comparison are replaced, others are left alone.
        options: What is asked for.
        announce: Receives the overview and the path, meant for the user.

    Returns:
        Whether every class of every run was there, maps undamaged; what is not is named and left out.

    Raises:
        ConfigurationError: A folder holds no run, the runs cannot be compared, or `out` is no place for files; nothing
            has been written then.
    """
    run_folder.require_output_folder(out)
    comparison = make_comparison(folders, options)
    write_comparison(comparison, out, options.html)
    announce(text_table(*overview(comparison.summary)))
    announce(f"comparison: {out}")
    if options.html:
        announce(f"report: {out / REPORT_FILE}")
    return not comparison.incomplete


def make_comparison(folders: Sequence[Path], options: ComparisonOptions) -> Comparison:
    """Read and measure; see `compare_results`."""
    known = published_numbers() if options.published else []
    runs = read_runs(folders)
    methods = group_runs(runs)
    finished, incomplete = [], []
    for run in runs:
        found, left_out = read_classes(run)
        finished += found
        incomplete += left_out
    if not finished:
        raise ConfigurationError("no class is finished in any of the run folders: let at least one run end")
    for sentence in incomplete:
        LOGGER.warning("%s", sentence)
    enter_classes(methods, finished)
    methods = [method for method in methods if method.classes]
    if not options.image_metrics_only:
        require_same_resolution(methods)
    reduced = align_images(methods, options.intersect)
    measurements = [
        measure_class(name, methods, reduced[name], options.image_metrics_only) for name in row_names(methods)
    ]
    for sentence in (sentence for m in measurements for sentence in m.damaged_maps):
        LOGGER.warning("%s", sentence)
        incomplete.append(sentence)
    published = [number for number in known if number.row_name in row_names(methods)]
    notes = [*incomplete, *_notes(methods, measurements, reduced, options)]
    if options.published and not published:
        notes.append("no published numbers of these classes are known")
    for note in notes[len(incomplete) :]:
        LOGGER.info("note: %s", note)
    summary = build_summary(methods, measurements, published, notes)
    fewshot = _fewshot(methods, measurements)
    summary["fewshot"] = list(_fewshot_rows(fewshot))
    return Comparison(escaped(summary), methods, fewshot, incomplete)


def write_comparison(comparison: Comparison, out: Path, html: bool = False) -> None:
    """Write all files of a comparison, those of an earlier one in `out` that have no successor removed."""
    contents = dict(_contents(comparison))  # first: what fails here has replaced no file
    if html:
        contents[REPORT_FILE] = report_page(comparison.summary, comparison.methods, contents)
    stale = _files_of_earlier(out) - contents.keys()
    write_json(out / SUMMARY_FILE, {**comparison.summary, "files": sorted(contents)})
    for name, content in contents.items():
        if isinstance(content, bytes):
            write_bytes(out / name, content)
        else:
            write_csv(out / name, *content)
    for name in stale:
        (out / name).unlink(missing_ok=True)


def scored_classes(methods: Sequence[Method]) -> list[ScoredClass]:
    """Return the image scores that the curves are drawn from."""
    classes = []
    for name in row_names(methods):
        scored = []
        for number, method in enumerate(methods):
            images = [run.images for run in method.classes.get(name, [])]
            normalized = [i.normalized for i in images if i.normalized is not None]
            if images:
                whole = normalized if len(normalized) == len(images) else None
                scored.append(ScoredMethod(number, method.label, [i.scores for i in images], whole))
        labels = next(class_runs(methods, name)).images.labels
        classes.append(ScoredClass(name, labels, scored))
    return classes


def _contents(comparison: Comparison) -> Iterator[tuple[str, Any]]:
    """Yield name and content of each file: bytes, or header and rows of a csv file."""
    summary = comparison.summary
    yield "comparison.md", markdown_report(summary).encode("utf-8", "surrogateescape")
    yield "comparison.csv", result_rows(summary)
    for name, part in TABLES.items():
        if summary[part]:
            yield name, plain_rows(summary[part])
    classes = scored_classes(comparison.methods)
    yield "roc_curves.png", png_bytes(roc_picture(classes))
    yield "pr_curves.png", png_bytes(precision_recall_picture(classes))
    yield "score_distributions.png", png_bytes(distribution_picture(classes))
    for name, picture in (("performance_bars.png", performance_picture), ("pareto.png", pareto_picture)):
        image = picture(summary)
        if image is not None:
            yield name, png_bytes(image)
    if comparison.fewshot:
        yield FEWSHOT_FILE, png_bytes(fewshot_picture(_curve_points(comparison.fewshot), MEAN_ROW))


def _files_of_earlier(out: Path) -> set[str]:
    """Return the files that a comparison in `out` has written, by its own account."""
    try:
        earlier = json.loads((out / SUMMARY_FILE).read_text(encoding="utf-8"))
        listed = earlier["files"] if earlier["format"] == FORMAT else []
        return {name for name in listed if name in FILES}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _notes(
    methods: Sequence[Method],
    measurements: Sequence[ClassMeasurement],
    reduced: Mapping[str, bool],
    options: ComparisonOptions,
) -> Iterator[str]:
    """Yield what a reader must know of blank cells and of what is compared."""
    if options.image_metrics_only:
        yield "pixel metrics are left out (--image_metrics_only)"
    for measurement in measurements:
        missing = [m.label for m in methods if measurement.row_name not in m.classes]
        if missing:
            yield f"{measurement.row_name} is not there for {', '.join(missing)}: the means are over other classes"
        if reduced[measurement.row_name]:
            count = len(measurement.labels)
            yield f"{measurement.row_name}: all metrics are computed anew on the {count} test images that all runs have"
    without_maps = _folders(folder for m in measurements for folder in m.without_maps)
    if without_maps:
        blank = "no interval of a pixel metric and no pixel metric by defect size"
        yield f"without maps there is {blank}: run {without_maps} with --save_anomaly_scores"
    without_sizes = _folders(folder for m in measurements for folder in m.without_sizes)
    if without_sizes:
        names = ", ".join(m.row_name for m in measurements if m.without_sizes)
        yield (
            f"{names}: no table by defect size, as no run recorded defect_px (no masks, or an older version): "
            f"evaluate one again, of {without_sizes}"
        )
    places = {(run.environment.get("device"), run.environment.get("threads")) for m in methods for run in m.runs}
    if len(places) > 1:
        shown = ", ".join(sorted(f"{device} with {threads} thread(s)" for device, threads in places))
        yield f"the runs were made on different devices or threads ({shown}): their times and memory do not compare"
    counts = {len(runs) for m in methods for runs in m.classes.values()}
    if len(counts) > 1:
        yield f"the means are over {min(counts)} to {max(counts)} seeds"


def _folders(folders: Iterable[Path]) -> str:
    """Name some of the folders, each once, and say how many more there are."""
    names = list(dict.fromkeys(str(folder) for folder in folders))
    more = f" and {len(names) - NAMED_FOLDERS} more" if len(names) > NAMED_FOLDERS else ""
    return ", ".join(names[:NAMED_FOLDERS]) + more


def _fewshot(methods: Sequence[Method], measurements: Sequence[ClassMeasurement]) -> dict[str, list[FewShotPoint]]:
    """Return the points of each group of methods that differ in --limit_train alone, by its label."""
    families: dict[str, list[Method]] = {}
    for method in methods:
        if method.limit_train == NOT_KNOWN:
            continue
        families.setdefault(fewshot_family(method), []).append(method)
    varied = [family for family in families.values() if len({m.limit_train for m in family}) > 1]
    labels = [fewshot_label(family[0]) for family in varied]
    if len(set(labels)) < len(labels):
        labels = [f"{label} #{number}" for number, label in enumerate(labels, start=1)]
    return {
        label: fewshot_points(list(_observations(family, measurements)), MEAN_ROW)
        for label, family in zip(labels, varied, strict=True)
    }


def _fewshot_rows(fewshot: Mapping[str, Sequence[FewShotPoint]]) -> Iterator[dict[str, Any]]:
    for label, points in fewshot.items():
        for p in points:
            counts = {"limit_train": p.limit, "num_images": p.num_images, "num_seeds": p.num_seeds}
            yield {"method": label, "class": p.row_name, **counts, **p.means}


def _curve_points(fewshot: Mapping[str, Sequence[FewShotPoint]]) -> list[FewShotPoint]:
    """Return what the curve shows: a line per class, or per method, over its classes, where there are several."""
    if len(fewshot) == 1:
        return list(next(iter(fewshot.values())))
    points: list[FewShotPoint] = []
    for label, own in fewshot.items():
        means = [p for p in own if p.row_name == MEAN_ROW] or own
        points += [replace(p, row_name=label) for p in means]
    return points


def _observations(family: Sequence[Method], measurements: Sequence[ClassMeasurement]) -> Iterator[Observation]:
    """Yield the classes of every run with what was measured: the stored metrics may be of other images."""
    for method in family:
        for measurement in measurements:
            entry, limit = measurement.of(method.label), method.limit_train
            if entry is None or isinstance(limit, str):
                continue
            for seed, metrics, timings in zip(entry.seeds, entry.metrics, entry.timings, strict=True):
                if timings["train_images"]:
                    own = {metric: metrics[metric] for metric in FEWSHOT_METRICS}
                    num_images = float(timings["train_images"])
                    yield Observation(measurement.row_name, limit, num_images, seed, own)

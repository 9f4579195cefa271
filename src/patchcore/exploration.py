"""Look at a data set before a run: numbers, pictures, and what will go wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from patchcore.configs import RESIZE_MODES, DatasetConfig, PreprocessingConfig
from patchcore.datasets.exploration import TEST, TRAIN, ClassFacts, ImageFacts, crop_window, explore_class
from patchcore.datasets.exploration_summary import class_summary, grouped, problem_summary
from patchcore.datasets.images import place, read_image, read_mask
from patchcore.datasets.inspection import GOOD, choose_categories, subfolders
from patchcore.datasets.problems import ERROR, Problem, find_problems, no_class
from patchcore.datasets.registry import dataset_class
from patchcore.evaluation.metrics import label_regions
from patchcore.evaluation.plots.exploration import ClassDistribution, Tile, contact_sheet, distributions_picture
from patchcore.evaluation.plots.pictures import picture_names, png_bytes
from patchcore.evaluation.report import text_table
from patchcore.storage.files import escaped, write_bytes, write_json
from patchcore.storage.run_folder import require_output_folder

SCHEMA_VERSION = 1
TILES = 6  # images of one kind on a contact sheet
FILES_SHOWN = 3  # of a problem, in text

Announce = Callable[[str], None]


def explore_dataset(dataset: DatasetConfig, out: Path, announce: Announce) -> bool:
    """Explore every class of a data set; one that is broken hides none of the others.

    Writes exploration.json, exploration.md, distributions.png and one contact_sheet_<class>.png per class to `out`;
    those that are there are replaced. exploration.json holds

        schema_version, dataset, path, preprocessing
        classes: {class: see `patchcore.datasets.exploration_summary.class_summary`}
        problems: [see `patchcore.datasets.exploration_summary.problem_summary`], by class, errors first

    Args:
        dataset: Name, path, classes and preprocessing are used.
        out: Where the files go.
        announce: Receives the text meant for the user.

    Returns:
        Whether a run would get through every class.

    Raises:
        ConfigurationError: The path or a class is missing, or `out` is no place for files.
    """
    categories = choose_categories(dataset, dataset_class(dataset.name).categories)
    require_output_folder(out)
    root = Path(dataset.path)
    sheets = picture_names([("contact_sheet", category) for category in categories])
    summaries: dict[str, dict[str, Any]] = {}
    problems: list[Problem] = []
    distributions: list[ClassDistribution] = []
    for category, sheet in zip(categories, sheets, strict=True):
        facts = explore_class(root, category, dataset.preprocessing, label_regions)
        problems += find_problems(facts, dataset.preprocessing)
        summaries[category] = class_summary(facts, dataset.preprocessing, root)
        distributions.append(_distribution(facts, summaries[category]))
        write_bytes(out / sheet, png_bytes(contact_sheet(category, list(_sheet_rows(facts, dataset.preprocessing)))))
    if not dataset.categories:
        problems += [no_class(folder) for folder in subfolders(root) if folder.name not in categories]
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "dataset": dataset.name,
        "path": dataset.path,
        "preprocessing": asdict(dataset.preprocessing),
        "classes": summaries,
        "problems": [problem_summary(problem, root) for problem in problems],
    }
    write_bytes(out / "distributions.png", png_bytes(distributions_picture(distributions)))
    write_bytes(out / "exploration.md", markdown(content).encode("utf-8", "surrogateescape"))
    write_json(out / "exploration.json", escaped(content))
    announce(text_table(*overview(content)))
    for problem in content["problems"]:
        announce(problem_text(problem))
    announce(f"exploration: {out}")
    return not any(problem.severity == ERROR for problem in problems)


def overview(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of classes, from what exploration.json holds."""
    mode = content["preprocessing"]["resize_mode"]
    header = ["class", "train", "test good", "anomalous", "size, px", "mode", "defect px", "regions"]
    header += [f"cut off ({mode})", "regions lost", "errors", "warnings"]
    rows = []
    for category, summary in content["classes"].items():
        test, crop = summary["counts"][TEST], summary["crops"][mode]
        fractions = [d["defect_fraction"] for d in summary["defects"].values() if d["defect_fraction"]]
        severities = Counter(p["severity"] for p in content["problems"] if p["class"] == category)
        rows.append(
            [
                printable(category),
                str(sum(summary["counts"][TRAIN].values())),
                str(test.get(GOOD, 0)),
                str(sum(test.values()) - test.get(GOOD, 0)),
                _most_frequent(summary["sizes"]),
                _most_frequent(summary["modes"]),
                f"{percent(min(f[0] for f in fractions))} to {percent(max(f[-1] for f in fractions))}"
                if fractions
                else "",
                str(crop["num_regions"]),
                percent(crop["defect_px_lost_fraction"]),
                str(crop["num_regions_lost"]),
                str(severities["error"]),
                str(severities["warning"]),
            ]
        )
    return header, rows


def problem_text(problem: Mapping[str, Any]) -> str:
    """Return a problem of exploration.json as lines for a terminal."""
    lines = [f"{problem['severity']}: {problem['class']}: {problem['kind']}: {problem['found']}"]
    lines.append(f"    {problem['consequence']}; remedy: {problem['remedy']}")
    if problem["files"]:
        lines.append(f"    {', '.join(_files_shown(problem))}")
    return "\n".join(printable(line) for line in lines)


def _files_shown(problem: Mapping[str, Any]) -> list[str]:
    """Return the first files of a problem, and how many more there are."""
    more = problem["num_files"] - FILES_SHOWN
    return [*problem["files"][:FILES_SHOWN], *([f"{more} more"] if more > 0 else [])]


def markdown(content: Mapping[str, Any]) -> str:
    """Return what exploration.json holds as Markdown: classes, defect types, crops, problems."""
    blocks = ["# Data set", f"`{content['dataset']}`, {_cell(content['path'])}", _table(*overview(content))]
    header = ["class", "defect type", "images", "masks", "empty", "regions", "share of the image", "region, px"]
    rows = []
    for category, summary in content["classes"].items():
        for name, defect in summary["defects"].items():
            shares, areas = defect["defect_fraction"], defect["region_area_px"]
            numbers = [summary["counts"][TEST][name], defect["num_masks"], defect["num_empty"], defect["num_regions"]]
            share_text = " / ".join(percent(shares[i]) for i in (0, 2, 4)) if shares else ""
            area_text = " / ".join(f"{areas[i]:.0f}" for i in (0, 2, 4)) if areas else ""
            rows.append([category, name, *map(str, numbers), share_text, area_text])
    blocks += ["## Defect types", "Shares and areas: smallest / median / largest.", _table(header, rows)]
    sizes = content["preprocessing"]
    header = ["class", "resize mode", "area cut off", "defect pixels cut off", "regions lost", "masks emptied"]
    rows = []
    for category, summary in content["classes"].items():
        for mode in RESIZE_MODES:
            crop = summary["crops"][mode]
            lost = f"{crop['num_regions_lost']} of {crop['num_regions']}"
            shares = [percent(crop["area_lost_fraction"]), percent(crop["defect_px_lost_fraction"])]
            rows.append([category, mode, *shares, lost, str(crop["num_masks_emptied"])])
    title = f"## What `--resize {sizes['resize_px']} --imagesize {sizes['imagesize_px']}` would cut off"
    blocks += [title, _table(header, rows), "## Problems"]
    header = ["severity", "class", "what", "found", "consequence", "remedy", "files"]
    rows = []
    for p in content["problems"]:
        texts = [p[key] for key in ("severity", "class", "kind", "found", "consequence", "remedy")]
        rows.append([*texts, ", ".join(_files_shown(p))])
    blocks.append(_table(header, rows) if rows else "None found.")
    return "\n\n".join(blocks) + "\n"


def percent(fraction: float | None) -> str:
    """Return a share with two digits that count; blank where there is none."""
    if fraction is None:
        return ""
    return f"{100 * fraction:.2g} %" if fraction < 0.995 else f"{100 * fraction:.0f} %"


def printable(text: str) -> str:
    """Return a text on one line, without what a terminal would obey."""
    return "".join(c if c.isprintable() or "\udc80" <= c <= "\udcff" else "?" for c in text)


def _most_frequent(counts: Mapping[str, int]) -> str:
    """Return the most frequent value, and how many others there are."""
    if not counts:
        return ""
    return max(counts, key=lambda value: counts[value]) + (f" +{len(counts) - 1}" if len(counts) > 1 else "")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Return a text that neither ends a cell nor begins HTML or other Markdown."""
    return "".join(f"\\{c}" if c in "\\|`*_<>[]" else c for c in printable(text))


def _distribution(facts: ClassFacts, summary: Mapping[str, Any]) -> ClassDistribution:
    """Return what the distributions show of a class."""
    groups = grouped(facts)
    pixels = {name: [i.pixels for i in images if i.pixels is not None] for name, images in groups.items()}
    return ClassDistribution(
        facts.category,
        counts={name: len(images) for name, images in groups.items()},
        sizes=Counter((p.width, p.height) for group in pixels.values() for p in group),
        defect_fractions=[i.mask.defect_fraction for i in facts.images if i.mask is not None],
        brightness={name: [p.brightness for p in group] for name, group in pixels.items()},
        warmth={name: [p.mean_rgb[0] - p.mean_rgb[2] for p in group] for name, group in pixels.items()},
        crop_losses={mode: crop["defect_px_lost_fraction"] for mode, crop in summary["crops"].items()},
    )


def _sheet_rows(facts: ClassFacts, preprocessing: PreprocessingConfig) -> Iterator[tuple[str, list[Tile]]]:
    """Yield title and images of each row of a contact sheet."""
    test = facts.of(TEST)
    kinds = [(TRAIN, GOOD, facts.of(TRAIN))]
    for name in sorted({i.record.defect_type for i in test}, key=lambda name: (name != GOOD, name)):
        kinds.append((TEST, name, [i for i in test if i.record.defect_type == name]))
    for split, name, images in kinds:
        usable = [i for i in images if i.error is None]
        chosen = np.unique(np.linspace(0, len(usable) - 1, min(TILES, len(usable))).round().astype(int))
        title = f"{split} / {name}: {len(images)} images" + (
            f", {len(images) - len(usable)} cannot be used" if len(usable) < len(images) else ""
        )
        yield title, [_tile(usable[i], preprocessing) for i in chosen]


def _tile(facts: ImageFacts, preprocessing: PreprocessingConfig) -> Tile:
    image = np.asarray(read_image(facts.record.path))
    mask = read_mask(facts.mask.path) if facts.mask is not None and facts.mask.error is None else None
    height, width = image.shape[:2]
    window = crop_window(height, width, place(height, width, preprocessing))
    return Tile(facts.record.path.name, image, mask, window)

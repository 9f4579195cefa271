"""Few-shot tables: metrics against the number of training images, over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

FEWSHOT_METRICS = {"instance_auroc": "image AUROC", "full_pixel_auroc": "pixel AUROC", "full_pro": "PRO"}
CURVE_METRICS = ("instance_auroc", "full_pro")


@dataclass(frozen=True)
class Observation:
    """One class of one run.

    Attributes:
        row_name: The class.
        limit: Number of training images that was asked for; None asks for all.
        num_images: Number of images really trained on; for a mean over classes their mean.
        seed: Seed of the run; None where it is not known.
        metrics: Value of each of FEWSHOT_METRICS; None is a blank cell.
    """

    row_name: str
    limit: int | None
    num_images: float
    seed: int | None
    metrics: Mapping[str, float | None]


@dataclass(frozen=True)
class FewShotPoint:
    """One class at one number of training images.

    Attributes:
        row_name: The class.
        limit: The smallest limit that gave this number of images.
        num_images: Number of images trained on.
        num_seeds: Number of runs that the values are over.
        means: Mean over seeds of each of FEWSHOT_METRICS; None is a blank cell.
        stds: Standard deviation over seeds (n - 1); None where one seed has a value.
    """

    row_name: str
    limit: int | None
    num_images: float
    num_seeds: int
    means: dict[str, float | None]
    stds: dict[str, float | None]


def fewshot_points(observations: Sequence[Observation], mean_row: str) -> list[FewShotPoint]:
    """Average over seeds, class by class and over the classes.

    A limit above the number of images there are trains on all of them: such runs join the point of the smallest
    limit that did, and a seed is counted once. The mean over classes is taken within each run that finished every
    class seen in any run, so that all its points are over the same classes; it is left out where there is one class.

    Args:
        observations: Finished classes; each (class, limit, seed) once.
        mean_row: Row name of the mean over classes.

    Returns:
        Points, classes in order of appearance and the mean last, by rising number of images.
    """
    ordered = sorted(observations, key=_limit_order)  # stable: the order of the classes stays
    names = list(dict.fromkeys(o.row_name for o in observations))
    groups: dict[tuple[str, float], dict[int | None, Observation]] = {}
    for o in [*ordered, *_class_means(ordered, names, mean_row)]:
        groups.setdefault((o.row_name, o.num_images), {}).setdefault(o.seed, o)
    rank = {name: position for position, name in enumerate([*names, mean_row])}
    keys = sorted(groups, key=lambda key: (rank[key[0]], key[1]))
    return [_point(list(groups[key].values())) for key in keys]


def _limit_order(o: Observation) -> float:
    return np.inf if o.limit is None else o.limit


def _class_means(observations: Sequence[Observation], names: Sequence[str], mean_row: str) -> list[Observation]:
    """Return the mean over classes of each run that has them all."""
    if len(names) < 2:
        return []
    runs: dict[tuple[int | None, int | None], list[Observation]] = {}
    for o in observations:
        runs.setdefault((o.limit, o.seed), []).append(o)
    means = []
    for (limit, seed), classes in runs.items():
        if len(classes) == len(names):
            num_images = sum(o.num_images for o in classes) / len(classes)
            metrics = {metric: _mean([o.metrics[metric] for o in classes]) for metric in FEWSHOT_METRICS}
            means.append(Observation(mean_row, limit, num_images, seed, metrics))
    return means


def _point(runs: Sequence[Observation]) -> FewShotPoint:
    """Average the runs of one class at one number of images."""
    first = runs[0]
    values = {metric: [o.metrics[metric] for o in runs] for metric in FEWSHOT_METRICS}
    means = {metric: _mean(column) for metric, column in values.items()}
    stds = {metric: _std(column) for metric, column in values.items()}
    return FewShotPoint(first.row_name, first.limit, first.num_images, len(runs), means, stds)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _std(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None


def mean_and_std_text(point: FewShotPoint, metric: str) -> str:
    """Return a cell for a reader: `0.990 ± 0.003`, without ± where one seed has a value, empty where none has."""
    mean, std = point.means[metric], point.stds[metric]
    if mean is None:
        return ""
    return f"{mean:.3f}" if std is None else f"{mean:.3f} ± {std:.3f}"


def images_text(num_images: float) -> str:
    """Return a number of images: whole where it is, as every one but that of a mean over classes is."""
    return f"{num_images:g}"


def seeds_text(points: Sequence[FewShotPoint]) -> str:
    """Return over how many seeds the points are, such as `3 seeds` or `1 to 3 seeds`."""
    counts = sorted({p.num_seeds for p in points})
    if len(counts) > 1:
        return f"{counts[0]} to {counts[-1]} seeds"
    return f"{counts[0]} seed{'s' * (counts[0] > 1)}"


def point_rows(points: Sequence[FewShotPoint]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a table for a terminal, one row per point."""
    header = ["class", "images", "seeds", *FEWSHOT_METRICS.values()]
    rows = [
        [p.row_name, images_text(p.num_images), str(p.num_seeds), *(mean_and_std_text(p, m) for m in FEWSHOT_METRICS)]
        for p in points
    ]
    return header, rows


def markdown_tables(points: Sequence[FewShotPoint]) -> str:
    """Write one Markdown table per metric: classes down, numbers of images asked for across.

    Args:
        points: As `fewshot_points` returns them.

    Returns:
        Markdown; where a class has fewer images than were asked for, the cell says how many.
    """
    limits = sorted({p.limit for p in points}, key=lambda limit: np.inf if limit is None else limit)
    names = list(dict.fromkeys(p.row_name for p in points))
    cells = {(p.row_name, p.limit): p for p in points}
    over = seeds_text(points)
    blocks = []
    for metric, title in FEWSHOT_METRICS.items():
        lines = [
            f"## {title} by number of training images, mean ± standard deviation over {over}",
            "",
            _markdown_row(["class", *("all" if limit is None else str(limit) for limit in limits)]),
            _markdown_row(["---"] * (len(limits) + 1)),
        ]
        for name in names:
            row = [_markdown_cell(cells.get((name, limit)), metric) for limit in limits]
            lines.append(_markdown_row([name.replace("|", "\\|"), *row]))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _markdown_cell(point: FewShotPoint | None, metric: str) -> str:
    text = mean_and_std_text(point, metric) if point else ""
    if point is None or not text or point.num_images == point.limit:
        return text
    return f"{text} ({images_text(point.num_images)} images)"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

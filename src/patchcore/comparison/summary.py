"""The comparison as data: what summary.json holds and every table and plot is made of.

docs/summary_schema.md describes the fields.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from patchcore.comparison.measurement import (
    BOOTSTRAP_SEED,
    DEFECT_METRICS,
    METRICS,
    ClassMeasurement,
    MethodOnClass,
)
from patchcore.comparison.methods import Method
from patchcore.evaluation.paired import CONFIDENCE, NUM_RESAMPLES, standings
from patchcore.evaluation.pareto import non_dominated
from patchcore.evaluation.pixel_histograms import NUM_LEVELS
from patchcore.presets.published import PublishedNumber
from patchcore.storage.run_folder import MEAN_ROW, TIMING_COLUMNS

FORMAT = "patchcore comparison"
VERSION = 1
PARETO_METRICS = ("instance_auroc", "full_pro")

Row = dict[str, Any]


def build_summary(
    methods: Sequence[Method],
    measurements: Sequence[ClassMeasurement],
    published: Sequence[PublishedNumber],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Return the comparison as nested JSON values; `files` and `fewshot` are entered by the writer."""
    results = [*_class_results(measurements), *_mean_results(methods, measurements)]
    speed = _speed(measurements)
    return {
        "format": FORMAT,
        "version": VERSION,
        "bootstrap": {
            "resamples": NUM_RESAMPLES,
            "confidence": CONFIDENCE,
            "seed": BOOTSTRAP_SEED,
            "score_levels": NUM_LEVELS,
        },
        "metrics": dict(METRICS),
        "methods": [_method_row(method) for method in methods],
        "classes": [_class_row(measurement) for measurement in measurements],
        "results": results,
        "speed": speed,
        "pareto": _pareto(results, speed),
        "by_defect": [row for m in measurements for row in _by_defect(m)],
        "by_size": [row for m in measurements for row in _by_size(m)],
        "published": [vars(number) for number in published],
        "notes": list(notes),
    }


def _method_row(method: Method) -> Row:
    first = next(iter(method.settings.values()))
    return {
        "label": method.label,
        "method": first.method,
        "seeds": method.seeds,
        "limit_train": method.limit_train,
        "preprocessing": dict(first.preprocessing),
        "folders": [str(run.folder) for run in method.runs],
    }


def _class_row(measurement: ClassMeasurement) -> Row:
    num_defective = int(measurement.labels.sum())
    return {
        "name": measurement.row_name,
        "num_good": len(measurement.labels) - num_defective,
        "num_defective": num_defective,
    }


def _class_results(measurements: Sequence[ClassMeasurement]) -> Iterator[Row]:
    """Yield one row per class, metric and method that finished the class."""
    for measurement in measurements:
        for metric in METRICS:
            values = {m.label: [row[metric] for row in m.metrics] for m in measurement.methods}
            resampled = {m.label: _resampled(m, metric, list(_known_values(m, metric))) for m in measurement.methods}
            yield from _result_rows(measurement.row_name, metric, values, resampled)


def _mean_results(methods: Sequence[Method], measurements: Sequence[ClassMeasurement]) -> Iterator[Row]:
    """Yield the means over the classes that all methods have which have the metric at all."""
    if len(measurements) < 2:
        return
    by_place = {(m.label, measurement.row_name): m for measurement in measurements for m in measurement.methods}
    names = [measurement.row_name for measurement in measurements]
    for metric in METRICS:
        having = {
            method.label: {name for name in names if _has(by_place.get((method.label, name)), metric)}
            for method in methods
        }
        having = {label: classes for label, classes in having.items() if classes}
        common = [name for name in names if all(name in classes for classes in having.values())]
        if not common:
            continue
        values: dict[str, list[float | None]] = {}
        resampled: dict[str, np.ndarray | None] = {}
        for label in having:
            values[label], resampled[label] = _over_classes([by_place[label, name] for name in common], metric)
        for row in _result_rows(MEAN_ROW, metric, values, resampled):
            row["classes"] = list(common)
            yield row


def _has(entry: MethodOnClass | None, metric: str) -> bool:
    return entry is not None and any(row[metric] is not None for row in entry.metrics)


def _over_classes(entries: Sequence[MethodOnClass], metric: str) -> tuple[list[float | None], np.ndarray | None]:
    """Return the mean over classes of each seed that has them all, and the mean of the same seeds on each resample.

    Where no seed has them all, there is one value: the mean of the classes' means, each over its own seeds.
    """
    by_class = [_known_values(entry, metric) for entry in entries]
    whole = [seed for seed in by_class[0] if all(seed in values for values in by_class)]
    if whole:
        column = [_mean([values[seed] for values in by_class]) for seed in whole]
    else:
        column = [_mean([_mean(list(values.values())) for values in by_class])]
    samples = [_resampled(e, metric, whole or list(values)) for e, values in zip(entries, by_class, strict=True)]
    return column, _mean_sample(samples)


def _known_values(entry: MethodOnClass, metric: str) -> dict[int | None, float]:
    values = ((seed, row[metric]) for seed, row in zip(entry.seeds, entry.metrics, strict=True))
    return {seed: value for seed, value in values if value is not None}


def _resampled(entry: MethodOnClass, metric: str, seeds: Sequence[int | None]) -> np.ndarray | None:
    """Return the mean over some seeds on each resample [R]; None where one of them could not be resampled."""
    by_seed = dict(zip(entry.seeds, entry.resampled[metric], strict=True))
    return _mean_sample([by_seed[seed] for seed in seeds])


def _mean_sample(samples: Sequence[np.ndarray | None]) -> np.ndarray | None:
    known = [sample for sample in samples if sample is not None]
    return np.mean(known, axis=0) if known and len(known) == len(samples) else None


def _result_rows(
    row_name: str,
    metric: str,
    values: Mapping[str, Sequence[float | None]],
    resampled: Mapping[str, np.ndarray | None],
) -> Iterator[Row]:
    means = {label: _mean(column) for label, column in values.items()}
    standing = standings(means, resampled)
    for label, column in values.items():
        found = standing.get(label)
        yield {
            "class": row_name,
            "metric": metric,
            "method": label,
            "mean": means[label],
            "std": _std(column),
            "num_seeds": sum(value is not None for value in column),
            "status": found.status if found else None,
            "difference": found.difference if found else None,
            "interval": list(found.interval) if found and found.interval else None,
        }


def _speed(measurements: Sequence[ClassMeasurement]) -> list[Row]:
    """Return the medians over seeds for each class, and per method the medians over the classes' medians."""
    rows: list[Row] = []
    for measurement in measurements:
        for entry in measurement.methods:
            medians = {column: _median([t[column] for t in entry.timings]) for column in TIMING_COLUMNS}
            rows.append({"class": measurement.row_name, "method": entry.label, **medians})
    labels = dict.fromkeys(row["method"] for row in rows)
    for label in labels:
        own = [row for row in rows if row["method"] == label and row["class"] is not None]
        medians = {column: _median([row[column] for row in own]) for column in TIMING_COLUMNS}
        rows.append({"class": None, "method": label, **medians})
    return rows


def _pareto(results: Sequence[Row], speed: Sequence[Row]) -> list[Row]:
    """Return quality against latency, and which methods no other one beats in both."""
    latency = {row["method"]: row["latency_p50_ms"] for row in speed if row["class"] is None}
    rows = []
    several = any(row["class"] == MEAN_ROW for row in results)
    for metric in PARETO_METRICS:
        points = [
            (row["method"], latency[row["method"]], row["mean"])
            for row in results
            if row["metric"] == metric and (not several or row["class"] == MEAN_ROW)
        ]
        known = [p for p in points if p[1] is not None and p[2] is not None]
        optimal = non_dominated([p[1] for p in known], [p[2] for p in known])
        for (label, milliseconds, value), best in zip(known, optimal, strict=True):
            rows.append(
                {"metric": metric, "method": label, "latency_p50_ms": milliseconds, "value": value, "optimal": best}
            )
    return rows


def _by_defect(measurement: ClassMeasurement) -> Iterator[Row]:
    for entry in measurement.methods:
        types = dict.fromkeys(row["defect_type"] for rows in entry.by_defect for row in rows)
        for defect_type in types:
            found = [row for rows in entry.by_defect for row in rows if row["defect_type"] == defect_type]
            yield {
                "class": measurement.row_name,
                "defect_type": defect_type,
                "num_images": found[0]["num_images"],
                "method": entry.label,
                **{metric: _mean([row[metric] for row in found]) for metric in DEFECT_METRICS},
            }


def _by_size(measurement: ClassMeasurement) -> Iterator[Row]:
    for entry in measurement.methods:
        for quartile in measurement.quartiles:
            found = [row for rows in entry.by_size for row in rows if row["quartile"] == quartile.number]
            yield {
                "class": measurement.row_name,
                "quartile": quartile.number,
                "min_px": quartile.min_px,
                "max_px": quartile.max_px,
                "num_images": len(quartile.images),
                "method": entry.label,
                **{metric: _mean_or_blank([row[metric] for row in found]) for metric in DEFECT_METRICS},
            }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _mean_or_blank(values: Sequence[float | None]) -> float | None:
    """Return the mean, blank where a seed has no value: maps of some seeds alone are no fair mean."""
    return None if any(v is None or np.isnan(v) for v in values) else _mean(values)


def _std(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.median(known)) if known else None

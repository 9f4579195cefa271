"""The tables of a comparison, from the rows of its summary: Markdown for readers, csv for programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from patchcore.evaluation.paired import BEST, TIED, UNTESTED

Row = Mapping[str, Any]

TIE_MARK, UNTESTED_MARK = " ≈", " ?"
SPEED_COLUMNS = {
    "train_images": ("training images", "{:.0f}"),
    "train_seconds": ("training, s", "{:.1f}"),
    "calibration_seconds": ("calibration, s", "{:.1f}"),
    "images_per_second": ("images/s", "{:.1f}"),
    "latency_p50_ms": ("latency p50, ms", "{:.1f}"),
    "latency_p95_ms": ("latency p95, ms", "{:.1f}"),
    "peak_memory_mb": ("peak memory, MB", "{:.0f}"),
    "model_mb": ("model, MB", "{:.1f}"),
}
SUBSET_METRICS = {"instance_auroc": "image AUROC", "full_pro": "PRO", "recall": "recall at the threshold"}
PUBLISHED_METRICS = {
    "original_full_pro": '"full PRO" of the original, which is not MVTec AD\'s PRO',
    "original_anomaly_pro": '"anomaly PRO" of the original',
}
RESULT_COLUMNS = ("class", "metric", "method", "mean", "std", "num_seeds", "status", "difference")
DEFECT_COLUMNS = ("class", "defect_type", "num_images", "method")
SIZE_COLUMNS = ("class", "quartile", "min_px", "max_px", "num_images", "method")


def markdown_report(summary: Mapping[str, Any]) -> str:
    """Write all tables of a summary as one Markdown document."""
    blocks = ["# Comparison", _method_table(summary)]
    labels = [method["label"] for method in summary["methods"]]
    for metric, title in summary["metrics"].items():
        rows = [row for row in summary["results"] if row["metric"] == metric]
        if any(row["mean"] is not None for row in rows):
            blocks += [f"## {title}", _result_table(rows, labels)]
    blocks += [_legend(summary), "## Speed and memory", _speed_text(summary), _speed_table(summary["speed"])]
    blocks += _subset_tables("By defect type", summary["by_defect"], labels, _defect_name)
    blocks += _subset_tables("By defect size", summary["by_size"], labels, _size_name)
    if summary["by_size"]:
        blocks.append(
            "Quartiles of the defect pixels that resize and crop leave of an image's mask; image AUROC and PRO are "
            "over the images of a quartile and all good ones."
        )
    blocks += _published_tables(summary)
    if summary["notes"]:
        blocks += ["## Notes", "\n".join(f"- {_cell(note)}" for note in summary["notes"])]
    return "\n\n".join(blocks) + "\n"


def result_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of comparison.csv, published numbers last."""
    header = [*RESULT_COLUMNS, "interval_low", "interval_high", "source"]
    rows = [
        [*_csv_cells(row, RESULT_COLUMNS), *(_number(v) for v in row["interval"] or (None, None)), "measured"]
        for row in summary["results"]
    ]
    for row in summary["published"]:
        cells = [row["row_name"], row["metric"], row["method"], _number(row["value"])]
        source = "; ".join(text for text in (row["source"], row["remark"]) if text)
        rows.append([*cells, *[""] * (len(header) - 5), f"published: {source}"])
    return header, rows


def plain_rows(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of a csv file of rows that all have the same fields."""
    header = list(rows[0]) if rows else []
    return header, [_csv_cells(row, header) for row in rows]


def overview(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows for a terminal: per method the last row of each metric, the mean if there is one."""
    shown = {row["class"]: None for row in summary["results"]}
    last = list(shown)[-1]
    header = [f"{last}", *summary["metrics"].values()]
    rows = []
    for method in summary["methods"]:
        cells = {
            row["metric"]: _plain_result(row)
            for row in summary["results"]
            if row["class"] == last and row["method"] == method["label"]
        }
        rows.append([method["label"], *(cells.get(metric, "") for metric in summary["metrics"])])
    return header, rows


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table of finished cells: the first column to the left, the others to the right."""
    lines = [header, [":---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: object) -> str:
    """Return a text that cannot break a table or become markup."""
    line = "".join(c if c.isprintable() else "?" for c in str(text))
    for special in "\\`*_{}[]<>|#~$":
        line = line.replace(special, f"\\{special}")
    return line


def _method_table(summary: Mapping[str, Any]) -> str:
    rows = [
        [
            _cell(method["label"]),
            _cell(method["method"]),
            ", ".join(map(str, method["seeds"])) or "not known",
            "all" if method["limit_train"] is None else str(method["limit_train"]),
            "<br>".join(_cell(folder) for folder in method["folders"]),
        ]
        for method in summary["methods"]
    ]
    return markdown_table(["name", "method", "seeds", "training images", "run folders"], rows)


def _result_table(rows: Sequence[Row], labels: Sequence[str]) -> str:
    cells = {(row["class"], row["method"]): row for row in rows}
    used = [label for label in labels if any(row["method"] == label for row in rows)]
    lines = []
    for name in dict.fromkeys(row["class"] for row in rows):
        own = [cells.get((name, label)) for label in used]
        classes = next((row["classes"] for row in own if row and "classes" in row), None)
        title = f"{name} of {len(classes)}" if classes else name
        lines.append([_cell(title), *(_result_cell(row) for row in own)])
    return markdown_table(["class", *(_cell(label) for label in used)], lines)


def _plain_result(row: Row | None) -> str:
    if row is None or row["mean"] is None:
        return ""
    text = f"{row['mean']:.3f}" if row["std"] is None else f"{row['mean']:.3f} ± {row['std']:.3f}"
    return text + {TIED: TIE_MARK, UNTESTED: UNTESTED_MARK}.get(row["status"], "")


def _result_cell(row: Row | None) -> str:
    """Return value and spread, what stands at the top in bold, and below it how far from the top the others are."""
    text = _plain_result(row)
    if row is None or not text:
        return ""
    if row["status"] in (BEST, TIED):
        value, _, mark = text.partition(TIE_MARK)
        text = f"**{value}**{TIE_MARK if row['status'] == TIED else mark}"
    if row["interval"]:
        low, high = row["interval"]
        text += f"<br>({row['difference']:.3f} below [{low:.3f}, {high:.3f}])"
    return text


def _legend(summary: Mapping[str, Any]) -> str:
    bootstrap = summary["bootstrap"]
    share = f"{100 * bootstrap['confidence']:.0f} %"
    return (
        f"Mean ± standard deviation over seeds. In parentheses: how far a method lies below the highest one, with the "
        f"{share} interval of that difference over {bootstrap['resamples']} paired resamples of the test images (good "
        "and defective apart; not corrected for the number of comparisons). **Bold**: the highest one if the interval "
        f"of every other one excludes 0. **Bold**{TIE_MARK}: tied, the interval of the difference holds 0: these "
        f"images do not tell which is better. {UNTESTED_MARK.strip()}: highest, but a difference could not be tested "
        "for want of maps. A mean is over the classes that all methods of its table have."
    )


def _speed_text(summary: Mapping[str, Any]) -> str:
    count = len(summary["classes"])
    over = "seeds" if count == 1 else f"seeds, then over the {count} classes"
    return f"Medians over {over}; latency is that of one image in memory. The csv file has the classes."


def _speed_table(rows: Sequence[Row]) -> str:
    lines = [
        [
            _cell(row["method"]),
            *("" if row[c] is None else form.format(row[c]) for c, (_, form) in SPEED_COLUMNS.items()),
        ]
        for row in rows
        if row["class"] is None
    ]
    return markdown_table(["method", *(title for title, _ in SPEED_COLUMNS.values())], lines)


def _subset_tables(title: str, rows: Sequence[Row], labels: Sequence[str], name_of: Any) -> list[str]:
    """Return a table per metric: subsets of the images down, methods across."""
    blocks = []
    for metric, metric_title in SUBSET_METRICS.items():
        if not any(row[metric] is not None for row in rows):
            continue
        cells = {(name_of(row), row["method"]): row[metric] for row in rows}
        names = dict.fromkeys(name for name, _ in cells)
        used = [label for label in labels if any(row["method"] == label for row in rows)]
        lines = []
        for name in names:
            values = [cells.get((name, label)) for label in used]
            lines.append([*name, *("" if v is None else f"{v:.3f}" for v in values)])
        header = ["class", "defects", "images", *(_cell(label) for label in used)]
        blocks += [f"## {title}: {metric_title}", markdown_table(header, lines)]
    return blocks


def _defect_name(row: Row) -> tuple[str, str, str]:
    return _cell(row["class"]), _cell(row["defect_type"]), str(row["num_images"])


def _size_name(row: Row) -> tuple[str, str, str]:
    size = f"Q{row['quartile']}: {row['min_px']} to {row['max_px']} px"
    return _cell(row["class"]), size, str(row["num_images"])


def _published_tables(summary: Mapping[str, Any]) -> list[str]:
    """Return the published numbers of the classes compared, a section of their own, sources below."""
    rows = summary["published"]
    if not rows:
        return []
    blocks = [
        "## Published results, not measured here",
        "Over the whole published test sets, with other code and hardware: a difference to the tables above is no "
        "paired comparison, and is none at all where the images above are others.",
    ]
    names = list(dict.fromkeys(row["row_name"] for row in rows))
    for metric, title in {**summary["metrics"], **PUBLISHED_METRICS}.items():
        own = [row for row in rows if row["metric"] == metric]
        values = {(row["method"], row["row_name"]): row["value"] for row in own}
        lines = []
        for method in dict.fromkeys(row["method"] for row in own):
            found = [values.get((method, name)) for name in names]
            lines.append([f"_{_cell(method)}_", *("" if v is None else f"{v:.3f}" for v in found)])
        if lines:
            blocks += [f"### Published: {title}", markdown_table(["method", *map(_cell, names)], lines)]
    sources = dict.fromkeys(
        (row["method"], "; ".join(text for text in (row["source"], row["remark"]) if text)) for row in rows
    )
    blocks.append("\n".join(f"- _{_cell(method)}_: {_cell(source)}" for method, source in sources))
    return blocks


def _csv_cells(row: Row, columns: Sequence[str]) -> list[str]:
    return [_number(row[column]) for column in columns]


def _number(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6f}" if isinstance(value, float) else str(value)

"""How time and memory of training PatchCore grow with the number of images.

Each number of images has a process of its own. The exponent of a quantity is the slope of a straight line through the
logarithms: 1 grows with the number of images, 2 with its square, as a bank of a given share does with its points.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from memory import BACKBONE, Case, Measurement, measure_apart, rendered
from PIL import Image

from patchcore.cli.byte_size import ByteSize
from patchcore.evaluation.plots.style import LINE_MARKERS, drawn, new_figure, series_colour
from patchcore.runtime import progress
from patchcore.storage.files import write_bytes

SIZES = (50, 100, 200, 400, 800)
SECONDS = {"features": "embed_seconds", "coreset": "coreset_seconds", "calibration": "calibration_seconds"}
BYTES = {
    "embeddings": "feature_bytes",
    "projection": "projection_bytes",
    "peak of the fit": "fit_peak_bytes",
    "peak with calibration": "peak_bytes",
}


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Return the slope of the values over the sizes, both in logarithms, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def series(found: Mapping[int, Measurement], fields: Mapping[str, str], unit: float) -> dict[str, list[float]]:
    """Return the values of some fields over the sizes, in units of `unit`; fields that are 0 are left out."""
    values = {name: [getattr(m, field) / unit for m in found.values()] for name, field in fields.items()}
    return {name: numbers for name, numbers in values.items() if min(numbers) > 0}


def table(found: Mapping[int, Measurement]) -> str:
    """Return the Markdown table of all series, with the exponents in the last line."""
    columns = {f"{name}, s": numbers for name, numbers in series(found, SECONDS, 1).items()}
    columns |= {f"{name}, MB": numbers for name, numbers in series(found, BYTES, 1e6).items()}
    lines = [["images", *columns], ["---"] * (1 + len(columns))]
    for number, size in enumerate(found):
        lines.append([str(size), *(f"{numbers[number]:,.1f}" for numbers in columns.values())])
    lines.append(["exponent", *(f"{exponent(list(found), numbers):.2f}" for numbers in columns.values())])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plot(found: Mapping[int, Measurement], title: str) -> Image.Image:
    """Draw time and memory over the number of images, both logarithmic, with the exponents in the legends."""
    figure, canvas = new_figure(10, 5)
    figure.suptitle(title)
    panels = figure.subplots(1, 2)
    sizes = list(found)
    for panel, what, curves in (
        (panels[0], "time, s", series(found, SECONDS, 1)),
        (panels[1], "memory, MB", series(found, BYTES, 1e6)),
    ):
        for number, (name, values) in enumerate(curves.items()):
            label = f"{name}: exponent {exponent(sizes, values):.2f}"
            panel.plot(sizes, values, marker=LINE_MARKERS[number], color=series_colour(number), label=label)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        panel.set_xlabel("training images")
        panel.set_ylabel(what)
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return drawn(canvas)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, action="append", help=f"repeatable; {SIZES} if left out")
    parser.add_argument("--percentage", type=float, default=0.01, help="share of the patches in the memory bank")
    parser.add_argument("--budget", help="of memory, such as 1GB; none if left out")
    parser.add_argument("--no_calibration", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="for images and features, on a disk; images stay in a named one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "growth.png")
    options = parser.parse_args()
    sizes = sorted(set(options.images or SIZES))
    if len(sizes) < 2:
        parser.error("an exponent needs two numbers of images")
    budget = ByteSize().convert(options.budget, None, None) if options.budget else None
    folder = options.folder or Path(tempfile.mkdtemp(dir=Path.cwd(), prefix="growth_benchmark_"))
    try:
        data = rendered(folder, sizes[-1])
        cases = {
            size: Case(data, folder, size, options.percentage, budget, not options.no_calibration, options.threads)
            for size in sizes
        }
        found = {size: measure_apart(case) for size, case in progress(cases.items(), "growth", total=len(cases))}
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    title = f"{BACKBONE.name}, bank of {100 * options.percentage:g} % of the patches, {options.threads} thread(s)"
    title += f", --memory_budget {options.budget}" if options.budget else ""
    print(f"{title}\n\n{table(found)}")
    content = io.BytesIO()
    plot(found, title).save(content, "PNG")
    write_bytes(options.out, content.getvalue())


if __name__ == "__main__":
    main()

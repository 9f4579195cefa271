"""What all plots share: colours for print and for colour-blind eyes, fonts, figures."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFont

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

# Okabe and Ito, without the yellow that vanishes on paper; black is kept for the mean.
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
LINE_STYLES = ("-", "--", "-.")
# As many as are coprime to the colours, so that every line differs; the circle is the mean's.
LINE_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "----", "++++")  # as many as are coprime to the colours
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))


def series_colour(number: int) -> str:
    """Return the colour of the series of that number."""
    return LINE_COLOURS[number % len(LINE_COLOURS)]


def new_figure(width: float, height: float) -> tuple[Any, FigureCanvasAgg]:
    """Return an empty figure of so many inches, and the canvas that `drawn` reads it from."""
    # Imported here: every run imports these modules, and the half second is that of curves alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    return figure, FigureCanvasAgg(figure)


def drawn(canvas: FigureCanvasAgg) -> Image.Image:
    """Return what a figure shows as an RGB image."""
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def plain(text: str, width: int) -> str:
    """Return a name for a plot, shortened to about `width` px; a dollar sign would begin a formula."""
    return fitted(text, width).replace("$", r"\$")


def fitted(text: str, width: int) -> str:
    """Return a text that is at most `width` px wide, its middle left out, without what no font can draw."""
    printable = "".join(c if c.isprintable() else "?" for c in text)
    shown, kept = printable, len(printable) // 2
    while kept and font(15).getlength(shown) > width:
        shown, kept = f"{printable[:kept]}...{printable[-kept:]}", kept - 1
    return shown


@functools.lru_cache(maxsize=4)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)

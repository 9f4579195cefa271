"""The page itself: template, script and style in one file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from patchcore.evaluation.plots.pictures import colour_table
from patchcore.report_html.gallery import display_text
from patchcore.report_html.tables import detail_tables, overview_table

COLOUR_STOPS = 17  # of the heat map; between them the browser interpolates


@dataclass(frozen=True)
class RunDescription:
    """How a run was made.

    Attributes:
        folder: The run folder.
        method: Label of its method.
        command: What was typed; None in run folders that do not say.
        config: Content of its config.json.
    """

    folder: str
    method: str
    command: str | None
    config: Mapping[str, Any]


@dataclass(frozen=True)
class ReportContent:
    """What the page shows.

    Attributes:
        summary: Content of summary.json.
        plots: Title and PNG file of each plot.
        gallery: See `gallery_data`.
        runs: How every run was made.
        notes: What a reader must know of the gallery.
        made_at: Date and time for the reader.
    """

    summary: Mapping[str, Any]
    plots: Sequence[tuple[str, bytes]]
    gallery: Sequence[Mapping[str, Any]]
    runs: Sequence[RunDescription]
    notes: Sequence[str]
    made_at: str


def render_page(content: ReportContent) -> bytes:
    """Return the page as UTF-8; every text in it is escaped, and it may load nothing from anywhere."""
    environment = Environment(
        loader=PackageLoader("patchcore.report_html", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = lambda text: display_text(str(text))
    loader = environment.loader
    assert loader is not None
    script, style = (loader.get_source(environment, name)[0] for name in ("report.js", "report.css"))
    page = environment.get_template("report.html.j2").render(
        summary=content.summary,
        overview=overview_table(content.summary),
        tables=list(detail_tables(content.summary)),
        plots=[(title, base64.b64encode(png).decode("ascii")) for title, png in content.plots],
        runs=content.runs,
        notes=[*content.summary["notes"], *content.notes],
        made_at=content.made_at,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        style=style,
        gallery=_script_json(content.gallery),
        channels=_colour_channels(),
        stops=_colour_stops(),
        json_text=_readable_json,
    )
    return page.encode("utf-8", "backslashreplace")


def _readable_json(value: object) -> str:
    return "\n".join(map(display_text, json.dumps(value, indent=2, ensure_ascii=False).split("\n")))


def _script_json(value: object) -> str:
    """Return JSON that can end neither its script element nor begin a comment in it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for special in "<>&":
        text = text.replace(special, f"\\u{ord(special):04x}")
    return text


def _stop_colours() -> list[list[float]]:
    table = colour_table() / 255
    return [list(table[round(i * 255 / (COLOUR_STOPS - 1))]) for i in range(COLOUR_STOPS)]


def _colour_channels() -> list[str]:
    """Return the values of red, green and blue along the colour scale, as SVG filters take them."""
    return [" ".join(f"{stop[channel]:.3f}" for stop in _stop_colours()) for channel in range(3)]


def _colour_stops() -> str:
    """Return the colour scale as CSS takes it."""
    return ", ".join(f"rgb({', '.join(str(round(255 * value)) for value in stop)})" for stop in _stop_colours())

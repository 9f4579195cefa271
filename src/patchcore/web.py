"""A page to try a stored model: drop an image, see score, decision and heat map. It serves this machine alone."""

from __future__ import annotations

import html
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from patchcore.datasets.images import map_on_image
from patchcore.detector import AnomalyDetector
from patchcore.errors import ConfigurationError, DataError
from patchcore.evaluation.plots.pictures import HeatScale, heat_panel, resized
from patchcore.inference.detector import LoadedDetector
from patchcore.inference.results import ImageResult
from patchcore.prediction import open_detector

HOST = "127.0.0.1"
MAX_UPLOAD_MB = 100
PICTURE_PX = 1024  # longer side of what the page shows
MAX_PORT = 65535
TEMPORARY_FOLDER = "GRADIO_TEMP_DIR"
STYLE = """
h1, .verdict h2 { font-family: system-ui, sans-serif; }
.verdict { border-left: 0.5rem solid var(--body-text-color-subdued); padding: 0.25rem 1rem; }
.verdict h2 { margin: 0; font-size: 1.6rem; overflow-wrap: anywhere; }
.verdict dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1rem; margin: 0.5rem 0 0; }
.verdict dt { opacity: 0.8; }
.verdict dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.verdict.anomalous { border-color: #b00020; }
.verdict.anomalous h2 { color: #b00020; }
.verdict.normal { border-color: #1b7f3b; }
.dark .verdict.anomalous h2 { color: #ff8a95; }
"""


@dataclass(frozen=True)
class Answer:
    """What the page shows of one upload.

    Attributes:
        verdict: HTML: decision and scores, or what is wrong with the file.
        image: The upright image; None if it cannot be read or scored.
        heat_map: The heat map in the frame of the image; None for methods without maps, too.
    """

    verdict: str
    image: Image.Image | None = None
    heat_map: Image.Image | None = None


class Inspector:
    """Scores image files one after the other, from whichever thread.

    Args:
        detector: A fitted detector.

    Raises:
        ConfigurationError: The model's scores say nothing of a single image.
    """

    def __init__(self, detector: AnomalyDetector) -> None:
        self.detector = detector
        self._loaded = LoadedDetector(detector)

    def inspect(self, path: Path) -> Answer:
        """Score a file; what is wrong with it becomes the verdict."""
        outcome = self._loaded.inspect(path)
        if outcome.error is not None:
            return Answer(_refusal_html(path.name, _reason(outcome.error, path)))
        assert outcome.result is not None and outcome.image is not None
        shown = _shown(outcome.image)
        return Answer(_verdict_html(path.name, outcome.result), shown, self._heat_map(shown, outcome.result))

    def _heat_map(self, shown: Image.Image, scored: ImageResult) -> Image.Image | None:
        if scored.model_map is None:
            return None
        anomaly_map = map_on_image(scored.model_map, scored.placement, shown.height, shown.width)
        if np.isnan(anomaly_map).all():
            return None
        scale = self._calibrated_scale() or HeatScale(
            float(np.nanmin(anomaly_map)), float(np.nanmax(anomaly_map)), None
        )
        return heat_panel(np.asarray(shown), anomaly_map, scale, max(shown.size))

    def _calibrated_scale(self) -> HeatScale | None:
        calibration = self.detector.calibration_
        if calibration is None or calibration.pixel is None or calibration.pixel_floor is None:
            return None
        return HeatScale.up_to_threshold(calibration.pixel_floor, calibration.pixel.threshold)

    def heading(self) -> str:
        """Return HTML that says which model this is."""
        source = self.detector.source
        name = html.escape(source.category or "model of an unknown class")
        details = [self.detector.method, source.dataset]
        return f"<h1>{name}</h1><p>{html.escape(', '.join(filter(None, details)))}. {_reading(self.detector)}</p>"

    def legend(self) -> str:
        """Return HTML that says how to read the heat map."""
        if self._calibrated_scale() is None:
            colours = (
                "The model has no pixel threshold: the colours span the values of this image alone, from its lowest "
                "(dark) to its highest (bright), so that the brightest place of a good part is bright too."
            )
        else:
            colours = (
                "Dark: like an ordinary good pixel; bright: anomalous. The cyan line encloses what lies above the "
                "pixel threshold."
            )
        return f"<p>{colours} Gray without colour: cut off before scoring, not inspected.</p>"


def _reason(error: DataError, path: Path) -> str:
    """Return what is wrong with a file, without the place where uploads are kept."""
    return str(error).removeprefix(f"{path}: ").replace(str(path), path.name)


def _reading(detector: AnomalyDetector) -> str:
    """Return a sentence on what the model sees of an image."""
    config = detector.preprocessing
    if config.max_side_px is not None:
        return f"Images are scored whole, scaled down to {config.max_side_px} px at most."
    side = {"shorter": "shorter side", "square": "both sides", "letterbox": "longer side"}[config.resize_mode]
    return (
        f"Images are resized to {config.resize_px} px ({side}), of which the {config.imagesize_px} x "
        f"{config.imagesize_px} px in the middle are scored."
    )


def _shown(image: Image.Image) -> Image.Image:
    """Return an image as large as it is, but no larger than the page shows it."""
    return image if max(image.size) <= PICTURE_PX else resized(np.asarray(image), side_px=PICTURE_PX)


def _verdict_html(name: str, scored: ImageResult) -> str:
    rows = {"File": f"{name}, {scored.width} x {scored.height} px"}
    if scored.threshold is None:
        kind, decision = "", "No decision"
        rows["Score"] = f"{scored.score:.5g}"
        rows["Why"] = "the model was stored without calibration, so it has no threshold and no normalised score"
    else:
        kind, decision = ("anomalous", "ANOMALOUS") if scored.is_anomalous else ("normal", "normal")
        rows["Score"] = f"{scored.score:.5g} (threshold {scored.threshold:.5g})"
        rows["Normalised score"] = f"{scored.normalized:.3f} (from 0 to 1, threshold 0.5)"
    return _panel(kind, decision, rows)


def _refusal_html(name: str, reason: str) -> str:
    return _panel("", "Not scored", {"File": name, "Why": reason})


def _panel(kind: str, heading: str, rows: dict[str, str]) -> str:
    """Return a heading with a list of terms; file names are hostile input."""
    terms = "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in rows.items())
    return f'<div class="verdict {kind}" role="status"><h2>{html.escape(heading)}</h2><dl>{terms}</dl></div>'


def serve_demo(model: Path, port: int, device: torch.device, announce: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C.

    Args:
        model: A model folder, or the export of a model.
        port: Port of the loopback address; 0 takes a free one.
        device: Where the model runs.
        announce: Receives the address, once it answers there.

    Raises:
        ConfigurationError: Gradio or the model is missing, the port is taken, or the model scores no single images.
    """
    with _own_temporary_folder(), closing(_listening(port)) as listener:
        gradio, uvicorn = _require_gradio()
        inspector = Inspector(open_detector(model, device))
        app = _application(gradio, inspector)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        start = server.startup

        async def start_and_announce(sockets: list[socket.socket] | None = None) -> None:
            await start(sockets=sockets)
            # Not before: a Ctrl-C that meets a loop half made leaves a traceback.
            announce(f"serving {model} at http://{HOST}:{listener.getsockname()[1]} - Ctrl-C ends it")

        server.startup = start_and_announce
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the uploads are removed then, too
        server.run(sockets=[listener])


@contextmanager
def _own_temporary_folder() -> Iterator[None]:
    """Keep the uploads, of which Gradio stores copies, no longer than the page runs; and its reports to itself."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with tempfile.TemporaryDirectory(prefix="patchcore_demo_") as folder:
        os.environ[TEMPORARY_FOLDER] = folder
        yield


def _require_gradio() -> tuple[Any, Any]:
    try:
        import gradio
        import uvicorn
    except ImportError as error:
        raise ConfigurationError(f"the page needs the package gradio ({error}): pip install '.[web]'") from error
    return gradio, uvicorn


def _listening(port: int) -> socket.socket:
    """Return a socket at the loopback address, which no other machine reaches.

    Raises:
        ConfigurationError: The port is taken or none.
    """
    if not 0 <= port <= MAX_PORT:
        raise ConfigurationError(f"--port {port}: expected 1 to {MAX_PORT}, or 0 for any free one")
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # or a page just ended would hold it for a minute
    try:
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"--port {port} cannot be used ({error.strerror}): choose another, or 0 for any free one"
        ) from error
    return listener


def _application(gradio: Any, inspector: Inspector) -> Any:
    """Return the web application around the page."""
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(openapi_url=None)
    # Another name for this address would let a page from elsewhere talk to this one (DNS rebinding).
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return gradio.mount_gradio_app(
        app,
        build_page(gradio, inspector),
        path="/",
        css=STYLE,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=f"{MAX_UPLOAD_MB}mb",
    )


def build_page(gradio: Any, inspector: Inspector) -> Any:
    """Lay out the page.

    Args:
        gradio: The package, which is imported where it is needed alone.
        inspector: What answers.
    """
    has_maps = inspector.detector.has_maps

    def answer(path: str) -> tuple[Any, ...]:
        found = inspector.inspect(Path(path))
        pictures = (found.image, found.heat_map) if has_maps else (found.image,)
        return None, found.verdict, *pictures  # None: the drop zone is free for the next image

    title = f"{inspector.detector.source.category or 'model'} - {inspector.detector.method}"
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 600)) as page:
        gradio.HTML(inspector.heading())
        upload = gradio.File(
            label=f"Image (PNG, JPEG, BMP, TIFF or WebP, {MAX_UPLOAD_MB} MB at most)", type="filepath", height=140
        )
        verdict = gradio.HTML()
        with gradio.Row():
            # Without the button that Gradio adds to share a picture on its maker's site.
            pictures = [
                gradio.Image(label=label, format="png", interactive=False, buttons=["download", "fullscreen"])
                for label in (["Image", "Heat map"] if has_maps else ["Image"])
            ]
        if has_maps:
            gradio.HTML(inspector.legend())
        upload.upload(answer, upload, [upload, verdict, *pictures], api_name="inspect")
    return page

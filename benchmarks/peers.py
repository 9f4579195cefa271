"""PatchCore beside the released anomalib: same weights, images and settings, each in its own environment.

    make bench-peers DATA=/path/to/mpdd CATEGORY=metal_plate

The coreset of anomalib takes minutes. Both sides compute image AUROC, pixel AUROC and PRO within the time of the test;
ours computes all columns of results.csv.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import runs
import torch
from material import Material, Settings, timed
from results import Row, environment
from run import add_options, report, settings_of

from patchcore.datasets.inspection import DatasetSplit
from patchcore.errors import ConfigurationError, DataError
from patchcore.evaluation.summary import class_metrics
from patchcore.runtime import set_threads

TIMM_NAMES = {"efficientnet_lite0": "tf_efficientnet_lite0"}
PEER = Path(__file__).with_name("peer_anomalib.py")
SAME_COLUMNS = {"image_AUROC": "instance_auroc", "pixel_AUROC": "full_pixel_auroc", "pixel_AUPRO": "full_pro"}


def measure_anomalib(python: Path, material: Material) -> dict[str, Any]:
    """Fit and test anomalib once in its environment, and return what peer_anomalib.py wrote.

    Raises:
        ConfigurationError: There is no such interpreter, or it ended with an error.
    """
    if not python.exists():
        raise ConfigurationError(f"{str(python)!r} not found: make bench-peers makes it")
    s = material.settings
    weights, out = material.folder / "weights.pt", material.folder / "anomalib.json"
    torch.save(material.network().state_dict(), weights)
    arguments = {
        "data": s.data,
        "category": s.category,
        "backbone": TIMM_NAMES[s.backbone.name],
        "weights": weights,
        "percentage": s.percentage,
        "resize": s.preprocessing.resize_px,
        "imagesize": s.preprocessing.imagesize_px,
        "threads": s.threads,
        "num_workers": material.num_workers,
        "out": out,
    }
    typed = [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
    done = subprocess.run(
        [str(python), str(PEER), *typed, "--layers", *s.backbone.layers], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigurationError(f"anomalib ended with exit code {done.returncode}: {last}")
    return dict(json.loads(out.read_text(encoding="utf-8")))


def measure_toolkit(material: Material, rounds: int) -> dict[str, Any]:
    """Fit and test the toolkit with `--embedding concat`, and return the medians and the metrics."""
    fits, tests = [], []
    for _ in range(rounds):
        options = ("--calibration", "none", "--embedding", "concat", "--save_anomaly_scores")
        run = runs.train(material, "peer", *options)
        timings = run.timings
        maps = np.load(run.folder / "anomaly_scores" / f"{run.row}.npz")["maps"]
        columns = (run.scores, material.labels, maps, material.masks, None)
        seconds = timed(lambda columns=columns: class_metrics(*columns))()
        fits.append(timings["train_seconds"])
        tests.append(timings["test_images"] / timings["images_per_second"] + seconds)
    return {
        "fit_seconds": statistics.median(fits),
        "test_seconds": statistics.median(tests),
        "metrics": run.metrics,
    }


def peer_rows(ours: Mapping[str, Any], theirs: Mapping[str, Any], num_images: int) -> list[Row]:
    """Return the rows of both sides.

    Args:
        ours: Of `measure_toolkit`.
        theirs: Of `measure_anomalib`.
        num_images: Test images.
    """
    name = f"anomalib {theirs['version']}"
    pairs = [(column, ours["metrics"][column], theirs["metrics"][peer]) for peer, column in SAME_COLUMNS.items()]
    shown = ", ".join(f"{column} {mine:.4f} and {other:.4f}" for column, mine, other in pairs)
    fit, test = (theirs[part] / ours[part] for part in ("fit_seconds", "test_seconds"))
    return [
        Row(
            "peers_fit",
            "fit with `--embedding concat`, whole",
            "s",
            ours["fit_seconds"],
            theirs["fit_seconds"],
            name,
            fit,
            at_least=25,
            condition="same images, weights and settings",
            measured=f"memory bank of {theirs['bank']:,} patches there",
            note=f"{name}: one run",
        ),
        Row(
            "peers_test",
            "test with metrics, `--embedding concat`",
            "images/s",
            num_images / ours["test_seconds"],
            num_images / theirs["test_seconds"],
            name,
            test,
            at_least=1.5,
            condition="same images and metrics",
            measured=shown,
            note=f"{name}: one run",
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both sides and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(".venv-peers/bin/python"), help="interpreter with anomalib")
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        settings: Settings = settings_of(options)
        set_threads(options.threads)
        with tempfile.TemporaryDirectory(prefix="patchcore-peers-") as folder:
            material = Material(settings, Path(folder))
            theirs = measure_anomalib(options.python, material)
            ours = measure_toolkit(material, settings.rounds)
        rows = peer_rows(ours, theirs, len(material.dataset(DatasetSplit.TEST)))
        report(rows, environment(settings.data_name, settings.threads), options.results, options.readme)
    except (ConfigurationError, DataError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

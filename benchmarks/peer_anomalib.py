"""Fit and test anomalib's PatchCore, in an environment of its own; run by peers.py.

This file imports nothing of the toolkit: the environment holds the released anomalib and what that brings.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path

import torch
from anomalib.data import MPDD
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, AUROC, Evaluator
from anomalib.models import Patchcore


def build_model(options: argparse.Namespace) -> Patchcore:
    """Return anomalib's PatchCore with the same network, weights, layers, resize, crop and coreset as ours."""
    scores, maps = ["pred_score", "gt_label"], ["anomaly_map", "gt_mask"]
    metrics = [
        AUROC(fields=scores, prefix="image_"),
        AUROC(fields=maps, prefix="pixel_"),
        AUPRO(fields=maps, prefix="pixel_"),
    ]
    model = Patchcore(
        backbone=options.backbone,
        layers=options.layers,
        pre_trained=False,
        coreset_sampling_ratio=options.percentage,
        num_neighbors=1,
        pre_processor=Patchcore.configure_pre_processor((options.resize,) * 2, (options.imagesize,) * 2),
        evaluator=Evaluator(test_metrics=metrics),
        visualizer=False,
    )
    network = model.model.feature_extractor.feature_extractor
    state = torch.load(options.weights, weights_only=True)
    missing = [name for name in network.state_dict() if name not in state]
    if missing:
        raise SystemExit(f"the weights lack {missing[0]!r} of anomalib's {options.backbone}")
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    return model


def measure(options: argparse.Namespace, folder: str) -> dict[str, object]:
    """Fit and test once, and return seconds and metrics."""
    data = MPDD(options.data, options.category, num_workers=options.num_workers)
    model = build_model(options)
    common = {"accelerator": "cpu", "devices": 1, "logger": False, "default_root_dir": folder}
    started = time.perf_counter()
    Engine(**common, limit_val_batches=0).fit(model=model, datamodule=data)
    fitted = time.perf_counter()
    # The AUROC of scores that were never scaled is 0.5 there: they are put through a sigmoid. Its time counts nowhere.
    Engine(**common).validate(model=model, datamodule=data, verbose=False)
    validated = time.perf_counter()
    (metrics,) = Engine(**common).test(model=model, datamodule=data, verbose=False)
    tested = time.perf_counter()
    return {
        "fit_seconds": fitted - started,
        "test_seconds": tested - validated,
        "bank": len(model.model.memory_bank),
        "metrics": {name: float(value) for name, value in metrics.items()},
        "version": importlib.metadata.version("anomalib"),
    }


def main() -> None:
    """Write the numbers of one fit and one test to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--category", required=True)
    parser.add_argument("--backbone", required=True, help="name in timm")
    parser.add_argument("--layers", nargs="+", required=True)
    parser.add_argument("--weights", type=Path, required=True, help="state dict of the network")
    parser.add_argument("--percentage", type=float, required=True)
    parser.add_argument("--resize", type=int, required=True)
    parser.add_argument("--imagesize", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--num_workers", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        options.out.write_text(json.dumps(measure(options, folder)), encoding="utf-8")


if __name__ == "__main__":
    main()

"""A research toolkit for industrial visual anomaly detection.

Importing this package loads neither torch nor weights; the names below are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AnomalyDetector": "patchcore.detector",
    "BackboneConfig": "patchcore.configs",
    "ConfigurationError": "patchcore.errors",
    "DataError": "patchcore.errors",
    "DatasetConfig": "patchcore.configs",
    "DatasetSplit": "patchcore.datasets.inspection",
    "Ensemble": "patchcore.methods.ensemble",
    "EnsembleConfig": "patchcore.configs",
    "ImageLoader": "patchcore.datasets.loader",
    "ImageResult": "patchcore.inference.results",
    "LoadedDetector": "patchcore.inference.detector",
    "MPDDDataset": "patchcore.datasets.mpdd",
    "MVTecDataset": "patchcore.datasets.mvtec",
    "PatchCore": "patchcore.methods.patchcore",
    "PatchCoreConfig": "patchcore.configs",
    "Prediction": "patchcore.detector",
    "PreprocessingConfig": "patchcore.configs",
    "RunConfig": "patchcore.configs",
    "SamplerConfig": "patchcore.configs",
    "load_detector": "patchcore.inference.detector",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'patchcore' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

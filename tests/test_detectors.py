"""The contract, for every detector of the registry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchcore.methods  # noqa: F401  # fills the registry
from patchcore.configs import (
    AutoencoderConfig,
    BackboneConfig,
    EnsembleConfig,
    FastFlowConfig,
    FeatureAutoencoderConfig,
    PatchCoreConfig,
    PreprocessingConfig,
    ResNetKNNConfig,
    RuntimeConfig,
    SamplerConfig,
    TrainingConfig,
    TrainingSource,
)
from patchcore.detector import DETECTORS, AnomalyDetector, NotFittedError
from patchcore.prediction import open_detector
from patchcore.storage.model_folder import read_model_header

CPU = torch.device("cpu")
PREPROCESSING = PreprocessingConfig(64, 64)

PATCHCORE = PatchCoreConfig(
    BackboneConfig("efficientnet_lite0", ("blocks.1", "blocks.2"), weights="random"),
    SamplerConfig("approx_greedy_coreset", 0.2),
    target_embed_dimension=64,
    num_nn=2,
)

# One small configuration for each method: a new entry of the registry needs one line here.
EXAMPLES: dict[str, Any] = {
    "patchcore": PATCHCORE,
    "fastflow": FastFlowConfig(PATCHCORE.backbone, flow_steps=2, training=TrainingConfig(epochs=5)),
    "resnet_knn": ResNetKNNConfig(replace(PATCHCORE.backbone, layers=("blocks.2",)), num_features=20, num_neighbours=3),
    "autoencoder": AutoencoderConfig(training=TrainingConfig(epochs=5)),
    "feature_autoencoder": FeatureAutoencoderConfig(PATCHCORE.backbone, training=TrainingConfig(epochs=5)),
    "ensemble": EnsembleConfig((PATCHCORE, replace(PATCHCORE, patchsize=5, seed=3))),
}


class Batches:
    """Images in memory, in batches of four."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images
        self.num_images = len(images)

    def __len__(self) -> int:
        return -(-len(self.images) // 4)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for images in self.images.split(4):
            yield {"image": images}


def random_images(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(90, 160, (count, 3, 64, 64), dtype=torch.uint8, generator=generator)


def anomalous_images(count: int, seed: int) -> torch.Tensor:
    images = random_images(count, seed)
    images[:, 0, 20:44, 20:44] = 255
    return images


def check_contract(method: str, config: Any, folder: Path) -> None:
    """Fit, calibrate, predict, save and load one method, and check what every method promises."""
    build = DETECTORS[method].prepare(config, PREPROCESSING, RuntimeConfig())
    source = TrainingSource("folder", "part", seed=3)
    detector = build(source, CPU)
    assert isinstance(detector, AnomalyDetector)
    normal, anomalous = random_images(6, 1), anomalous_images(3, 2)
    with pytest.raises(NotFittedError, match="fit"):
        detector.predict(normal[:1])
    with pytest.raises(NotFittedError, match="fit"):
        detector.save(folder)

    before = normal.clone()
    assert detector.fit(Batches(normal)) is detector
    assert torch.equal(normal, before), "fit changed its input"
    detector.calibration_ = detector.out_of_fold_calibration()
    detector.release_training_data()
    assert detector.calibration_ is not None
    assert len(detector.calibration_.image_scores) == len(normal)

    mixed = torch.cat([random_images(3, 5), anomalous])
    prediction = detector.predict(mixed)
    assert prediction.scores.shape == (6,)
    assert prediction.scores.dtype == np.float32
    assert np.isfinite(prediction.scores).all()
    assert prediction.scores[3:].min() > prediction.scores[:3].max(), "higher must be more anomalous"
    if prediction.maps is not None:
        assert prediction.maps.shape == (6, 64, 64)
        assert prediction.maps.dtype == np.float32

    alone = np.concatenate([detector.predict(image).scores for image in mixed.split(1)])
    np.testing.assert_allclose(alone, prediction.scores, rtol=1e-5)

    detector.save(folder)
    stored = read_model_header(folder)
    assert stored.backbones == detector.backbones()
    assert bool(stored.backbones) == ('"layers"' in json.dumps(stored.config)), "which weights have its backbones?"
    loaded = open_detector(folder, CPU)
    again = loaded.predict(mixed)
    np.testing.assert_allclose(again.scores, prediction.scores, rtol=1e-6)
    assert loaded.calibration_ == detector.calibration_
    assert loaded.source == source
    assert loaded.preprocessing == PREPROCESSING
    assert not list(folder.rglob("*.pkl")) and not list(folder.rglob("*.pickle"))

    twin = build(source, CPU).fit(Batches(normal))
    np.testing.assert_array_equal(twin.predict(mixed).scores, prediction.scores)


def test_every_method_has_an_example() -> None:
    assert set(EXAMPLES) == set(DETECTORS)


@pytest.mark.parametrize("method", sorted(EXAMPLES))
def test_contract(method: str, tmp_path: Path) -> None:
    check_contract(method, EXAMPLES[method], tmp_path / "model")

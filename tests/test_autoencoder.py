"""The autoencoder of images: its network, scores, options, resuming, stored models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from small_images import PREPROCESSING, SIDE, Batches, random_images

from patchcore.configs import AutoencoderConfig, PreprocessingConfig, TrainingConfig, TrainingSource
from patchcore.detector import TrainingPlan
from patchcore.errors import ConfigurationError
from patchcore.methods.autoencoder import Autoencoder, AutoencoderNet
from patchcore.methods.training import Training

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CONFIG = AutoencoderConfig(training=TrainingConfig(epochs=3, batch_size=4, lr=2e-3, grad_clip=None))
TRAIN, TEST = random_images(7, 0), random_images(4, 1)


def build(config: AutoencoderConfig = CONFIG, seed: int = 0, category: str = "p") -> Autoencoder:
    return Autoencoder(config, CPU, PREPROCESSING, TrainingSource("mpdd", category, seed))


def fitted(config: AutoencoderConfig = CONFIG, **changes: Any) -> Autoencoder:
    detector = build(config, **changes)
    detector.fit(Batches(TRAIN))
    return detector


@pytest.fixture(scope="module")
def model() -> Autoencoder:
    return fitted()


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (100, 63), (224, 96)])
def test_any_size_is_drawn_again_at_its_size(size: tuple[int, int]) -> None:
    network = AutoencoderNet(8, seed=0)
    with torch.no_grad():
        assert network(torch.zeros(1, 3, *size)).shape == (1, 3, *size)


def test_the_bottleneck_has_the_channels_asked_for_and_a_32nd_of_the_side() -> None:
    network = AutoencoderNet(5, seed=0)
    seen: list[torch.Size] = []
    network.to_latent.register_forward_hook(lambda part, given, output: seen.append(output.shape))
    with torch.no_grad():
        network(torch.zeros(2, 3, 96, 64))
    assert seen == [(2, 5, 3, 2)]


def test_standardised_images_have_mean_0_and_variance_1() -> None:
    network = AutoencoderNet(4, seed=0)
    network.standardise_by(TRAIN)
    x = network.standardised(TRAIN)
    torch.testing.assert_close(x.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.var(dim=(0, 2, 3), correction=0), torch.ones(3))
    network.standardise_by(torch.full_like(TRAIN, 7))
    assert network.std.flatten().tolist() == [1, 1, 1]


def test_seeds_give_weights_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same, other = (AutoencoderNet(4, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["down.0.weight"], other["down.0.weight"])


def test_a_smooth_image_is_learned() -> None:
    ramp = torch.linspace(60, 190, SIDE)[None, None, None, :].expand(1, 3, SIDE, SIDE)
    levels = torch.linspace(-40, 40, 8).view(8, 1, 1, 1)
    images = (ramp + levels).clamp(0, 255).to(torch.uint8)
    network = AutoencoderNet(8, seed=0)
    network.standardise_by(images)
    config = TrainingConfig(epochs=50, batch_size=4, lr=5e-3, grad_clip=None)
    history = Training(network, network.mean_squared_error, config, 0, "x").run([images])
    assert history[-1].loss < 0.1 < 0.5 < history[0].loss, "shares of the variance"


# ---------------------------------------------------------------- the detector


@pytest.mark.parametrize("image_score", ["max", "mean", "topk"])
def test_scores_and_maps_against_a_plain_formulation(image_score: str, model: Autoencoder) -> None:
    scorer = build(replace(CONFIG, image_score=image_score, smoothing_px=2.0))
    scorer.restore(model.tensors())
    prediction = scorer.predict(TEST)
    network = scorer._require_fitted()
    with torch.no_grad():
        x = (TEST.float() - network.mean) / network.std
        errors = ((network(x) - x) ** 2).mean(dim=1).numpy()
    expected = np.stack([gaussian_filter(error, 2.0) for error in errors])
    assert prediction.maps is not None
    np.testing.assert_allclose(prediction.maps, expected, rtol=1e-4)
    flat = np.sort(expected.reshape(4, -1))
    scores = {"max": flat[:, -1], "mean": flat.mean(axis=1), "topk": flat[:, -41:].mean(axis=1)}
    np.testing.assert_allclose(prediction.scores, scores[image_score], rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"latent_channels": 4},
        {"smoothing_px": 2.0},
        {"image_score": "mean"},
        {"training": replace(CONFIG.training, epochs=4)},
    ],
    ids=str,
)
def test_every_option_changes_the_scores(change: dict[str, Any], model: Autoencoder) -> None:
    scores = fitted(replace(CONFIG, **change)).predict(TEST).scores
    assert not np.allclose(scores, model.predict(TEST).scores, rtol=1e-6)


def test_seed_and_class_change_the_model_and_nothing_else_does(model: Autoencoder) -> None:
    again = fitted().tensors()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.tensors().items())
    scores = model.predict(TEST).scores
    assert not np.allclose(fitted(seed=1).predict(TEST).scores, scores)
    assert not np.allclose(fitted(category="q").predict(TEST).scores, scores)


def test_images_are_kept_as_bytes(model: Autoencoder) -> None:
    (images,), image_of_row = model._embedded(Batches(TRAIN), "images")
    assert images.dtype == torch.uint8 and torch.equal(images, TRAIN)
    assert image_of_row.tolist() == list(range(len(TRAIN)))


def test_resumed_model_is_the_uninterrupted_one(model: Autoencoder) -> None:
    states: dict[int, dict[str, Any]] = {}
    first = build()
    first.plan = TrainingPlan(after_epoch=lambda epoch, state: states.update({epoch: state()}))
    first.fit(Batches(TRAIN))
    second = build()
    second.plan = TrainingPlan(resume_from=states[2])
    second.fit(Batches(TRAIN))
    expected, resumed = model.tensors(), second.tensors()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_calibration_has_image_and_pixel_thresholds(model: Autoencoder) -> None:
    calibration = fitted().out_of_fold_calibration()
    assert calibration is not None and calibration.pixel is not None
    assert (calibration.num_folds, len(calibration.image_scores)) == (3, len(TRAIN))


def test_misfitting_tensors_are_named(model: Autoencoder) -> None:
    with pytest.raises(ConfigurationError, match=r"to_latent\.weight is \[32, 64, 1, 1\] instead of \[5, 64, 1, 1\]"):
        build(replace(CONFIG, latent_channels=5)).restore(model.tensors())
    with pytest.raises(ConfigurationError, match="std of the stored network is not positive"):
        build().restore({**model.tensors(), "std": torch.zeros(1, 3, 1, 1)})


def test_images_of_odd_sides_are_scored() -> None:
    detector = Autoencoder(CONFIG, CPU, PreprocessingConfig(45, 45), TrainingSource())
    detector.fit(Batches(random_images(4, 0, 45)))
    maps = detector.predict(random_images(2, 1, 45)).maps
    assert maps is not None and maps.shape == (2, 45, 45)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_channels": 0}, "--latent_channels is 0"),
        ({"smoothing_px": -1.0}, r"--smoothing_px is -1\.0"),
        ({"image_score": "most"}, "unknown --image_score 'most'"),
        ({"calibration_folds": 1}, "calibration folds is 1"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        replace(CONFIG, **change)

"""The autoencoder of feature maps: joining and statistics, the two losses, options, resuming, stored models."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from small_images import BACKBONE, PREPROCESSING, SIDE, Batches, random_images

from patchcore.configs import FeatureAutoencoderConfig, TrainingConfig, TrainingSource
from patchcore.detector import TrainingPlan
from patchcore.errors import ConfigurationError, DataError
from patchcore.features.extractor import FeatureExtractor, build_extractor
from patchcore.methods.feature_autoencoder import (
    FeatureAutoencoder,
    FeatureAutoencoderNet,
    channel_statistics,
    joined,
    normal_divergence,
    num_components,
)
from patchcore.methods.training import Training
from patchcore.scoring.calibration import THRESHOLD_STDS

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = FeatureAutoencoderConfig(BACKBONE, training=TrainingConfig(epochs=3, batch_size=4, lr=1e-2, grad_clip=None))
TRAIN, TEST = random_images(7, 0), random_images(4, 1)


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return build_extractor(BACKBONE, SIDE)


def build(
    extractor: FeatureExtractor, config: FeatureAutoencoderConfig = CONFIG, seed: int = 0, category: str = "p"
) -> FeatureAutoencoder:
    return FeatureAutoencoder(config, extractor, PREPROCESSING, TrainingSource("mpdd", category, seed))


def fitted(
    extractor: FeatureExtractor, config: FeatureAutoencoderConfig = CONFIG, **changes: Any
) -> FeatureAutoencoder:
    detector = build(extractor, config, **changes)
    detector.fit(Batches(TRAIN))
    return detector


@pytest.fixture(scope="module")
def model(extractor: FeatureExtractor) -> FeatureAutoencoder:
    return fitted(extractor)


def random_maps(*shapes: tuple[int, int, int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [3 + 2 * torch.randn(shape, generator=generator) for shape in shapes]


# ---------------------------------------------------------------- mathematics


def test_maps_are_joined_on_the_finest_grid_whatever_their_order() -> None:
    fine, coarse = random_maps((2, 3, 8, 8), (2, 5, 4, 4))
    both = joined([fine, coarse], 1)
    assert both.shape == (2, 8, 8, 8)
    assert torch.equal(both[:, :3], fine)
    assert torch.equal(joined([coarse, fine], 1), both[:, [3, 4, 5, 6, 7, 0, 1, 2]])
    constant = joined([torch.ones(1, 2, 6, 6)], 3)
    assert torch.equal(constant, torch.ones(1, 2, 6, 6)), "the border of a mean is no darker"
    assert joined([fine], 3)[0, 0, 4, 5] == pytest.approx(float(fine[0, 0, 3:6, 4:7].mean()))


def test_channel_statistics_are_those_of_all_places(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = random_maps((11, 3, 4, 4), (11, 2, 2, 2))
    mean, std = channel_statistics(maps, 3)
    values = joined(maps, 3).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.flatten(), values.mean(dim=1))
    torch.testing.assert_close(std.flatten(), values.std(dim=1, correction=0))
    still = torch.zeros(11, 1, 4, 4)
    _, floored = channel_statistics([maps[0], still], 1)
    assert floored[0, 3, 0, 0] == pytest.approx(0.1 * math.sqrt(maps[0].var(dim=(0, 2, 3)).mean() * 3 / 4), rel=0.02)
    assert channel_statistics([still], 1)[1].item() == 1


def test_components_hold_the_share_of_the_variance() -> None:
    """Ten channels that mix three independent ones: three components hold all, however wide the maps are."""
    generator = torch.Generator().manual_seed(0)
    sources = torch.randn(6, 3, 8, 8, generator=generator)
    mixed = torch.einsum("bshw,cs->bchw", sources, torch.randn(10, 3, generator=generator))
    config = replace(CONFIG, explained_variance=0.999)
    assert num_components([mixed], config) == 3
    assert num_components([mixed], replace(config, explained_variance=0.01)) == 1
    noise = torch.randn(40, 10, 8, 8, generator=generator)
    assert num_components([noise], replace(config, explained_variance=0.55)) in (5, 6)
    assert num_components([noise], replace(config, explained_variance=1.0)) == 10
    assert num_components([torch.zeros(2, 4, 2, 2)], config) == 1


def test_divergence_against_an_integral() -> None:
    mean, variance = torch.tensor([0.7, -0.2]), torch.tensor([0.5, 1.3])
    found = normal_divergence(mean.view(1, 2, 1, 1), variance.log().view(1, 2, 1, 1))
    x = torch.linspace(-12, 12, 200001, dtype=torch.float64)
    expected = 0.0
    for m, v in zip(mean.tolist(), variance.tolist(), strict=True):
        log_q = -((x - m) ** 2) / (2 * v) - 0.5 * math.log(2 * math.pi * v)
        log_p = -(x**2) / 2 - 0.5 * math.log(2 * math.pi)
        expected += float(torch.trapezoid(log_q.exp() * (log_q - log_p), x))
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert normal_divergence(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)).abs().max() == 0


def test_the_bottleneck_is_sampled_in_training_alone() -> None:
    maps = random_maps((4, 6, 5, 5))
    network = FeatureAutoencoderNet(6, 2, replace(CONFIG, variational=True, kl_weight=0.0), seed=0)
    network.standardise_by(maps)
    network.train()
    assert network.loss(maps) != network.loss(maps)
    network.eval()
    assert network.loss(maps) == network.loss(maps)
    x = network.standardised(maps)
    mean = network.encoder(x)[:, :2]
    torch.testing.assert_close(network.squared_error(maps), (network.decoder(mean) - x).square().mean(dim=1))
    torch.testing.assert_close(network.loss(maps), network.squared_error(maps).mean())


def test_the_divergence_is_weighed_per_channel() -> None:
    maps = random_maps((4, 6, 5, 5))
    config = replace(CONFIG, variational=True, kl_weight=0.3)
    network = FeatureAutoencoderNet(6, 2, config, seed=0).eval()
    network.standardise_by(maps)
    moments = network.encoder(network.standardised(maps))
    divergence = normal_divergence(moments[:, :2], moments[:, 2:]).mean()
    torch.testing.assert_close(network.loss(maps), network.squared_error(maps).mean() + 0.3 / 6 * divergence)


def test_features_in_a_subspace_are_drawn_again_and_others_are_not() -> None:
    """What the bottleneck has room for is learned; the direction that no training feature has is not."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    normal = torch.einsum("bshw,cs->bchw", torch.randn(16, 2, 8, 8, generator=generator), directions[:, :2])
    config = replace(CONFIG, latent_channels=2, training=replace(CONFIG.training, epochs=60))
    network = FeatureAutoencoderNet(8, 2, config, seed=0)
    network.standardise_by([normal])

    Training(network, network.loss, config.training, 0, "x").run([normal])
    odd = normal[:2].clone()
    odd[:, :, 3, 3] += 4 * directions[:, 5]
    with torch.no_grad():
        errors = network.squared_error([odd])
    assert errors[:, 3, 3].min() > 10 * errors.flatten(1).median()


# ---------------------------------------------------------------- the detector


@pytest.mark.parametrize("image_score", ["max", "mean", "topk"])
def test_scores_and_maps_against_a_plain_formulation(
    image_score: str, extractor: FeatureExtractor, model: FeatureAutoencoder
) -> None:
    scorer = build(extractor, replace(CONFIG, image_score=image_score))
    scorer.restore(model.tensors())
    prediction = scorer.predict(TEST)
    with torch.no_grad():
        errors = scorer._require_fitted().squared_error(list(extractor(TEST).values()))
    upsampled = F.interpolate(errors[:, None], size=SIDE, mode="bilinear", align_corners=False)[:, 0].numpy()
    expected = np.stack([gaussian_filter(m, 4.0) for m in upsampled])
    assert prediction.maps is not None
    np.testing.assert_allclose(prediction.maps, expected, rtol=1e-4)
    flat = np.sort(expected.reshape(4, -1))
    scores = {"max": flat[:, -1], "mean": flat.mean(axis=1), "topk": flat[:, -41:].mean(axis=1)}
    np.testing.assert_allclose(prediction.scores, scores[image_score], rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"patchsize": 3},
        {"latent_channels": 2},
        {"explained_variance": 0.3},
        {"variational": True},
        {"variational": True, "kl_weight": 5.0},
        {"feature_noise": 0.5},
        {"smoothing_px": 2.0},
        {"image_score": "mean"},
        {"training": replace(CONFIG.training, epochs=4)},
        {"backbone": replace(BACKBONE, layers=("blocks.1",))},
    ],
    ids=str,
)
def test_every_option_changes_the_scores(change: dict[str, Any], model: FeatureAutoencoder) -> None:
    config = replace(CONFIG, **change)
    base = replace(CONFIG, variational=True) if "kl_weight" in change else CONFIG
    other = fitted(build_extractor(config.backbone, SIDE), config)
    reference = model if base == CONFIG else fitted(model.extractor, base)
    assert not np.allclose(other.predict(TEST).scores, reference.predict(TEST).scores, rtol=1e-6)


def test_seed_and_class_change_the_model_and_nothing_else_does(
    extractor: FeatureExtractor, model: FeatureAutoencoder
) -> None:
    torch.manual_seed(5)
    again = fitted(extractor).tensors()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.tensors().items())
    scores = model.predict(TEST).scores
    assert not np.allclose(fitted(extractor, seed=1).predict(TEST).scores, scores)
    assert not np.allclose(fitted(extractor, category="q").predict(TEST).scores, scores)


@pytest.mark.parametrize("change", [{}, {"variational": True, "feature_noise": 0.3}], ids=str)
def test_resumed_model_is_the_uninterrupted_one(change: dict[str, Any], extractor: FeatureExtractor) -> None:
    config = replace(CONFIG, **change)
    states: dict[int, dict[str, Any]] = {}
    first = build(extractor, config)
    first.plan = TrainingPlan(after_epoch=lambda epoch, state: states.update({epoch: state()}))
    first.fit(Batches(TRAIN))
    second = build(extractor, config)
    second.plan = TrainingPlan(resume_from=states[1])
    second.fit(Batches(TRAIN))
    assert [r.epoch for r in second.history_] == [1, 2, 3]
    expected, resumed = first.tensors(), second.tensors()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_calibration_scores_each_image_by_a_network_trained_without_it(extractor: FeatureExtractor) -> None:
    images = TRAIN.clone()
    images[2, 0, 10:50, 10:50] = 255
    detector = build(extractor, replace(CONFIG, training=replace(CONFIG.training, epochs=15)))
    detector.fit(Batches(images))
    calibration = detector.out_of_fold_calibration()
    assert calibration is not None and calibration.pixel is not None
    assert calibration.num_folds == 3
    out_of_fold, in_sample = np.array(calibration.image_scores), detector.predict(images).scores
    assert out_of_fold.argmax() == 2 and out_of_fold[2] > 4 * in_sample[2]
    assert calibration.image.threshold == pytest.approx(out_of_fold.mean() + THRESHOLD_STDS * out_of_fold.std(ddof=1))


def test_divergence_names_class_epoch_and_remedy(extractor: FeatureExtractor) -> None:
    config = replace(CONFIG, training=TrainingConfig(20, 4, 1e6, 0.0, "constant", None))
    with pytest.raises(
        DataError, match=r"^p: autoencoder: training diverged in epoch \d+ of 20 .*: use a smaller --lr"
    ):
        build(extractor, config).fit(Batches(TRAIN))


def test_few_and_equal_images_give_finite_scores(extractor: FeatureExtractor) -> None:
    flat = torch.full((5, 3, SIDE, SIDE), 128, dtype=torch.uint8)
    for images in (TRAIN[:1], flat):
        detector = build(extractor)
        detector.fit(Batches(images))
        assert np.isfinite(detector.predict(torch.cat([flat[:2], TEST])).scores).all()
    with pytest.raises(DataError, match="no training images, expected at least one"):
        build(extractor).fit(Batches(TRAIN[:0]))


# ---------------------------------------------------------------- stored models and settings


def test_the_stored_width_of_the_bottleneck_holds(extractor: FeatureExtractor, model: FeatureAutoencoder) -> None:
    """It follows from the training images, which a stored model does not have."""
    width = model.tensors()["decoder.0.weight"].shape[1]
    rows, _ = model._embedded(Batches(TRAIN), "features")
    assert width == num_components(rows, CONFIG)
    loaded = build(extractor)
    loaded.restore(model.tensors())
    assert np.array_equal(loaded.predict(TEST).scores, model.predict(TEST).scores)


def test_misfitting_tensors_are_named(extractor: FeatureExtractor, model: FeatureAutoencoder) -> None:
    stored = model.tensors()
    with pytest.raises(ConfigurationError, match=r"encoder\.0\.weight is \[.*\] instead of \["):
        build(extractor, replace(CONFIG, latent_channels=3)).restore(stored)
    with pytest.raises(ConfigurationError, match=r"'decoder\.0\.weight' of rank 4 expected, found mean"):
        build(extractor).restore({"mean": stored["mean"]})
    with pytest.raises(ConfigurationError, match="std of the stored network is not positive"):
        build(extractor).restore({**stored, "std": torch.zeros_like(stored["std"])})
    with pytest.raises(ConfigurationError, match="mean of the stored network is not finite"):
        build(extractor).restore({**stored, "mean": stored["mean"] + math.nan})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patchsize": 4}, "--patchsize is 4, expected an odd number such as 3"),
        ({"latent_channels": 0}, "--latent_channels is 0"),
        ({"explained_variance": 1.5}, "--explained_variance is 1.5, expected a share"),
        ({"kl_weight": -1.0}, "--kl_weight is -1.0"),
        ({"feature_noise": math.nan}, "--feature_noise is nan"),
        ({"smoothing_px": 0.0}, "--smoothing_px is 0.0"),
        ({"image_score": "most"}, "unknown --image_score 'most'"),
        ({"calibration_folds": 1}, "calibration folds is 1"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        replace(CONFIG, **change)

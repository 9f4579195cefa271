"""FastFlow as a detector: what each option does, calibration, resuming, and bad input."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from patchcore import pipeline
from patchcore.configs import (
    BackboneConfig,
    FastFlowConfig,
    PostProcessingConfig,
    PreprocessingConfig,
    RuntimeConfig,
    TileConfig,
    TrainingConfig,
    TrainingSource,
)
from patchcore.detector import TrainingPlan
from patchcore.errors import ConfigurationError, DataError
from patchcore.features import layers
from patchcore.features.extractor import FeatureExtractor, build_extractor
from patchcore.methods.fastflow import FastFlow
from patchcore.methods.normalizing_flow import latent_bits, mean_probability
from patchcore.methods.training import Training
from patchcore.scoring.calibration import THRESHOLD_STDS

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 64
PREPROCESSING = PreprocessingConfig(SIDE, SIDE)
BACKBONE = BackboneConfig("efficientnet_lite0", ("blocks.1", "blocks.2"), weights="random")
CONFIG = FastFlowConfig(BACKBONE, flow_steps=2, training=TrainingConfig(epochs=3, batch_size=4, lr=1e-2))


class Batches:
    """Images in memory, in batches of three."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images
        self.num_images = len(images)

    def __len__(self) -> int:
        return -(-len(self.images) // 3)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for images in self.images.split(3):
            yield {"image": images}


def random_images(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(90, 160, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


TRAIN, TEST = random_images(7, 0), random_images(4, 1)


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return build_extractor(BACKBONE, SIDE)


def build(extractor: FeatureExtractor, config: FastFlowConfig = CONFIG, seed: int = 0, category: str = "p") -> FastFlow:
    return FastFlow(config, extractor, PREPROCESSING, TrainingSource("mpdd", category, seed))


def fitted(extractor: FeatureExtractor, config: FastFlowConfig = CONFIG, **changes: Any) -> FastFlow:
    return build(extractor, config, **changes).fit(Batches(TRAIN))


@pytest.fixture(scope="module")
def model(extractor: FeatureExtractor) -> FastFlow:
    return fitted(extractor)


# ---------------------------------------------------------------- scores and maps


@pytest.mark.parametrize("map_mode", ["prob", "nll", "weighted"])
@pytest.mark.parametrize("image_score", ["max", "mean", "topk"])
def test_scores_and_maps_against_a_plain_formulation(
    map_mode: str, image_score: str, extractor: FeatureExtractor, model: FastFlow
) -> None:
    scorer = build(extractor, replace(CONFIG, map_mode=map_mode, image_score=image_score))
    scorer.restore(model.tensors())
    prediction = scorer.predict(TEST)
    maps = extractor(TEST)
    grids = []
    flows = scorer._require_fitted()
    with torch.no_grad():
        for flow, spread, layer in zip(flows.flows, flows.spread, BACKBONE.layers, strict=True):
            latent, _ = flow(maps[layer])
            squares = latent.square().mean(dim=1)
            grid = mean_probability(squares) if map_mode == "prob" else latent_bits(squares)
            grid = grid / spread if map_mode == "weighted" else grid
            grids.append(F.interpolate(grid[:, None], size=16, mode="bilinear", align_corners=False))  # [B, 1, 16, 16]
    joined = sum(grids) / 2
    assert isinstance(joined, torch.Tensor)
    joined = -joined.log2() if map_mode == "prob" else joined
    upsampled = F.interpolate(joined, size=SIDE, mode="bilinear", align_corners=False)[:, 0]
    flat = upsampled.flatten(1)
    expected = {
        "max": flat.amax(dim=1),
        "mean": flat.mean(dim=1),
        "topk": flat.sort(dim=1).values[:, -41:].mean(dim=1),  # one percent of 4096, rounded up
    }
    np.testing.assert_allclose(prediction.scores, expected[image_score].numpy(), rtol=1e-5)
    assert prediction.maps is not None and prediction.maps.shape == (4, SIDE, SIDE)
    np.testing.assert_allclose(prediction.maps, upsampled.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"flow_steps": 3},
        {"hidden_ratio": 0.5},
        {"conv3x3_only": True},
        {"clamp": 0.05},
        {"feature_noise": 0.2},
        {"precision": "bfloat16"},
        {"map_mode": "nll"},
        {"map_mode": "weighted"},
        {"image_score": "mean"},
        {"image_score": "topk"},
        {"training": replace(CONFIG.training, epochs=4)},
        {"post_processing": PostProcessingConfig("gaussian")},
        {"post_processing": PostProcessingConfig("gaussian", 2.0)},
        {"post_processing": PostProcessingConfig("guided")},
        {"post_processing": PostProcessingConfig("guided", 2.0)},
        {"post_processing": PostProcessingConfig(adaptive_normalization=True)},
        {"post_processing": PostProcessingConfig(scales=(1.0, 1.5))},
        {"tiles": TileConfig(32, 32)},
        {"tiles": TileConfig(32, 16)},
        {"tiles": TileConfig(32, 16, training_tiles=9)},
        {"backbone": replace(BACKBONE, layers=("blocks.1",))},
    ],
    ids=str,
)
def test_every_option_changes_the_scores(change: dict[str, Any], model: FastFlow) -> None:
    config = replace(CONFIG, **change)
    other = fitted(build_extractor(config.backbone, SIDE), config)
    assert not np.allclose(other.predict(TEST).scores, model.predict(TEST).scores, rtol=1e-6)


def test_seed_and_class_change_the_model_and_nothing_else_does(extractor: FeatureExtractor, model: FastFlow) -> None:
    scores = model.predict(TEST).scores
    assert np.array_equal(fitted(extractor).predict(TEST).scores, scores)
    assert not np.allclose(fitted(extractor, seed=1).predict(TEST).scores, scores)
    assert not np.allclose(fitted(extractor, category="q").predict(TEST).scores, scores)


@pytest.mark.parametrize("map_mode", ["prob", "nll", "weighted"])
def test_the_order_of_layers_does_not_matter(map_mode: str, model: FastFlow) -> None:
    """The flows of a model, each with its layer, in the other order: the same maps."""
    one = build(model.extractor, replace(CONFIG, map_mode=map_mode))
    one.restore(model.tensors())
    config = replace(CONFIG, map_mode=map_mode, backbone=replace(BACKBONE, layers=BACKBONE.layers[::-1]))
    other = build(build_extractor(config.backbone, SIDE), config)
    exchanged = {"flows.0": "flows.1", "flows.1": "flows.0"}
    tensors = {exchanged.get(name[:7], name[:7]) + name[7:]: tensor for name, tensor in model.tensors().items()}
    other.restore({**tensors, "spread": tensors["spread"].flip(0)})
    expected, found = one.predict(TEST), other.predict(TEST)
    assert expected.maps is not None and found.maps is not None
    np.testing.assert_allclose(found.maps, expected.maps, rtol=1e-5)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


# ---------------------------------------------------------------- training


def test_history_and_callback(extractor: FeatureExtractor, model: FastFlow) -> None:
    seen: list[tuple[int, float]] = []
    detector = build(extractor)

    def measure(epoch: int, state: Any) -> None:
        seen.append((epoch, float(detector.predict(TEST).scores[0])))  # as --eval_every does

    detector.plan = TrainingPlan(after_epoch=measure)
    detector.fit(Batches(TRAIN))
    assert [epoch for epoch, _ in seen] == [r.epoch for r in detector.history_] == [1, 2, 3]
    assert len({score for _, score in seen}) == 3
    assert seen[-1][1] == detector.predict(TEST).scores[0], "the last epoch is the model"
    assert np.array_equal(detector.predict(TEST).scores, model.predict(TEST).scores), "measuring selects nothing"
    assert detector.history_[-1].loss < detector.history_[0].loss


def test_resumed_model_is_the_uninterrupted_one(extractor: FeatureExtractor, model: FastFlow) -> None:
    states: dict[int, dict[str, Any]] = {}
    first = build(extractor)
    first.plan = TrainingPlan(after_epoch=lambda epoch, state: states.update({epoch: state()}))
    first.fit(Batches(TRAIN))

    second = build(extractor)
    second.plan = TrainingPlan(resume_from=states[1])
    second.fit(Batches(TRAIN))
    assert [r.epoch for r in second.history_] == [1, 2, 3]
    expected, resumed = model.tensors(), second.tensors()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_early_stopping_on_held_out_images(extractor: FeatureExtractor, monkeypatch: pytest.MonkeyPatch) -> None:
    training = replace(CONFIG.training, epochs=30, lr=5e-2, patience=1)
    detector = build(extractor, replace(CONFIG, training=training))
    detector.plan = TrainingPlan(held_out=Batches(random_images(3, 9) // 2))
    detector.fit(Batches(TRAIN))
    losses = [r.held_out_loss for r in detector.history_]
    assert None not in losses and 2 < len(losses) < 30
    with pytest.raises(ConfigurationError, match="early stopping watches held-out images, found none"):
        build(extractor, replace(CONFIG, training=training)).fit(Batches(TRAIN))
    epochs: dict[str, int] = {}
    train = Training.run

    def counted(self: Training, *given: Any, **options: Any) -> Any:
        history = train(self, *given, **options)
        epochs[self.description] = len(history)
        return history

    monkeypatch.setattr(Training, "run", counted)
    assert detector.out_of_fold_calibration() is not None, "folds need no held-out images of their own"
    kept = len(losses) - 1  # the epoch of the lowest loss, after which patience ran out
    assert epochs == {"p: fold 0": kept, "p: fold 1": kept, "p: fold 2": kept}


def test_divergence_names_class_epoch_and_remedy(extractor: FeatureExtractor) -> None:
    config = replace(CONFIG, training=TrainingConfig(20, 4, 1e6, 0.0, "constant", None))
    detector = build(extractor, config)
    with pytest.raises(DataError, match=r"^p: flows: training diverged in epoch \d+ of 20 .*: use a smaller --lr"):
        detector.fit(Batches(TRAIN))


def test_no_image_is_refused_and_one_is_enough(extractor: FeatureExtractor) -> None:
    with pytest.raises(DataError, match="no training images, expected at least one"):
        build(extractor).fit(Batches(TRAIN[:0]))
    detector = build(extractor).fit(Batches(TRAIN[:1]))
    assert detector.out_of_fold_calibration() is None
    assert np.isfinite(detector.predict(TEST).scores).all()


def test_equal_images_give_finite_scores(extractor: FeatureExtractor) -> None:
    flat = torch.full((5, 3, SIDE, SIDE), 128, dtype=torch.uint8)
    detector = build(extractor, replace(CONFIG, map_mode="weighted")).fit(Batches(flat))
    assert np.isfinite(detector.predict(torch.cat([flat[:2], TEST])).scores).all()


@pytest.mark.parametrize("map_mode", ["prob", "nll", "weighted"])
def test_one_image_with_maps_of_one_position_is_enough(map_mode: str) -> None:
    backbone = replace(BACKBONE, layers=("blocks.5", "blocks.6"))
    small = build_extractor(backbone, 32)
    assert {small.feature_shapes[layer][1:] for layer in backbone.layers} == {(1, 1)}
    config = replace(CONFIG, backbone=backbone, map_mode=map_mode)
    detector = FastFlow(config, small, PreprocessingConfig(32, 32), TrainingSource("mpdd", "p", 0))
    detector.fit(Batches(TRAIN[:1, :, :32, :32]))
    spread = detector.tensors()["spread"]
    assert spread.isfinite().all() and (spread > 0).all()
    prediction = detector.predict(TEST[:, :, :32, :32])
    assert prediction.maps is not None and prediction.maps.shape == (4, 32, 32)
    assert np.isfinite(prediction.maps).all() and np.isfinite(prediction.scores).all()


# ---------------------------------------------------------------- calibration


def test_calibration_scores_each_image_by_flows_trained_without_it(extractor: FeatureExtractor) -> None:
    """An outlier among the training images is far more anomalous to a model that has not seen it."""
    images = TRAIN.clone()
    images[2, 0, 10:50, 10:50] = 255
    config = replace(CONFIG, training=replace(CONFIG.training, epochs=10))
    detector = build(extractor, config).fit(Batches(images))
    calibration = detector.out_of_fold_calibration()
    assert calibration is not None and calibration.pixel is not None and calibration.map_maxima is not None
    assert calibration.num_folds == 3
    out_of_fold = np.array(calibration.image_scores)
    in_sample = detector.predict(images).scores
    assert out_of_fold.argmax() == 2, "scores are in the order of the images"
    assert out_of_fold[2] - in_sample[2] > 5 * np.median(out_of_fold - in_sample)
    assert calibration.image.threshold == pytest.approx(out_of_fold.mean() + THRESHOLD_STDS * out_of_fold.std(ddof=1))


def test_number_of_calibration_folds(extractor: FeatureExtractor) -> None:
    def calibrated(folds: int) -> Any:
        return fitted(extractor, replace(CONFIG, calibration_folds=folds)).out_of_fold_calibration()

    two, many = calibrated(2), calibrated(50)
    assert (two.num_folds, many.num_folds) == (2, len(TRAIN))
    assert two.image_scores != many.image_scores
    assert len(two.image_scores) == len(many.image_scores) == len(TRAIN)


def test_calibration_leaves_the_model_alone(extractor: FeatureExtractor, model: FastFlow) -> None:
    detector = fitted(extractor)
    detector.out_of_fold_calibration()
    assert np.array_equal(detector.predict(TEST).scores, model.predict(TEST).scores)


# ---------------------------------------------------------------- tiles and scales

TILED = replace(CONFIG, tiles=TileConfig(32, 16))
AS_THEY_ARE = PreprocessingConfig(SIDE, SIDE, max_side_px=100)


@pytest.fixture(scope="module")
def tiled(extractor: FeatureExtractor) -> FastFlow:
    return fitted(extractor, TILED)


class TestTiles:
    def test_an_image_of_one_tile_is_scored_as_a_whole(self, extractor: FeatureExtractor, model: FastFlow) -> None:
        one = build(extractor, replace(CONFIG, tiles=TileConfig(SIDE, SIDE)))
        one.restore(model.tensors())
        expected, found = model.predict(TEST), one.predict(TEST)
        assert expected.maps is not None and found.maps is not None
        np.testing.assert_allclose(found.maps, expected.maps, rtol=1e-5)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)

    def test_flows_are_trained_on_drawn_tiles(self, extractor: FeatureExtractor) -> None:
        detector = build(extractor, replace(TILED, tiles=TileConfig(32, 16, training_tiles=3)))
        features, image_of_row = detector._embedded(Batches(TRAIN), "features")
        assert image_of_row.tolist() == [image for image in range(len(TRAIN)) for _ in range(3)]
        assert [len(maps) for maps in features] == [21, 21]
        again, _ = detector._embedded(Batches(TRAIN), "features")
        assert all(torch.equal(a, b) for a, b in zip(features, again, strict=True))

    def test_low_memory_changes_no_map(self, extractor: FeatureExtractor, tiled: FastFlow) -> None:
        frugal = build(extractor, replace(TILED, tiles=TileConfig(32, 8, low_memory=True)))
        greedy = build(extractor, replace(TILED, tiles=TileConfig(32, 8)))
        for detector in (frugal, greedy):
            detector.restore(tiled.tensors())
        one, other = frugal.predict(TEST).maps, greedy.predict(TEST).maps
        assert one is not None and other is not None
        np.testing.assert_allclose(one, other, rtol=1e-5)

    def test_images_of_any_size_keep_it(self, extractor: FeatureExtractor, tiled: FastFlow) -> None:
        detector = FastFlow(TILED, extractor, AS_THEY_ARE, TrainingSource("mpdd", "p", 0))
        detector.restore(tiled.tensors())
        for size in ((32, 32), (50, 97), (33, 64)):
            maps = detector.predict(torch.zeros(1, 3, *size, dtype=torch.uint8)).maps
            assert maps is not None and maps.shape == (1, *size) and np.isfinite(maps).all()
        with pytest.raises(DataError, match="an image of 70 x 20 px is smaller than a tile of 32 px: use"):
            detector.predict(torch.zeros(1, 3, 20, 70, dtype=torch.uint8))

    def test_a_defect_is_found_where_it_is(self, extractor: FeatureExtractor) -> None:
        """A bright square in a large image: the map is highest on it, wherever tiles begin."""
        generator = torch.Generator().manual_seed(3)
        images = torch.randint(90, 160, (6, 3, 90, 120), dtype=torch.uint8, generator=generator)
        detector = FastFlow(TILED, extractor, replace(AS_THEY_ARE, max_side_px=200), TrainingSource("mpdd", "p", 0))
        detector.fit(Batches(images))
        test = images[:1].clone()
        test[:, :, 60:72, 80:92] = 255
        maps = detector.predict(test).maps
        assert maps is not None
        row, column = np.unravel_index(maps[0].argmax(), maps[0].shape)
        assert 54 <= row < 78 and 74 <= column < 98

    def test_a_constant_image_gives_a_map_without_seams(self, extractor: FeatureExtractor, tiled: FastFlow) -> None:
        """No step between neighbouring pixels is larger where a tile begins than it is inside the tiles."""
        detector = FastFlow(TILED, extractor, replace(AS_THEY_ARE, max_side_px=200), TrainingSource("mpdd", "p", 0))
        detector.restore(tiled.tensors())
        maps = detector.predict(torch.full((1, 3, 128, 128), 120, dtype=torch.uint8)).maps
        assert maps is not None
        one_tile = detector.predict(torch.full((1, 3, 32, 32), 120, dtype=torch.uint8)).maps
        assert one_tile is not None
        steps_inside = np.abs(np.diff(one_tile[0], axis=1)).max()
        assert np.abs(np.diff(maps[0], axis=1)).max() <= steps_inside + 1e-6
        assert np.abs(np.diff(maps[0], axis=0)).max() <= np.abs(np.diff(one_tile[0], axis=0)).max() + 1e-6
        centre = maps[0][32:-32, 32:-32]
        np.testing.assert_allclose(centre[:16], centre[16:32], rtol=1e-5)  # periodic: no tile differs from the others

    def test_calibration_leaves_all_tiles_of_an_image_out(self, extractor: FeatureExtractor) -> None:
        images = TRAIN.clone()
        images[2, 0, 10:50, 10:50] = 255
        config = replace(TILED, tiles=TileConfig(32, 32), training=replace(CONFIG.training, epochs=8))
        detector = build(extractor, config).fit(Batches(images))
        calibration = detector.out_of_fold_calibration()
        assert calibration is not None
        out_of_fold = np.array(calibration.image_scores)
        assert len(out_of_fold) == len(images) and out_of_fold.argmax() == 2
        assert out_of_fold[2] > 1.5 * detector.predict(images).scores[2]

    @pytest.mark.parametrize(
        ("tiles", "preprocessing", "message"),
        [
            (None, AS_THEY_ARE, "images that keep their resolution are scored in tiles: add --enable_patch_inference"),
            (TileConfig(65, 32), PREPROCESSING, "--patch_size 65 is larger than the images of 64 px: use 64 or less"),
            (TileConfig(101, 32), AS_THEY_ARE, "--patch_size 101 is larger than the images of 100 px"),
        ],
    )
    def test_misfits_are_found_before_any_work(
        self, tiles: TileConfig | None, preprocessing: PreprocessingConfig, message: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=message):
            FastFlow.prepare(replace(CONFIG, tiles=tiles), preprocessing, RuntimeConfig())


def test_scales_average_the_maps_of_resized_images(extractor: FeatureExtractor, model: FastFlow) -> None:
    detector = build(extractor, replace(CONFIG, post_processing=PostProcessingConfig(scales=(1.0, 1.5))))
    detector.restore(model.tensors())
    large = F.interpolate(TEST.float(), size=96, mode="bilinear", align_corners=False)
    flows = model._require_fitted()
    grid = flows.anomaly_grid(list(extractor(large).values()), CONFIG.map_mode)
    expected = F.interpolate(grid[:, None], size=SIDE, mode="bilinear", align_corners=False)[:, 0].detach().numpy()
    single, joined = model.predict(TEST).maps, detector.predict(TEST).maps
    assert single is not None and joined is not None
    np.testing.assert_allclose(joined, (single + expected) / 2, rtol=1e-4)


def test_scales_that_change_nothing_or_do_not_run_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"--multi_scale 1 and 1\.1 are both 64 px for an input of 64 px"):
        config = replace(CONFIG, post_processing=PostProcessingConfig(scales=(1.0, 1.1)))
        FastFlow.prepare(config, PREPROCESSING, RuntimeConfig())
    vit = BackboneConfig("timm:vit_tiny_patch16_224", ("blocks.1",), weights="random")
    with pytest.raises(ConfigurationError, match=r"takes images of 64 px alone, --multi_scale 1\.5 gives 96 px"):
        config = replace(CONFIG, backbone=vit, post_processing=PostProcessingConfig(scales=(1.5,)))
        FastFlow.prepare(config, PREPROCESSING, RuntimeConfig())


def test_a_scale_that_rounds_to_the_size_of_the_input_is_refused() -> None:
    config = replace(CONFIG, post_processing=PostProcessingConfig(scales=(1.1,)))
    with pytest.raises(ConfigurationError, match=r"--multi_scale 1\.1 is 64 px for an input of 64 px, no other size"):
        FastFlow.prepare(config, PREPROCESSING, RuntimeConfig())


# ---------------------------------------------------------------- one extractor


def test_presets_of_one_backbone_share_its_extractor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four classes of four settings, which a run prepares one after the other."""
    built: list[tuple[BackboneConfig, int]] = []
    known: WeakValueDictionary[Any, FeatureExtractor] = WeakValueDictionary()
    monkeypatch.setattr(layers, "_EXTRACTORS", known)
    monkeypatch.setattr(layers, "build_extractor", lambda *given: built.append(given) or build_extractor(*given))
    configs = {f"class{number}": replace(CONFIG, clamp=1 + number / 4) for number in range(4)}
    builders = pipeline._prepare("fastflow", configs, PREPROCESSING, RuntimeConfig())
    detectors = [build_one(TrainingSource(), torch.device("cpu")) for build_one in builders.values()]
    assert [d.config.clamp for d in detectors if isinstance(d, FastFlow)] == [1.0, 1.25, 1.5, 1.75]
    assert built == [(BACKBONE, SIDE)]
    assert len({id(d.extractor) for d in detectors if isinstance(d, FastFlow)}) == 1
    FastFlow.prepare(CONFIG, PreprocessingConfig(96, 96), RuntimeConfig())
    FastFlow.prepare(replace(CONFIG, backbone=replace(BACKBONE, seed=1)), PREPROCESSING, RuntimeConfig())
    assert len(built) == 3, "another size or other weights are another extractor"
    del builders, detectors
    gc.collect()
    assert not known, "an extractor goes with those who use it"


# ---------------------------------------------------------------- stored models


def test_misfitting_tensors_are_named(extractor: FeatureExtractor, model: FastFlow) -> None:
    with pytest.raises(ConfigurationError, match=r"flows\.0\.steps\.2\.global_scale is missing"):
        build(extractor, replace(CONFIG, flow_steps=3)).restore(model.tensors())
    with pytest.raises(ConfigurationError, match=r"subnet\.0\.weight is \[\d+, .*\] instead of \["):
        build(extractor, replace(CONFIG, hidden_ratio=0.5)).restore(model.tensors())

"""Nearest neighbours of pooled features: choice of features, distances, leave-one-out, too few images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_images import BACKBONE, PREPROCESSING, SIDE, Batches, random_images

from patchcore.configs import BackboneConfig, ResNetKNNConfig, TrainingSource
from patchcore.errors import ConfigurationError, DataError
from patchcore.features.extractor import FeatureExtractor, build_extractor
from patchcore.features.layers import last_layer, middle_layers
from patchcore.memory.torch_search import TorchNN
from patchcore.methods import resnet_knn
from patchcore.methods.resnet_knn import ResNetKNN, leave_one_out_distances, most_varied
from patchcore.scoring.calibration import THRESHOLD_STDS

pytestmark = pytest.mark.usefixtures("one_thread")

LAYER = replace(BACKBONE, layers=("blocks.2",))
CONFIG = ResNetKNNConfig(LAYER, num_features=7, num_neighbours=3)
TRAIN, TEST = random_images(8, 0), random_images(4, 1)


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return build_extractor(LAYER, SIDE)


def build(extractor: FeatureExtractor, config: ResNetKNNConfig = CONFIG) -> ResNetKNN:
    return ResNetKNN(config, extractor, PREPROCESSING, TrainingSource("mpdd", "p", 0))


def left_out(bank: torch.Tensor, k: int) -> torch.Tensor:
    return leave_one_out_distances(TorchNN(torch.device("cpu")).fit(bank), bank, k)


# ---------------------------------------------------------------- mathematics


def test_the_features_that_vary_most_are_kept() -> None:
    features = torch.tensor([[0.0, 5.0, 1.0, 9.0], [0.0, 7.0, 1.0, 5.0], [0.0, 6.0, 1.3, 1.0]])
    chosen, kept = most_varied(features, 2)
    assert kept.tolist() == [1, 3]
    assert torch.equal(chosen, features[:, [1, 3]])
    assert most_varied(features, 3)[1].tolist() == [1, 2, 3]
    assert most_varied(features, 9)[1].tolist() == [0, 1, 2, 3], "all of them where there are fewer"
    assert most_varied(features[:1], 2)[1].tolist() == [0, 1], "one image: all vary alike"


def test_leave_one_out_by_hand() -> None:
    bank = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert left_out(bank, 1).tolist() == [1, 1, 2, 4]
    assert left_out(bank, 2).tolist() == [2, 1.5, 2.5, 5]
    assert left_out(bank, 3).tolist() == pytest.approx([11 / 3, 3, 3, 17 / 3])


def test_no_image_finds_itself_but_its_twin() -> None:
    bank = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    assert left_out(bank, 1).tolist() == [0, 0, 5], "a twin is a neighbour like any other"
    assert left_out(bank, 2).tolist() == [2.5, 2.5, 5], "and counts once, not twice"


@pytest.mark.parametrize("num_twins", [1, 2, 5, 30])
@pytest.mark.parametrize("k", [1, 4, 20])
def test_leave_one_out_is_a_search_in_the_other_images(num_twins: int, k: int) -> None:
    generator = torch.Generator().manual_seed(num_twins)
    bank = torch.cat([torch.randn(25, 6, generator=generator), torch.ones(num_twins, 6)])
    expected = []
    for i in range(len(bank)):
        others = torch.cat([bank[:i], bank[i + 1 :]])
        expected.append(torch.linalg.vector_norm(others - bank[i], dim=1).sort().values[:k].mean())
    np.testing.assert_allclose(left_out(bank, k).numpy(), torch.stack(expected).numpy(), rtol=1e-5, atol=1e-6)


def test_scores_against_a_plain_formulation(extractor: FeatureExtractor) -> None:
    detector = build(extractor).fit(Batches(TRAIN))
    train, test = (extractor(images)["blocks.2"].mean(dim=(2, 3)).numpy() for images in (TRAIN, TEST))
    kept = np.sort(np.argsort(-train.std(axis=0))[:7])
    distances = np.linalg.norm(test[:, None, kept] - train[None, :, kept], axis=2)  # [4, 8]
    prediction = detector.predict(TEST)
    np.testing.assert_allclose(prediction.scores, np.sort(distances)[:, :3].mean(axis=1), rtol=1e-5)
    assert prediction.maps is None


def test_threshold_is_that_of_leave_one_out_scores(extractor: FeatureExtractor) -> None:
    detector = build(extractor).fit(Batches(TRAIN))
    calibration = detector.out_of_fold_calibration()
    assert calibration is not None and calibration.pixel is None and calibration.map_maxima is None
    assert calibration.num_folds == len(TRAIN)
    scores = left_out(detector.tensors()["bank"], 3).numpy()
    assert calibration.image_scores == pytest.approx(scores)
    assert calibration.image.threshold == pytest.approx(scores.mean() + THRESHOLD_STDS * scores.std(ddof=1))
    assert (scores > detector.predict(TRAIN).scores).all(), "in the bank, an image is its own nearest neighbour"


# ---------------------------------------------------------------- options and their limits


@pytest.mark.parametrize("change", [{"num_features": 6}, {"num_neighbours": 4}])
def test_every_option_changes_the_scores(change: dict[str, Any], extractor: FeatureExtractor) -> None:
    one = build(extractor).fit(Batches(TRAIN)).predict(TEST).scores
    other = build(extractor, replace(CONFIG, **change)).fit(Batches(TRAIN)).predict(TEST).scores
    assert not np.allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize(
    ("num_images", "message"),
    [
        (3, "k=3 needs 4 training images for leave-one-out, got 3: use -k 2 or --clamp_k"),
        (1, "k=3 needs 4 training images for leave-one-out, got 1: use more images or --clamp_k"),
        (0, "no training images, expected at least one"),
    ],
)
def test_too_few_images_are_refused_before_any_work(num_images: int, message: str, extractor: FeatureExtractor) -> None:
    class Untouched(Batches):
        def __iter__(self) -> Any:
            raise AssertionError("images were read")

    with pytest.raises(DataError) as refused:
        build(extractor).fit(Untouched(TRAIN[:num_images]))
    assert str(refused.value) == message


@pytest.mark.parametrize(("num_images", "lowered"), [(3, 2), (1, 1)])
def test_k_is_lowered_on_request(
    num_images: int, lowered: int, extractor: FeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(resnet_knn.LOGGER, "info", lambda text, *values: told.append(text % values))
    detector = build(extractor, replace(CONFIG, clamp_neighbours=True)).fit(Batches(TRAIN[:num_images]))
    assert told == [f"p: k=3 is lowered to {lowered}, because there are {num_images} training image(s)"]
    expected = build(extractor, replace(CONFIG, num_neighbours=lowered, clamp_neighbours=True))
    expected.fit(Batches(TRAIN[:num_images]))
    assert np.array_equal(detector.predict(TEST).scores, expected.predict(TEST).scores)
    assert (detector.out_of_fold_calibration() is None) == (num_images == 1)


def test_a_backbone_with_fewer_features_keeps_all_and_says_so(
    extractor: FeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(resnet_knn.LOGGER, "info", lambda text, *values: told.append(text % values))
    detector = build(extractor, replace(CONFIG, num_features=500)).fit(Batches(TRAIN))
    assert detector.tensors()["kept"].tolist() == list(range(40))
    assert told == ["p: all 40 features of efficientnet_lite0 are kept, --num_features asks for 500"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": BACKBONE}, "resnet_knn pools one layer, found 2"),
        ({"num_features": 0}, "--num_features is 0, expected 1 or more"),
        ({"num_neighbours": 0}, "-k is 0, expected 1 or more"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bank": torch.zeros(8, 6)}, "the bank holds 6 features of torch.float32 and names 7"),
        ({"bank": torch.zeros(8, 7, dtype=torch.float64)}, "7 features of torch.float64"),
        ({"bank": torch.zeros(3, 7)}, "the bank holds 3 images, k=3 needs 4"),
        ({"kept": torch.arange(34, 41)}, "the kept features are not numbers below 40"),
        ({"kept": torch.arange(7.0)}, "the kept features are not numbers"),
    ],
)
def test_misfitting_tensors_are_refused(
    change: dict[str, torch.Tensor], message: str, extractor: FeatureExtractor
) -> None:
    stored = build(extractor).fit(Batches(TRAIN)).tensors()
    with pytest.raises(ConfigurationError, match=message):
        build(extractor).restore({**stored, **change})


# ---------------------------------------------------------------- layers that stand for a backbone


@pytest.mark.parametrize(
    ("backbone", "layer", "num_channels"),
    [("resnet18", "layer4", 512), ("efficientnet_lite0", "bn2", 1280), ("timm:vit_tiny_patch16_224", "blocks.11", 192)],
)
def test_the_last_layer_is_what_the_network_pools(backbone: str, layer: str, num_channels: int) -> None:
    assert last_layer(backbone) == layer
    extractor = build_extractor(BackboneConfig(backbone, (layer,), weights="random"), 224)
    assert extractor.feature_shapes[layer][0] == num_channels


def test_middle_layers_of_a_backbone_without_any_are_asked_for() -> None:
    assert middle_layers("resnet50") == ("layer2", "layer3")
    with pytest.raises(ConfigurationError, match=r"'timm:resnet18' has no layers of its own here: name .* -le LAYER"):
        middle_layers("timm:resnet18")
    with pytest.raises(ConfigurationError, match="unknown backbone 'resnet51': did you mean"):
        last_layer("resnet51")

"""PatchCore: equal to a plain formulation, k honoured, images independent, calibration out of fold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from patchcore.configs import (
    BackboneConfig,
    PatchCoreConfig,
    PreprocessingConfig,
    RuntimeConfig,
    SamplerConfig,
    TrainingSource,
)
from patchcore.detector import NotFittedError
from patchcore.errors import ConfigurationError, DataError
from patchcore.features.extractor import FeatureExtractor, build_extractor
from patchcore.memory import torch_search
from patchcore.memory.torch_search import principal_directions
from patchcore.methods.patchcore import PatchCore, PatchEmbedder

SIDE = 64
CPU = torch.device("cpu")
PREPROCESSING = PreprocessingConfig(SIDE, SIDE)
BACKBONE = BackboneConfig("resnet18", ("layer2", "layer3"), weights="random")


class Batches:
    """Images in memory as a loader gives them."""

    def __init__(self, images: torch.Tensor, batch_size: int = 2) -> None:
        self.images, self.batch_size = images, batch_size

    @property
    def num_images(self) -> int:
        return len(self.images)

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter([{"image": part} for part in self.images.split(self.batch_size)])


def random_images(count: int, seed: int) -> torch.Tensor:
    """Return smooth random images uint8 [count, 3, S, S]: noise alone would give all patches the same distance."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (count, 3, 8, 8), generator=generator)
    return F.interpolate(noise.float(), size=SIDE, mode="bilinear").round().to(torch.uint8)


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return build_extractor(BACKBONE, SIDE)


@pytest.fixture(scope="module")
def train() -> torch.Tensor:
    return random_images(6, seed=0)


@pytest.fixture(scope="module")
def test() -> torch.Tensor:
    return random_images(5, seed=1)


def build(extractor: FeatureExtractor, seed: int = 0, category: str = "plate", **changes: object) -> PatchCore:
    sampler = changes.pop("sampler", SamplerConfig("identity", 1.0))
    changes |= {"seed": changes.pop("config_seed", None)}
    config = PatchCoreConfig(BACKBONE, sampler, **{"num_nn": 1, **changes})  # type: ignore[arg-type]
    embedder = PatchEmbedder(extractor, config)
    return PatchCore(config, embedder, PREPROCESSING, TrainingSource("mpdd", category, seed))


# ---------------------------------------------------------------- against a plain formulation


def plain_embeddings(extractor: FeatureExtractor, images: torch.Tensor, concat: bool) -> torch.Tensor:
    """Embed patches step by step as the paper says: float32 [B * P, D]."""
    first, *_ = maps = list(extractor(images).values())
    layers = []
    for feature_map in maps:
        batch, channels, height, width = feature_map.shape
        patches = F.unfold(feature_map, kernel_size=3, padding=1).reshape(batch, channels * 9, height, width)
        aligned = F.interpolate(patches, size=first.shape[-2:], mode="bilinear", align_corners=False)
        flat = aligned.permute(0, 2, 3, 1).reshape(-1, channels, 9)  # [B * P, C, 9]
        layers.append(flat.mean(dim=2) if concat else F.adaptive_avg_pool1d(flat.flatten(1), 1024))
    if concat:
        return torch.cat(layers, dim=1)
    return F.adaptive_avg_pool1d(torch.stack(layers, dim=1).flatten(1), 1024)  # [B * P, 1024]


@pytest.mark.parametrize("embedding", ["pooled", "concat"])
@pytest.mark.parametrize("num_nn", [1, 3])
def test_equal_to_a_plain_formulation(
    embedding: str, num_nn: int, extractor: FeatureExtractor, train: torch.Tensor, test: torch.Tensor
) -> None:
    bank, queries = (plain_embeddings(extractor, images, embedding == "concat") for images in (train, test))
    distances = torch.cdist(queries.double(), bank.double())
    patch_scores = distances.sort(dim=1).values[:, :num_nn].mean(dim=1).view(len(test), 8, 8)
    expected = F.interpolate(patch_scores[:, None], size=SIDE, mode="bilinear", align_corners=False)[:, 0].numpy()
    maps = np.stack([gaussian_filter(m, sigma=4) for m in expected])

    prediction = build(extractor, embedding=embedding, num_nn=num_nn).fit(Batches(train)).predict(test)
    np.testing.assert_allclose(prediction.scores, patch_scores.flatten(1).amax(dim=1).numpy(), rtol=1e-4)
    assert prediction.maps is not None
    np.testing.assert_allclose(prediction.maps, maps, rtol=1e-4)
    assert prediction.scores.dtype == prediction.maps.dtype == np.float32
    assert prediction.maps.shape == (5, SIDE, SIDE)


def test_training_images_have_distance_zero_in_a_bank_of_all_patches(
    extractor: FeatureExtractor, train: torch.Tensor, test: torch.Tensor
) -> None:
    model = build(extractor).fit(Batches(train))
    assert len(model.memory_bank_) == 6 * 8 * 8
    scale = float(model.predict(test).scores.min())
    assert float(model.predict(train).scores.max()) < 1e-3 * scale


# ---------------------------------------------------------------- independence


def test_the_score_of_an_image_does_not_depend_on_its_company(
    extractor: FeatureExtractor, train: torch.Tensor, test: torch.Tensor
) -> None:
    model = build(extractor, num_nn=2, sampler=SamplerConfig("approx_greedy_coreset", 0.3)).fit(Batches(train))
    whole = model.predict(test)
    alone = [model.predict(image) for image in test.split(1)]
    reverse = model.predict(test.flip(0))
    assert whole.maps is not None and reverse.maps is not None
    np.testing.assert_allclose([p.scores[0] for p in alone], whole.scores, rtol=1e-5)
    np.testing.assert_allclose(np.stack([p.maps[0] for p in alone if p.maps is not None]), whole.maps, rtol=1e-5)
    np.testing.assert_allclose(reverse.scores[::-1], whole.scores, rtol=1e-5)
    shared_with_an_outlier = model.predict(torch.cat([test, torch.full((1, 3, SIDE, SIDE), 255, dtype=torch.uint8)]))
    np.testing.assert_allclose(shared_with_an_outlier.scores[:5], whole.scores, rtol=1e-5)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_and_batches_change_no_score(
    num_threads: int, extractor: FeatureExtractor, train: torch.Tensor, test: torch.Tensor
) -> None:
    """Parts of a batch are computed at once: whoever computes them, the scores of an image are its own."""
    before = torch.get_num_threads()
    model = build(extractor, num_nn=1, sampler=SamplerConfig("identity", 1.0)).fit(Batches(train, 1))
    expected = np.concatenate([model.predict(image).scores for image in test.split(1)])
    torch.set_num_threads(num_threads)
    try:
        found = build(extractor, num_nn=1, sampler=SamplerConfig("identity", 1.0)).fit(Batches(train, 5)).predict(test)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_backbone_of_lower_precision_gives_nearly_the_same_scores(
    precision: str, train: torch.Tensor, test: torch.Tensor
) -> None:
    config = PatchCoreConfig(backbone=BACKBONE, num_nn=1, sampler=SamplerConfig("identity", 1.0))
    scores, types = {}, set()
    for name in ("float32", precision):
        model = PatchCore.prepare(config, PREPROCESSING, RuntimeConfig(precision=name))(TrainingSource(), CPU)
        assert isinstance(model, PatchCore)
        model.embedder.extractor.steps[0].register_forward_hook(lambda *given: types.add(given[2].dtype))
        scores[name] = model.fit(Batches(train)).predict(test).scores
        assert model.memory_bank_.dtype == torch.float32 and scores[name].dtype == np.float32
    assert types == {torch.float32, torch.bfloat16 if precision == "bf16" else torch.float16}
    assert not np.array_equal(scores["float32"], scores[precision])
    np.testing.assert_allclose(scores[precision], scores["float32"], rtol=0.03)


def test_batches_of_training_images_change_nothing(extractor: FeatureExtractor, train: torch.Tensor) -> None:
    sampler = SamplerConfig("random", 0.5)
    banks = [build(extractor, sampler=sampler).fit(Batches(train, size)).memory_bank_ for size in (1, 4, 6)]
    for bank in banks[1:]:
        torch.testing.assert_close(bank, banks[0])


def test_the_bank_follows_seed_and_category_alone(extractor: FeatureExtractor, train: torch.Tensor) -> None:
    def bank(seed: int, category: str) -> torch.Tensor:
        sampler = SamplerConfig("approx_greedy_coreset", 0.2)
        return build(extractor, seed, category, sampler=sampler).fit(Batches(train)).memory_bank_

    first = bank(0, "plate")
    torch.manual_seed(99)  # the global generator has no say
    assert torch.equal(bank(0, "plate"), first)
    assert not torch.equal(bank(1, "plate"), first)
    assert not torch.equal(bank(0, "rod"), first)


def test_the_bank_holds_patches_of_the_training_images(extractor: FeatureExtractor, train: torch.Tensor) -> None:
    model = build(extractor, sampler=SamplerConfig("approx_greedy_coreset", 0.25)).fit(Batches(train))
    everything = model.embedder(extractor(train)).flatten(0, 1)
    assert len(model.memory_bank_) == len(everything) // 4
    distances = torch.cdist(
        model.memory_bank_.double(), everything.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    assert float(distances.amin(dim=1).max()) < 1e-4
    assert len(model.memory_bank_.unique(dim=0)) == len(model.memory_bank_)


def test_fitting_again_forgets_the_first_images(
    extractor: FeatureExtractor, train: torch.Tensor, test: torch.Tensor
) -> None:
    twice = build(extractor).fit(Batches(test)).fit(Batches(train))
    once = build(extractor).fit(Batches(train))
    np.testing.assert_array_equal(twice.predict(test).scores, once.predict(test).scores)


# ---------------------------------------------------------------- options


def test_reweighting_equals_a_brute_force_of_equation_7(
    extractor: FeatureExtractor, train: torch.Tensor, test: torch.Tensor
) -> None:
    support = 4
    bank, queries = (plain_embeddings(extractor, images, concat=True).double() for images in (train, test))
    distances = torch.cdist(queries, bank).view(len(test), 64, len(bank))
    expected = []
    for of_image in distances:
        worst = int(of_image.amin(dim=1).argmax())
        nearest = int(of_image[worst].argmin())
        around = torch.cdist(bank[nearest : nearest + 1], bank)[0].argsort()[:support]
        share = torch.exp(of_image[worst, nearest]) / torch.exp(of_image[worst, around]).sum()
        expected.append(float((1 - share) * of_image[worst, nearest]))
    plain = build(extractor, embedding="concat").fit(Batches(train)).predict(test)
    weighted = build(extractor, embedding="concat", score_reweighting=support).fit(Batches(train)).predict(test)
    np.testing.assert_allclose(weighted.scores, expected, rtol=1e-4)
    assert (weighted.scores < plain.scores).all()
    np.testing.assert_array_equal(weighted.maps, plain.maps)


def test_reweighting_beyond_the_bank_names_the_option(extractor: FeatureExtractor, train: torch.Tensor) -> None:
    model = build(extractor, score_reweighting=20, sampler=SamplerConfig("random", 0.25))
    with pytest.raises(DataError, match=r"has 16 patch\(es\), --score_reweighting 20"):
        model.fit(Batches(train[:1]))


@pytest.mark.parametrize("patchscore", ["max", "mean", "topk"])
def test_patchscore_says_which_patches_make_the_image_score(
    patchscore: str, extractor: FeatureExtractor, train: torch.Tensor, test: torch.Tensor
) -> None:
    model = build(extractor, patchscore=patchscore).fit(Batches(train))
    patches = model.score_embeddings(model.embedder(extractor(test))).patches.flatten(1).numpy()
    expected = patches.mean(axis=1) if patchscore == "mean" else patches.max(axis=1)  # one percent of 64 is one patch
    np.testing.assert_allclose(model.predict(test).scores, expected, rtol=1e-6)


def test_further_patch_sizes_equal_the_concatenated_sizes(
    extractor: FeatureExtractor, train: torch.Tensor, test: torch.Tensor
) -> None:
    """Squared distances of concatenated embeddings are sums of those of their parts."""
    both = build(extractor, embedding="concat", patchsize_aggregate=(5,)).fit(Batches(train))
    parts = [build(extractor, embedding="concat", patchsize=p).fit(Batches(train)) for p in (3, 5)]
    assert both.memory_bank_.shape[1] == sum(p.memory_bank_.shape[1] for p in parts)
    squared = [
        torch.cdist(p.embedder(extractor(test)).flatten(0, 1).double(), p.memory_bank_.double()) ** 2 for p in parts
    ]
    expected = (squared[0] + squared[1]).amin(dim=1).sqrt().view(len(test), 64).amax(dim=1)
    np.testing.assert_allclose(both.predict(test).scores, expected.numpy(), rtol=1e-4)


def test_a_seed_of_its_own_stands_in_for_the_runs(extractor: FeatureExtractor, train: torch.Tensor) -> None:
    sampler = SamplerConfig("approx_greedy_coreset", 0.2)
    own = build(extractor, seed=0, sampler=sampler, config_seed=7).fit(Batches(train))
    of_run = build(extractor, seed=7, sampler=sampler).fit(Batches(train))
    assert torch.equal(own.memory_bank_, of_run.memory_bank_)


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize("count", [2, 6, 23])
def test_an_image_is_calibrated_without_its_own_patches(count: int, extractor: FeatureExtractor) -> None:
    images = random_images(count, seed=2)
    model = build(extractor).fit(Batches(images, 8))
    calibration = model.out_of_fold_calibration()
    assert calibration is not None and calibration.map_maxima is not None
    assert calibration.num_folds == (5 if count >= 20 else count)
    assert len(calibration.image_scores) == len(calibration.map_maxima) == count
    assert min(calibration.image_scores) > 0.01  # by a bank with its own patches an image would score 0
    if count < 20:  # leave-one-out: the folds are known, and so are the scores
        for i, score in enumerate(calibration.image_scores):
            rest = images[[j for j in range(count) if j != i]]
            expected = build(extractor).fit(Batches(rest)).predict(images[i : i + 1])
            assert expected.maps is not None
            assert score == pytest.approx(float(expected.scores[0]), rel=1e-4)
            assert calibration.map_maxima[i] == pytest.approx(float(expected.maps.max()), rel=1e-4)


def test_copies_of_one_image_in_two_folds_score_zero(extractor: FeatureExtractor) -> None:
    """The counter-test: where a fold's bank does hold the image, in a copy, the out-of-fold score is 0."""
    images = random_images(3, seed=3)
    model = build(extractor).fit(Batches(images[[0, 0, 1, 2]]))
    calibration = model.out_of_fold_calibration()
    assert calibration is not None
    scores = calibration.image_scores
    assert max(scores[:2]) < 1e-3 * min(scores[2:])


def test_calibration_follows_the_seed_and_leaves_the_model_alone(
    extractor: FeatureExtractor, train: torch.Tensor, test: torch.Tensor
) -> None:
    def calibrated(seed: int) -> tuple[float, ...]:
        model = build(extractor, seed, sampler=SamplerConfig("approx_greedy_coreset", 0.2)).fit(Batches(train))
        before = model.predict(test).scores
        calibration = model.out_of_fold_calibration()
        np.testing.assert_array_equal(model.predict(test).scores, before)
        assert calibration is not None
        return calibration.image_scores

    assert calibrated(0) == calibrated(0)
    assert calibrated(0) != calibrated(1)


def test_folds_are_searched_in_the_directions_of_the_model(
    extractor: FeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learning directions takes as long as searching for dozens of images; which they are changes no distance."""
    monkeypatch.setattr(torch_search, "PROJECTED_ROWS_AT_LEAST", 100)
    learned: list[int] = []

    def learn(bank: torch.Tensor, centre: torch.Tensor) -> torch.Tensor | None:
        learned.append(len(bank))
        return principal_directions(bank, centre)

    monkeypatch.setattr(torch_search, "principal_directions", learn)
    thresholds = {}
    for index in ("flat", "projected"):
        model = build(extractor, num_nn=1, index=index, sampler=SamplerConfig("random", 0.5))
        calibration = model.fit(Batches(random_images(8, 3))).out_of_fold_calibration()
        assert calibration is not None
        thresholds[index] = calibration.image.threshold
    assert learned == [8 * 64 // 2]
    assert thresholds["projected"] == pytest.approx(thresholds["flat"], rel=1e-3)


def test_one_image_gives_no_calibration(extractor: FeatureExtractor, train: torch.Tensor) -> None:
    assert build(extractor).fit(Batches(train[:1])).out_of_fold_calibration() is None


# ---------------------------------------------------------------- misuse


def test_an_unfitted_model_names_the_missing_call(
    extractor: FeatureExtractor, test: torch.Tensor, tmp_path: Path
) -> None:
    model = build(extractor)
    for call in (lambda: model.predict(test), lambda: model.save(tmp_path / "m"), model.out_of_fold_calibration):
        with pytest.raises(NotFittedError, match=r"fit\(\)"):
            call()
    assert not list(tmp_path.iterdir())


def test_calibration_after_the_training_data_are_released(extractor: FeatureExtractor, train: torch.Tensor) -> None:
    model = build(extractor).fit(Batches(train))
    model.release_training_data()
    with pytest.raises(NotFittedError, match=r"right after fit\(\)"):
        model.out_of_fold_calibration()


def test_no_images(extractor: FeatureExtractor, train: torch.Tensor) -> None:
    with pytest.raises(DataError, match="no training images"):
        build(extractor).fit(Batches(train[:0]))


def test_more_neighbours_than_patches(extractor: FeatureExtractor, train: torch.Tensor) -> None:
    model = build(extractor, num_nn=20, sampler=SamplerConfig("random", 0.25))
    with pytest.raises(DataError, match=r"the memory bank has 16 patch\(es\).* 20 needs"):
        model.fit(Batches(train[:1]))


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, SIDE, SIDE), (1, 1, SIDE, SIDE), (1, 3, SIDE, 48)])
def test_images_of_another_shape(shape: tuple[int, ...], extractor: FeatureExtractor, train: torch.Tensor) -> None:
    model = build(extractor).fit(Batches(train))
    with pytest.raises(ValueError, match=r"expected \[B, 3, 64, 64\]"):
        model.predict(torch.zeros(shape, dtype=torch.uint8))


def test_preparing_refuses_what_is_unknown() -> None:
    def prepare(backbone: BackboneConfig = BACKBONE, sampler: str = "identity") -> None:
        PatchCore.prepare(PatchCoreConfig(backbone, SamplerConfig(sampler)), PREPROCESSING, RuntimeConfig())

    with pytest.raises(ConfigurationError, match="random"):
        prepare(sampler="randum")
    with pytest.raises(ConfigurationError, match="resnet18"):
        prepare(BackboneConfig("resnet-18", ("layer2",), weights="random"))
    with pytest.raises(ConfigurationError, match="layer3"):
        prepare(BackboneConfig("resnet18", ("layers3",), weights="random"))
    with pytest.raises(ConfigurationError, match="expected a feature map"):
        prepare(BackboneConfig("resnet18", ("layer2", "fc"), weights="random"))


def test_classes_share_the_backbone() -> None:
    builder = PatchCore.prepare(PatchCoreConfig(BACKBONE), PREPROCESSING, RuntimeConfig())
    first, second = (builder(TrainingSource("mpdd", category, 0), CPU) for category in ("a", "b"))
    assert first.embedder is second.embedder
    assert first.device == CPU

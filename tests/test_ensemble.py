"""Ensembles: fusion on the scale of normal images, min-max as in the original, one forward pass per backbone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from signed_model import sign

from patchcore.configs import (
    BackboneConfig,
    EnsembleConfig,
    PatchCoreConfig,
    PreprocessingConfig,
    RuntimeConfig,
    SamplerConfig,
    TrainingSource,
)
from patchcore.detector import NotFittedError
from patchcore.errors import ConfigurationError, DataError
from patchcore.methods.ensemble import Ensemble, MemberScale
from patchcore.methods.patchcore import PatchCore, PatchScores
from patchcore.prediction import open_detector

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 64
CPU = torch.device("cpu")
PREPROCESSING = PreprocessingConfig(SIDE, SIDE)
SOURCE = TrainingSource("mpdd", "plate", 4)
RESNET = PatchCoreConfig(
    BackboneConfig("resnet18", ("layer2", "layer3"), weights="random"),
    SamplerConfig("approx_greedy_coreset", 0.3),
    num_nn=1,
)
LITE = replace(RESNET, backbone=BackboneConfig("efficientnet_lite0", ("blocks.2",), weights="random"))


class Batches:
    """Images in memory as a loader gives them; counts its passes."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images, self.num_images, self.passes = images, len(images), 0

    def __len__(self) -> int:
        return -(-len(self.images) // 2)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.passes += 1
        return iter([{"image": part} for part in self.images.split(2)])


def random_images(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (count, 3, 8, 8), generator=generator)
    return F.interpolate(noise.float(), size=SIDE, mode="bilinear").round().to(torch.uint8)


TRAIN, TEST = random_images(7, 0), random_images(5, 1)


def build(*members: PatchCoreConfig, normalization: str = "calibrated") -> Ensemble:
    config = EnsembleConfig(members, normalization)
    detector = Ensemble.prepare(config, PREPROCESSING, RuntimeConfig())(SOURCE, CPU)
    assert isinstance(detector, Ensemble)
    return detector


def single(member: PatchCoreConfig, source: TrainingSource = SOURCE) -> PatchCore:
    detector = PatchCore.prepare(member, PREPROCESSING, RuntimeConfig())(source, CPU)
    assert isinstance(detector, PatchCore)
    return detector


def test_fusion_by_hand_from_single_models() -> None:
    """Members with seeds of their own equal single models; their standardised scores and maps are averaged."""
    members = [replace(RESNET, seed=1), replace(LITE, seed=2)]
    fused = build(*members).fit(Batches(TRAIN)).predict(TEST)
    scores, maps = [], []
    for member in members:
        model = single(member).fit(Batches(TRAIN))
        normal = model.out_of_fold_scores("")
        assert normal is not None
        patches = normal.patches.double()
        prediction = model.predict(TEST)
        assert prediction.maps is not None
        scores.append((prediction.scores - float(patches.mean())) / float(patches.std()))
        maps.append((prediction.maps - float(patches.mean())) / float(patches.std()))
    np.testing.assert_allclose(fused.scores, np.mean(scores, axis=0), rtol=1e-4, atol=1e-4)
    assert fused.maps is not None
    np.testing.assert_allclose(fused.maps, np.mean(maps, axis=0), rtol=1e-4, atol=1e-4)
    assert fused.scores.dtype == fused.maps.dtype == np.float32


def test_the_calibration_is_that_of_the_fused_out_of_fold_scores() -> None:
    members = [replace(RESNET, seed=1), replace(LITE, seed=2)]
    model = build(*members).fit(Batches(TRAIN))
    calibration = model.out_of_fold_calibration()
    assert calibration is not None and calibration.map_maxima is not None
    assert calibration.num_folds == len(TRAIN) == len(calibration.map_maxima)
    standardised = []
    for member in members:
        normal = single(member).fit(Batches(TRAIN)).out_of_fold_scores("")
        assert normal is not None
        patches = normal.patches.double()
        standardised.append(((normal.images - patches.mean()) / patches.std()).numpy())
    expected = np.mean(standardised, axis=0)
    np.testing.assert_allclose(calibration.image_scores, expected, rtol=1e-4)
    assert calibration.image.threshold == pytest.approx(expected.mean() + 3 * expected.std(ddof=1), rel=1e-4)
    assert calibration.pixel_floor == pytest.approx(0, abs=0.2), "an ordinary normal pixel lies at the mean"


def test_the_unit_of_a_members_distances_has_no_say() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = PatchScores(torch.rand(9, generator=generator), torch.rand(9, 4, 4, generator=generator))
    larger = PatchScores(30 * scores.images + 5, 30 * scores.patches + 5)
    expected, standardised = (MemberScale.of(s.patches).standardised(s) for s in (scores, larger))
    torch.testing.assert_close(standardised.images, expected.images)
    torch.testing.assert_close(standardised.patches, expected.patches)
    assert float(expected.patches.mean()) == pytest.approx(0, abs=1e-6)
    assert float(expected.patches.std()) == pytest.approx(1)


@pytest.mark.parametrize("normalization", ["calibrated", "minmax"])
def test_a_stored_ensemble_gives_the_same_scores(normalization: str, tmp_path: Path) -> None:
    model = build(RESNET, LITE, RESNET, normalization=normalization).fit(Batches(TRAIN))
    model.calibration_ = model.out_of_fold_calibration()
    model.save(tmp_path / "m")
    names = {p.name for p in (tmp_path / "m").iterdir()}
    banks = {f"Ensemble-{i}-3_search_index.safetensors" for i in (1, 2, 3)}
    assert names - {"search_index.safetensors"} == {"model.json", *banks}
    loaded = open_detector(tmp_path / "m", CPU)
    np.testing.assert_allclose(loaded.predict(TEST).scores, model.predict(TEST).scores, rtol=1e-5, atol=1e-6)
    assert loaded.calibration_ == model.calibration_
    assert (loaded.calibration_ is None) == (normalization == "minmax")


def test_swapped_renamed_and_foreign_files_are_refused(tmp_path: Path) -> None:
    build(RESNET, replace(RESNET, patchsize=5)).fit(Batches(TRAIN)).save(tmp_path / "m")
    first, second = (tmp_path / "m" / f"Ensemble-{i}-2_search_index.safetensors" for i in (1, 2))
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    with pytest.raises(
        ConfigurationError, match=r"Ensemble-1-2_search_index.safetensors is not the file that was written"
    ):
        open_detector(tmp_path / "m", CPU)
    first.write_bytes(contents[0])
    second.write_bytes(contents[0])
    with pytest.raises(
        ConfigurationError, match=r"Ensemble-2-2_search_index.safetensors is not the file that was written"
    ):
        open_detector(tmp_path / "m", CPU)


def test_tensors_that_no_member_has_are_refused() -> None:
    tensors = build(RESNET, LITE).fit(Batches(TRAIN)).tensors()
    with pytest.raises(ConfigurationError, match=r"Ensemble-3-2/memory_bank.* no member"):
        build(RESNET, LITE).restore({**tensors, "Ensemble-3-2/memory_bank": torch.zeros(3, 4)})
    with pytest.raises(ConfigurationError, match=r"member_scales.* no member"):
        build(RESNET, LITE, normalization="minmax").restore(tensors)


def test_thresholds_beside_minmax_are_refused(tmp_path: Path) -> None:
    model = build(RESNET, LITE, normalization="minmax").fit(Batches(TRAIN))
    model.calibration_ = single(RESNET).fit(Batches(TRAIN)).out_of_fold_calibration()
    model.save(tmp_path / "m")
    with pytest.raises(ConfigurationError, match="has thresholds, but its scores are scaled over the test"):
        open_detector(tmp_path / "m", CPU)


def test_a_missing_member_is_named(tmp_path: Path) -> None:
    build(RESNET, LITE).fit(Batches(TRAIN)).save(tmp_path / "m")
    (tmp_path / "m" / "Ensemble-2-2_search_index.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"Ensemble-2-2_search_index.safetensors is missing"):
        open_detector(tmp_path / "m", CPU)


@pytest.mark.parametrize(
    "change",
    [{"config": "members"}, {"scales": [[1.0, 0.0]] * 2}, {"scales": [[1.0, 1.0, 1.0]] * 2}, {"scales": None}],
)
def test_stored_parts_that_do_not_fit_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    model = build(RESNET, LITE).fit(Batches(TRAIN))
    tensors = model.tensors()
    if "config" in change:
        model.save(tmp_path / "m")
        header = json.loads((tmp_path / "m" / "model.json").read_text())
        header["config"]["members"].pop()
        (tmp_path / "m" / "model.json").write_text(json.dumps(header))
        sign(tmp_path / "m")
        with pytest.raises(ConfigurationError, match="two or more"):
            open_detector(tmp_path / "m", CPU)
        return
    del tensors["member_scales"]
    if change["scales"] is not None:
        tensors["member_scales"] = torch.tensor(change["scales"], dtype=torch.float64)
    with pytest.raises(ConfigurationError, match="member_scales"):
        build(RESNET, LITE).restore(tensors)


def test_minmax_is_that_of_the_original() -> None:
    members = [replace(RESNET, seed=1), replace(LITE, seed=2)]
    model = build(*members, normalization="minmax").fit(Batches(TRAIN))
    joined = model.join([model.predict(part) for part in TEST.split(2)])
    scores, maps = [], []
    for member in members:
        prediction = single(member).fit(Batches(TRAIN)).predict(TEST)
        assert prediction.maps is not None
        low, high = prediction.scores.min(), prediction.scores.max()
        scores.append((prediction.scores - low) / (high - low))
        low, high = prediction.maps.min(), prediction.maps.max()
        maps.append((prediction.maps - low) / (high - low))
    np.testing.assert_allclose(joined.scores, np.mean(scores, axis=0), rtol=1e-4, atol=1e-5)
    assert joined.maps is not None
    np.testing.assert_allclose(joined.maps, np.mean(maps, axis=0), rtol=1e-4, atol=1e-5)
    assert not model.can_calibrate
    assert model.out_of_fold_calibration() is None
    assert model.predict(TEST[:1]).scores.tolist() == [0.0], "one image spans no range"


def test_calibrated_scores_depend_on_no_other_image() -> None:
    model = build(RESNET, LITE).fit(Batches(TRAIN))
    together = model.predict(TEST).scores
    alone = np.concatenate([model.predict(image).scores for image in TEST.split(1)])
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-4)


def test_members_of_one_backbone_share_its_forward_pass() -> None:
    other_layer = replace(RESNET, backbone=replace(RESNET.backbone, layers=("layer1",)))
    model = build(RESNET, other_layer, LITE, RESNET)
    extractors = [member.embedder.extractor for member in model.members]
    assert extractors[0] is extractors[1] is extractors[3]
    assert extractors[2] is not extractors[0]
    seen: dict[str, list[int]] = {"resnet18": [], "efficientnet_lite0": []}  # images of each call, from any thread
    for name, extractor in (("resnet18", extractors[0]), ("efficientnet_lite0", extractors[2])):
        extractor.steps[0].register_forward_hook(lambda _, given, __, name=name: seen[name].append(len(given[0])))
    loader = Batches(TRAIN)
    model.fit(loader)
    assert {name: sum(images) for name, images in seen.items()} == dict.fromkeys(seen, len(TRAIN))
    assert loader.passes == 2
    model.predict(TEST)
    assert {name: sum(images) for name, images in seen.items()} == dict.fromkeys(seen, len(TRAIN) + len(TEST))
    assert [m.embedder.grid for m in model.members] == [(8, 8), (16, 16), (8, 8), (8, 8)]


def test_backbones_of_other_weights_or_normalization_are_not_shared() -> None:
    other_seed = replace(RESNET, backbone=replace(RESNET.backbone, seed=1))
    other_mean = replace(RESNET, backbone=replace(RESNET.backbone, normalization="backbone"))
    model = build(RESNET, other_seed, other_mean)
    assert len({id(member.embedder.extractor) for member in model.members}) == 3


def test_equal_members_differ_in_their_coresets_and_follow_the_run() -> None:
    first, second = (m.memory_bank_ for m in build(RESNET, RESNET).fit(Batches(TRAIN)).members)
    assert not torch.equal(first, second)
    again = build(RESNET, RESNET).fit(Batches(TRAIN))
    assert torch.equal(again.members[1].memory_bank_, second)
    other_run = Ensemble.prepare(EnsembleConfig((RESNET, RESNET)), PREPROCESSING, RuntimeConfig())(
        replace(SOURCE, seed=5), CPU
    )
    assert isinstance(other_run, Ensemble)
    assert not torch.equal(other_run.fit(Batches(TRAIN)).members[0].memory_bank_, first)


def test_members_that_would_be_the_same_model_are_refused() -> None:
    identity = replace(RESNET, sampler=SamplerConfig("identity", 1.0))
    for members in [
        (replace(RESNET, seed=9), replace(RESNET, seed=9)),
        (identity, identity),
        (LITE, replace(identity, seed=1), replace(identity, seed=2)),
    ]:
        with pytest.raises(ConfigurationError, match="would be the same model"):
            EnsembleConfig(members)
    for members in [
        (RESNET, RESNET),
        (RESNET, replace(RESNET, seed=9)),
        (replace(RESNET, seed=9), replace(RESNET, seed=8)),
        (identity, replace(identity, patchsize=5)),
    ]:
        EnsembleConfig(members)


def test_members_that_embed_alike_share_their_embeddings() -> None:
    model = build(RESNET, replace(RESNET, seed=3, num_nn=2, patchscore="mean"), replace(RESNET, patchsize=5))
    first, second, third = (member.embedder for member in model.members)
    assert first is second and third is not first and third.extractor is first.extractor


def test_a_fold_too_small_for_the_neighbours_names_the_way_out() -> None:
    small = replace(RESNET, sampler=SamplerConfig("random", 0.02), num_nn=2)  # 3 of 128 patches; 1 of a fold's 64
    with pytest.raises(DataError, match=r"calibration fold has 1 patch.* --score_normalization minmax"):
        build(small, replace(LITE, sampler=small.sampler)).fit(Batches(TRAIN[:2]))


def test_normal_images_that_all_score_alike_give_a_finite_scale() -> None:
    """Copies of one image score 0 out of fold: there is no spread to divide by."""
    model = build(RESNET, LITE).fit(Batches(TRAIN[:1].expand(4, -1, -1, -1)))
    prediction = model.predict(TEST)
    assert np.isfinite(prediction.scores).all()
    assert (prediction.scores > 0).all()


def test_one_training_image_is_refused_unless_minmax() -> None:
    with pytest.raises(DataError, match=r"one training image.* --score_normalization minmax"):
        build(RESNET, LITE).fit(Batches(TRAIN[:1]))
    build(RESNET, LITE, normalization="minmax").fit(Batches(TRAIN[:1])).predict(TEST)


def test_misuse() -> None:
    model = build(RESNET, LITE)
    for call in (lambda: model.predict(TEST), model.tensors, model.out_of_fold_calibration):
        with pytest.raises(NotFittedError, match=r"fit\(\)"):
            call()
    model.fit(Batches(TRAIN)).release_training_data()
    with pytest.raises(NotFittedError, match=r"right after fit\(\)"):
        model.out_of_fold_calibration()
    with pytest.raises(ValueError, match=r"expected \[B, 3, 64, 64\]"):
        model.predict(TEST[..., :32])
    with pytest.raises(ConfigurationError, match="two or more"):
        EnsembleConfig((RESNET,))
    with pytest.raises(ConfigurationError, match="minmax"):
        EnsembleConfig((RESNET, LITE), "min-max")

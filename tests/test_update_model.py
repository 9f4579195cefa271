"""More normal images for a stored model: what enters the bank, which thresholds follow, what happens to the old one."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from in_process import Finished, invoke
from PIL import Image
from test_detectors import CPU, EXAMPLES, PREPROCESSING, Batches, random_images
from test_predict import example

from patchcore import load_detector
from patchcore.cli import update_model
from patchcore.configs import RuntimeConfig, TrainingSource
from patchcore.configs.thresholds import ThresholdRule
from patchcore.detector import DETECTORS, AnomalyDetector
from patchcore.errors import DataError
from patchcore.memory.continued_coreset import continued_selection
from patchcore.memory.sampler import build_sampler, num_selected
from patchcore.prediction import open_detector
from patchcore.scoring.thresholds import with_rule
from patchcore.storage.files import write_new_folder

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = ("patchcore", "ensemble")


def run(*args: object) -> Finished:
    return invoke(update_model, *args, "--device", "cpu", "--threads", 1)


def calibrated(method: str, config: object = None, num_images: int = 6) -> AnomalyDetector:
    build = DETECTORS[method].prepare(config or EXAMPLES[method], PREPROCESSING, RuntimeConfig())
    detector = build(TrainingSource("folder", "part", seed=3), CPU)
    detector.fit(Batches(random_images(num_images, 1)))
    detector.calibration_ = detector.out_of_fold_calibration()
    return detector


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for method in METHODS:
        calibrated(method).save(folder / method)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four normal images of another kind: brighter than those of the training."""
    folder = tmp_path / "new images"
    folder.mkdir()
    for number, image in enumerate(random_images(4, 11)):
        pixels = image.permute(1, 2, 0).numpy() // 2 + 120
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def oracle(bank: np.ndarray, features: np.ndarray, count: int) -> list[int]:
    """Pick the farthest point again and again, all distances anew each time, in float64."""
    picked: list[int] = []
    while len(picked) < count:
        centres = np.concatenate([bank, features[picked]])
        distances = np.linalg.norm(features[:, None] - centres[None], axis=2).min(axis=1)
        picked.append(int(distances.argmax()))
    return picked


@pytest.mark.parametrize("sampler", ["approx_greedy_coreset", "greedy_coreset"])
def test_greedy_selection_goes_on_from_the_bank(sampler: str) -> None:
    generator = torch.Generator().manual_seed(0)
    bank, features = torch.randn(30, 16, generator=generator), torch.randn(90, 16, generator=generator)
    features[7] = bank[3]  # known already
    rows = continued_selection(build_sampler(sampler, 0.3), bank, features, torch.Generator().manual_seed(1))
    assert rows.tolist() == oracle(bank.double().numpy(), features.double().numpy(), 27)
    assert 7 not in rows.tolist()


@pytest.mark.parametrize(("sampler", "count"), [("random", 27), ("identity", 90)])
def test_other_samplers_keep_their_share_of_the_new(sampler: str, count: int) -> None:
    features = torch.randn(90, 16)
    share = 0.3 if sampler == "random" else 1.0
    rows = continued_selection(build_sampler(sampler, share), torch.randn(5, 16), features, torch.Generator())
    assert len(set(rows.tolist())) == len(rows) == count
    with pytest.raises(DataError, match="NaN"):
        nothing = torch.full((20, 16), torch.nan)
        continued_selection(build_sampler("approx_greedy_coreset", 0.5), features, nothing, torch.Generator())


@pytest.mark.parametrize("method", ["patchcore", pytest.param("ensemble", marks=pytest.mark.slow)])
def test_bank_grows_and_new_images_become_normal(method: str, models: Path, images: Path, tmp_path: Path) -> None:
    finished = run(models / method, images, "--out", tmp_path / "new")
    assert finished.code == 0, finished.err
    assert "4 images learned" in finished.out
    before, after = open_detector(models / method, CPU), open_detector(tmp_path / "new", CPU)
    old, new = before.tensors(), after.tensors()
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert torch.equal(new[name][: len(tensor)], tensor)
        if name.endswith("memory_bank"):
            patches_per_image = after.members[0].embedder.grid if method == "ensemble" else after.embedder.grid  # type: ignore[attr-defined]
            expected = num_selected(4 * patches_per_image[0] * patches_per_image[1], 0.2)
            assert len(new[name]) == len(tensor) + expected
    paths = sorted(images.iterdir())
    was, now = (load_detector(folder, "cpu").predict(paths) for folder in (models / method, tmp_path / "new"))
    assert all(result.is_anomalous for result in was) and not any(result.is_anomalous for result in now)


def test_thresholds_join_old_scores_and_those_of_banks_without_the_image(
    models: Path, images: Path, tmp_path: Path
) -> None:
    assert run(models / "patchcore", images, "--out", tmp_path / "new").code == 0
    old = open_detector(models / "patchcore", CPU).calibration_
    new = open_detector(tmp_path / "new", CPU)
    assert old is not None and new.calibration_ is not None
    assert new.calibration_.image_scores[: len(old.image_scores)] == old.image_scores
    assert len(new.calibration_.image_scores) == len(new.calibration_.map_maxima or ()) == 6 + 4
    joined = np.array(new.calibration_.image_scores)
    assert new.calibration_.image.threshold == pytest.approx(joined.mean() + 3 * joined.std(ddof=1))
    assert new.calibration_.image.threshold > old.image.threshold
    assert new.calibration_.num_folds == old.num_folds + 4
    # Leave-one-out scores of the new images: above those of the bank that has them, below those of the old one.
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) for p in sorted(images.iterdir())])
    by_old = open_detector(models / "patchcore", CPU).predict(pixels).scores
    by_new = new.predict(pixels).scores
    assert (by_new < joined[6:]).all() and (joined[6:] < by_old).all()


def test_the_rule_of_the_model_is_kept_or_replaced(models: Path, images: Path, tmp_path: Path) -> None:
    detector = open_detector(models / "patchcore", CPU)
    assert detector.calibration_ is not None
    detector.calibration_ = with_rule(detector.calibration_, ThresholdRule("quantile", 0.8))
    detector.save(tmp_path / "quantile")
    detector.calibration_ = replace(detector.calibration_, rule=ThresholdRule("f1"))
    detector.save(tmp_path / "f1")
    refused = run(tmp_path / "f1", images, "--out", tmp_path / "new")
    assert refused.code == 2 and "labelled validation images" in refused.err
    assert run(tmp_path / "quantile", images, "--out", tmp_path / "kept").code == 0
    kept = open_detector(tmp_path / "kept", CPU).calibration_
    assert kept is not None and kept.rule == ThresholdRule("quantile", 0.8)
    assert kept.image.threshold == sorted(kept.image_scores)[8]  # rank 9 of 10: the 0.8 of 11 rounded up
    assert run(tmp_path / "f1", images, "--out", tmp_path / "plain", "--threshold_rule", "mean3std").code == 0
    plain = open_detector(tmp_path / "plain", CPU).calibration_
    assert plain is not None and plain.rule == ThresholdRule()
    too_much = run(models / "patchcore", images, "--out", tmp_path / "x", "--threshold_rule", "quantile:0.99")
    assert too_much.code == 2 and not (tmp_path / "x").exists()
    assert "needs 99 normal images, there are 10 with the 4 new ones: type at most quantile:0.909" in too_much.err


def test_one_image_is_scored_by_the_bank_before(models: Path, images: Path, tmp_path: Path) -> None:
    assert run(models / "patchcore", images / "0.png", "--out", tmp_path / "new").code == 0
    calibration = open_detector(tmp_path / "new", CPU).calibration_
    (by_old,) = load_detector(models / "patchcore", "cpu").predict(images / "0.png")
    assert calibration is not None
    assert calibration.image_scores[-1] == pytest.approx(by_old.score, rel=1e-5)


def test_old_model_is_kept(models: Path, images: Path, tmp_path: Path) -> None:
    model = tmp_path / "models" / "mpdd_part"
    calibrated("patchcore").save(model)
    first = {path.name: path.read_bytes() for path in model.iterdir()}
    for chosen in ("[01]", "[23]"):
        finished = run(model, f"{images}/{chosen}.png")
        assert finished.code == 0, finished.err
    kept = tmp_path / "models" / "before_update"
    assert sorted(path.name for path in kept.iterdir()) == ["mpdd_part-1", "mpdd_part-2"]
    assert {path.name: path.read_bytes() for path in (kept / "mpdd_part-1").iterdir()} == first
    sizes = [
        len(open_detector(f, CPU).tensors()["memory_bank"]) for f in (kept / "mpdd_part-1", kept / "mpdd_part-2", model)
    ]
    assert sizes[0] < sizes[1] < sizes[2]
    assert "before_update" in finished.out and sorted(p.name for p in (tmp_path / "models").iterdir()) == [
        "before_update", "mpdd_part"]  # fmt: skip


def test_an_image_is_learned_once(models: Path, images: Path, tmp_path: Path) -> None:
    """Under another name and in another file format it is the same; older models know of none."""
    model = Path(shutil.copytree(models / "patchcore", tmp_path / "models" / "part"))
    assert run(model, images / "0.png").code == 0
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with Image.open(images / "0.png") as image:
        image.save(images / "copy.bmp")
    finished = run(model, images / "0.png", images / "copy.bmp")
    assert finished.code == 0, finished.err
    assert finished.out.splitlines() == [
        "2 images were learned before: left out", "nothing to do: the model is as it was"]  # fmt: skip
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert [path.name for path in (tmp_path / "models" / "before_update").iterdir()] == ["part-1"]
    shutil.copy(images / "1.png", images / "1 again.png")
    finished = run(model, f"{images}/[01]*.png", images / "copy.bmp")
    assert "2 images were learned before" in finished.out and "1 images repeat others of this call" in finished.out
    assert "1 images learned" in finished.out
    updated = open_detector(model, CPU)
    assert len(updated.learned_images_) == 2
    assert updated.calibration_ is not None and len(updated.calibration_.image_scores) == 6 + 2


def test_one_update_of_a_model_at_a_time(models: Path, images: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(models / "patchcore", tmp_path / "models" / "part"))
    holder = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, 2); print(1, flush=True); input()"  # LOCK_EX
    )
    lock = model.parent / ".part.lock"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", holder, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline()
        refused = run(model, images)
        other.communicate(b"\n")
    assert refused.code == 2 and "is being updated by another process" in refused.err, refused.err
    assert not (model.parent / "before_update").exists()
    assert run(model, images / "0.png").code == 0
    assert sorted(path.name for path in model.parent.iterdir()) == ["before_update", "part"]


def test_a_failed_save_leaves_no_copy(
    models: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(models / "patchcore", tmp_path / "models" / "part"))
    before = {path.name: path.read_bytes() for path in model.iterdir()}

    def full(self: AnomalyDetector, folder: Path) -> None:
        assert (folder.parent / "before_update" / "part-1" / "model.json").exists()
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(AnomalyDetector, "save", full)
    assert run(model, images / "0.png").code != 0
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert [path.name for path in model.parent.iterdir()] == ["part"]


def test_a_kept_model_takes_a_name_that_nobody_else_has(tmp_path: Path) -> None:
    (tmp_path / "a-1").mkdir()
    (tmp_path / "a-1" / "of another").touch()
    (tmp_path / "a-2").touch()
    names = [tmp_path / f"a-{number}" for number in (1, 2, 3)]
    assert write_new_folder(names, lambda folder: (folder / "x").touch()) == names[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-1", "a-2", "a-3"]
    assert [path.name for path in names[0].iterdir()] == ["of another"]


def test_what_cannot_be_updated(models: Path, images: Path, tmp_path: Path) -> None:
    example("resnet_knn").save(tmp_path / "knn")
    (tmp_path / "knn.pth").write_bytes(example("resnet_knn").torch_export())
    model = models / "patchcore"
    wrong: list[tuple[tuple[object, ...], str]] = [
        ((tmp_path / "knn", images), "keeps no memory bank"),
        ((tmp_path / "knn.pth", images), "expected a model folder"),
        ((tmp_path / "none", images), "not found"),
        ((model, images / "none.png"), "not found"),
        ((model, images, "--out", images), "exists"),
    ]
    for args, message in wrong:
        finished = run(*args)
        assert finished.code == 2 and message in finished.err and len(finished.error_lines) == 1, (args, finished.err)

    before = {path.name: path.read_bytes() for path in model.iterdir()}
    (images / "broken.png").write_bytes(b"no image")
    finished = run(model, images)
    assert finished.code == 1 and "broken.png" in finished.err and "as it was" in finished.err
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert not (models / "before_update").exists()


def test_compressed_banks_are_refused(images: Path, tmp_path: Path) -> None:
    calibrated("patchcore", replace(EXAMPLES["patchcore"], index="fp16")).save(tmp_path / "fp16")
    finished = run(tmp_path / "fp16", images, "--out", tmp_path / "new")
    assert finished.code == 2 and "compressed index" in finished.err and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_models_without_thresholds(images: Path, tmp_path: Path) -> None:
    minmax = calibrated("ensemble", replace(EXAMPLES["ensemble"], score_normalization="minmax"))
    minmax.save(tmp_path / "m")
    finished = run(tmp_path / "m", images, "--out", tmp_path / "new")
    assert finished.code == 0 and "stored without calibration" in finished.out
    updated = open_detector(tmp_path / "new", CPU)
    assert updated.calibration_ is None
    refused = run(tmp_path / "m", images, "--out", tmp_path / "x", "--threshold_rule", "mean3std")
    assert refused.code == 2 and "stored without calibration: leave --threshold_rule out" in refused.err
    assert len(updated.tensors()["Ensemble-1-2/memory_bank"]) > len(minmax.tensors()["Ensemble-1-2/memory_bank"])

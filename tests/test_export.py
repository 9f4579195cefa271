"""Detectors as graphs, and graphs as ONNX files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from in_process import invoke
from onnx_files import readme_script, run_onnx
from PIL import Image
from test_detectors import CPU, EXAMPLES, PATCHCORE, PREPROCESSING, Batches, anomalous_images, random_images

from patchcore import __version__
from patchcore.cli import export_model
from patchcore.config_json import config_to_dict
from patchcore.configs import (
    EnsembleConfig,
    PostProcessingConfig,
    PreprocessingConfig,
    RuntimeConfig,
    TileConfig,
    TrainingSource,
)
from patchcore.datasets.images import crop_image, place
from patchcore.detector import DETECTORS, AnomalyDetector
from patchcore.errors import ConfigurationError
from patchcore.model_export import exported_model
from patchcore.scoring.anomaly_map import axis_matrix
from patchcore.storage import export
from patchcore.storage.export import onnx_model, read_metadata, write_onnx
from patchcore.storage.export_resize import resizing_model, with_resize

pytestmark = pytest.mark.usefixtures("one_thread")

FASTFLOW = EXAMPLES["fastflow"]
MIXED = torch.cat([random_images(3, 5), anomalous_images(5, 2)])


def fitted(method: str, config: Any) -> AnomalyDetector:
    detector = DETECTORS[method].prepare(config, PREPROCESSING, RuntimeConfig())(
        TrainingSource("folder", "part", seed=3), CPU
    )
    return detector.fit(Batches(random_images(6, 1)))


def post(*settings: Any) -> Any:
    return replace(FASTFLOW, post_processing=PostProcessingConfig(*settings))


COMBINATIONS = {
    "pooled, k = 2": ("patchcore", PATCHCORE),
    "k = 1, top patches, fp16": ("patchcore", replace(PATCHCORE, num_nn=1, patchscore="topk", index="fp16")),
    "several patch sizes, mean": ("patchcore", replace(PATCHCORE, patchsize_aggregate=(5,), patchscore="mean")),
    "concat, projected": (
        "patchcore",
        replace(PATCHCORE, embedding="concat", target_embed_dimension=1024, index="projected"),
    ),
    "reweighting, sq8": ("patchcore", replace(PATCHCORE, score_reweighting=3, index="sq8")),
    "ensemble": ("ensemble", EXAMPLES["ensemble"]),
    "ensemble of two backbones": (
        "ensemble",
        EnsembleConfig((PATCHCORE, replace(PATCHCORE, backbone=replace(PATCHCORE.backbone, seed=7)))),
    ),
    "prob": ("fastflow", FASTFLOW),
    "nll": ("fastflow", replace(FASTFLOW, map_mode="nll", flow_steps=3, conv3x3_only=True)),
    "weighted, mean": ("fastflow", replace(FASTFLOW, map_mode="weighted", image_score="mean")),
    "two scales": ("fastflow", post("none", 4.0, False, (1.0, 0.5))),
    "one smaller scale, gaussian": ("fastflow", post("gaussian", 2.5, False, (0.5,))),
    "guided, robust": ("fastflow", post("guided", 2.5, True)),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_graph_gives_what_predict_gives(name: str) -> None:
    detector = fitted(*COMBINATIONS[name])
    predicted = detector.predict(MIXED)
    with torch.no_grad():
        scores, maps = detector.graph()(MIXED)
    np.testing.assert_allclose(scores.numpy(), predicted.scores, rtol=5e-6)
    assert predicted.maps is not None
    np.testing.assert_allclose(maps.numpy(), predicted.maps, atol=5e-6 * np.abs(predicted.maps).max())


@pytest.fixture(scope="module")
def calibrated() -> AnomalyDetector:
    detector = fitted("patchcore", replace(PATCHCORE, score_reweighting=3))
    detector.calibration_ = detector.out_of_fold_calibration()
    detector.release_training_data()
    return detector


@pytest.fixture(scope="module")
def exported(calibrated: AnomalyDetector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, and `model.onnx` beside it."""
    root = tmp_path_factory.mktemp("a folder")
    calibrated.save(root / "model")
    finished = invoke(export_model, root / "model", "--out", root / "model.onnx")
    assert finished.code == 0, finished.err
    assert finished.out.splitlines()[-1].startswith(f"wrote {root / 'model.onnx'} (")
    return root / "model.onnx"


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_file_gives_what_the_model_predicts(calibrated: AnomalyDetector, exported: Path, batch_size: int) -> None:
    predicted, found = calibrated.predict(MIXED), run_onnx(exported, MIXED.numpy(), batch_size)
    assert list(found) == ["score", "normalized_score", "map"]
    assert {values.dtype for values in found.values()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(found["score"], predicted.scores, rtol=1e-5)
    np.testing.assert_allclose(found["map"], predicted.maps, rtol=1e-5)
    assert calibrated.calibration_ is not None
    normalized = calibrated.calibration_.image.normalized(predicted.scores)
    np.testing.assert_allclose(found["normalized_score"], normalized, rtol=1e-5)
    assert normalized.min() < 0.5 < normalized.max(), "both branches of the normalisation are compared"


def test_the_file_says_what_it_is(calibrated: AnomalyDetector, exported: Path) -> None:
    onnx.checker.check_model(exported, full_check=True)
    calibration = calibrated.calibration_
    assert calibration is not None and calibration.pixel is not None
    assert read_metadata(onnx.load(exported)) == {
        "format_version": 1,
        "toolkit_version": __version__,
        "method": "patchcore",
        "dataset": "folder",
        "class": "part",
        "resize_in_graph": False,
        "resize_px": 64,
        "resize_mode": "shorter",
        "crop_px": 64,
        "interpolation": "bilinear",
        "padding_rgb": [124, 116, 104],
        "precision": "float32",
        "image_threshold": calibration.image.threshold,
        "image_scale": calibration.image.width,
        "pixel_threshold": calibration.pixel.threshold,
        "pixel_scale": calibration.pixel.width,
    }


def test_an_export_leaves_the_process_as_it_was(calibrated: AnomalyDetector, exported: Path) -> None:
    """Tracing knows no values: none of its tensors may stay in a cache, no activation may stay changed."""
    fresh = fitted("patchcore", replace(PATCHCORE, score_reweighting=3))
    np.testing.assert_array_equal(fresh.predict(MIXED).scores, calibrated.predict(MIXED).scores)
    np.testing.assert_array_equal(fresh.predict(MIXED).maps, calibrated.predict(MIXED).maps)
    assert type(axis_matrix(8, 64, 4.0)) is torch.Tensor


def test_large_weights_lie_beside_the_file(
    calibrated: AnomalyDetector, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "LARGEST_FILE_BYTES", 10_000)
    files = write_onnx(onnx.load(exported), tmp_path / "large.onnx")
    assert sorted(tmp_path.iterdir()) == sorted(files) == [tmp_path / "large.onnx", tmp_path / "large.onnx.data"]
    assert files[0].stat().st_size + files[1].stat().st_size > exported.stat().st_size - 10_000
    assert (tmp_path / "large.onnx").stat().st_size < exported.stat().st_size / 2
    found, whole = (run_onnx(path, MIXED.numpy(), 8) for path in (tmp_path / "large.onnx", exported))
    np.testing.assert_array_equal(found["score"], whole["score"])


@pytest.mark.parametrize("limit", [10_000, 2**31])
def test_a_file_appears_whole_or_not_at_all(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(export, "LARGEST_FILE_BYTES", limit)
    model, replace_file = onnx.load(exported), export.os.replace

    def full(source: Path, target: Path) -> None:
        if str(target).endswith(".onnx"):
            raise OSError(28, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr(export.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


SIZES = [(64, 64), (300, 201), (97, 640), (33, 900), (1, 1)]


@pytest.mark.parametrize("mode", ["shorter", "square", "letterbox"])
def test_resize_and_crop_in_the_graph(mode: str) -> None:
    """Nearly the same bytes; how far a pixel reads at a strong reduction depends on the last digits."""
    import onnxruntime

    for resize, side in ((64, 64), (97, 64)):
        config = PreprocessingConfig(resize, side, mode)
        said = {"resize_px": resize, "crop_px": side, "resize_mode": mode, "padding_rgb": [124, 116, 104]}
        session = onnxruntime.InferenceSession(resizing_model(said, 10).SerializeToString())
        for height, width in SIZES:
            coarse = np.random.default_rng(height).integers(0, 256, (4, 4, 3)).astype(np.uint8)
            image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            expected = crop_image(image, place(height, width, config)).astype(int)
            (found,) = session.run(None, {"images": np.asarray(image).transpose(2, 0, 1)[None]})
            difference = np.abs(found[0].transpose(1, 2, 0) - expected)
            assert difference.mean() < 0.2, (mode, resize, height, width)


def test_a_file_that_resizes(calibrated: AnomalyDetector, exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "any_size.onnx"
    write_onnx(with_resize(onnx.load(exported)), out)
    onnx.checker.check_model(out, full_check=True)
    assert read_metadata(onnx.load(out)) == {**read_metadata(onnx.load(exported)), "resize_in_graph": True}
    image = Image.fromarray(MIXED[7].permute(1, 2, 0).numpy()).resize((150, 200), Image.Resampling.BILINEAR)
    cropped = crop_image(image, place(200, 150, PREPROCESSING)).transpose(2, 0, 1)[None]
    expected = calibrated.predict(torch.from_numpy(cropped.copy()))
    found = run_onnx(out, np.asarray(image).transpose(2, 0, 1)[None], 1)
    assert found["map"].shape == (1, 64, 64)
    np.testing.assert_allclose(found["score"], expected.scores, rtol=0.01)
    np.testing.assert_allclose(found["map"], expected.maps, rtol=0.05)


def error_of(*args: object) -> str:
    """Return the one line that a wrong call gives."""
    finished = invoke(export_model, *args)
    assert finished.code == 2, finished.err
    (line,) = finished.error_lines
    return line


def test_mistakes_are_one_line(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = exported.with_name("model"), tmp_path / "new.onnx"
    assert "'nowhere' not found, expected a model folder" in error_of("nowhere", "--out", out)
    assert "make it first" in error_of(model, "--out", tmp_path / "no" / "new.onnx")
    assert "exists: remove it, or type another name" in error_of(model, "--out", exported)
    assert "exists: remove it, or type another name" in error_of(model, "--out", tmp_path)
    (tmp_path / "new.onnx.data").touch()
    assert "new.onnx.data' exists" in error_of(model, "--out", out)
    assert "--out is empty, expected a path: is a variable not set?" in error_of(model, "--out", "")
    assert "is no name of a file" in error_of(model, "--out", ".")
    assert "trained with 64" in error_of(model, "--out", tmp_path / "other.onnx", "--resize", 99)
    torch.save({"a": torch.zeros(2)}, tmp_path / "bare.pth")
    assert "bare state dict" in error_of(tmp_path / "bare.pth", "--out", tmp_path / "other.onnx")
    other = ("--out", tmp_path / "other.onnx")
    assert "type both or none" in error_of(model, *other, "--precision", "int8")
    assert "type both or none" in error_of(model, *other, "--calibration_images", tmp_path)
    int8 = (*other, "--precision", "int8", "--calibration_images")
    assert "'nothing'" in error_of(model, *int8, "nothing")
    (tmp_path / "broken.png").write_bytes(b"no image")
    finished = invoke(export_model, model, *int8, tmp_path / "broken.png")
    assert finished.code == 1 and "broken.png" in finished.error_lines[-1]
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert "found no onnx and no onnxscript, which" in error_of(model, *other)
    assert "and no onnxruntime, which" in error_of(model, *int8, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare.pth", "broken.png", "new.onnx.data"]


def test_models_without_a_graph_are_one_line(exported: Path, tmp_path: Path) -> None:
    """Known from model.json alone, before a backbone is loaded."""
    stored = json.loads((exported.with_name("model") / "model.json").read_text())
    tiles = replace(FASTFLOW, tiles=TileConfig(32, 16))
    minmax = EnsembleConfig((PATCHCORE, replace(PATCHCORE, patchsize=5)), score_normalization="minmax")
    for method, config, expected in [
        ("resnet_knn", EXAMPLES["resnet_knn"], "only ensemble, fastflow, patchcore have"),
        ("autoencoder", EXAMPLES["autoencoder"], "only ensemble, fastflow, patchcore have"),
        ("fastflow", tiles, "train it without --enable_patch_inference"),
        ("ensemble", minmax, "--score_normalization calibrated"),
    ]:
        with pytest.raises(ConfigurationError, match=expected):
            DETECTORS[method].require_graph(config)
    stored |= {"method": "fastflow", "config": config_to_dict(tiles), "format_version": 1}
    del stored["manifest"]
    (tmp_path / "tiled").mkdir()
    (tmp_path / "tiled" / "model.json").write_text(json.dumps(stored))
    line = error_of(tmp_path / "tiled", "--out", tmp_path / "new.onnx")
    assert line.startswith("error: model ") and "--enable_patch_inference" in line


def test_the_program_of_the_readme_is_short() -> None:
    assert len(readme_script().splitlines()) <= 40


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["concat, projected", "ensemble of two backbones", "prob", "weighted, mean", "guided, robust"]
)
def test_other_files_give_what_the_models_predict(name: str, tmp_path: Path) -> None:
    detector = fitted(*COMBINATIONS[name])
    predicted = detector.predict(MIXED)
    model = onnx_model(exported_model(detector))
    write_onnx(model, tmp_path / "model.onnx")
    found = run_onnx(tmp_path / "model.onnx", MIXED.numpy(), 8)
    assert list(found) == ["score", "map"], "no thresholds, no normalised score"
    np.testing.assert_allclose(found["score"], predicted.scores, rtol=1e-5)
    assert predicted.maps is not None
    np.testing.assert_allclose(found["map"], predicted.maps, atol=1e-5 * np.abs(predicted.maps).max())

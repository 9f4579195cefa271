"""Exported models on real images: in onnxruntime, and in an environment without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from onnx_files import SCRIPT, readme_script, run_onnx
from PIL import Image

from patchcore.datasets.images import crop_image, place, read_image
from patchcore.detector import AnomalyDetector
from patchcore.evaluation.metrics import image_metrics
from patchcore.model_export import ExportJob, export_model
from patchcore.prediction import open_detector

pytestmark = pytest.mark.slow

DATASETS = {"metal_plate": "mpdd", "bottle": "mvtec"}
METHOD = ("-b", "efficientnet_lite0", "-le", "blocks.2", "-le", "blocks.4", "--anomaly_scorer_num_nn", "1")
SAMPLER = ("sampler", "-p", "0.01", "approx_greedy_coreset")
BATCH_SIZE = 8


def run_script(name: str, *args: object) -> str:
    """Run a script of bin/ and return what it printed."""
    command = [sys.executable, str(REPOSITORY / "bin" / name), *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=1500).stdout


@dataclass(frozen=True)
class Trained:
    """A model of one class, and what it says of the test images.

    Attributes:
        folder: The model folder.
        data: Folder of the class.
        paths: Test images.
        images: uint8 [N, 3, S, S], resized and cropped.
        scores: [N].
        maps: [N, S, S].
    """

    folder: Path
    data: Path
    paths: list[Path]
    images: np.ndarray
    scores: np.ndarray
    maps: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        return np.array([path.parent.name != "good" for path in self.paths])

    def auroc(self, scores: np.ndarray) -> float:
        metrics = image_metrics(scores, self.labels)
        assert metrics.auroc is not None
        return metrics.auroc


def read_cropped(path: Path, detector: AnomalyDetector) -> np.ndarray:
    image = read_image(path)
    return crop_image(image, place(image.height, image.width, detector.preprocessing)).transpose(2, 0, 1)


@pytest.fixture(scope="module", params=DATASETS)
def trained(request: pytest.FixtureRequest, real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    category, dataset = request.param, DATASETS[request.param]
    results, data = tmp_path_factory.mktemp(category), real_data / dataset / category
    run_script(
        "run_patchcore.py", "--device", "cpu", "--save_patchcore_model", results, "patch_core", *METHOD, *SAMPLER,
        "dataset", "--batch_size", BATCH_SIZE, "--limit_train", 54, "-d", category, dataset, data.parent,
    )  # fmt: skip
    folder = results / "project" / "group" / "models" / f"{dataset}_{category}"
    detector = open_detector(folder, torch.device("cpu"))
    paths = sorted((data / "test").glob("*/*.png"))
    images = np.stack([read_cropped(path, detector) for path in paths])
    predictions = [detector.predict(batch) for batch in torch.from_numpy(images).split(BATCH_SIZE)]
    joined = detector.join(predictions)
    assert joined.maps is not None
    return Trained(folder, data, paths, images, joined.scores, joined.maps)


@pytest.fixture(scope="module")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model.onnx"
    run_script("export_model.py", trained.folder, "--out", out)
    return out


@pytest.mark.parametrize("batch_size", [1, BATCH_SIZE])
def test_every_test_image_scores_as_in_the_toolkit(trained: Trained, exported: Path, batch_size: int) -> None:
    found = run_onnx(exported, trained.images, batch_size)
    np.testing.assert_allclose(found["score"], trained.scores, rtol=1e-5)
    np.testing.assert_allclose(found["map"], trained.maps, atol=1e-5 * trained.maps.max())


def test_a_file_that_resizes_by_itself(trained: Trained, tmp_path: Path) -> None:
    """Its deviation is stated in the README."""
    out = tmp_path / "any_size.onnx"
    export_model(ExportJob(trained.folder, out, resize_in_graph=True), print)
    whole = [np.asarray(read_image(path)).transpose(2, 0, 1)[None] for path in trained.paths]
    found = run_onnx(out, whole, 1)
    np.testing.assert_allclose(found["score"], trained.scores, rtol=0.01)
    np.testing.assert_allclose(found["map"], trained.maps, atol=0.02 * trained.maps.max())
    assert abs(trained.auroc(found["score"]) - trained.auroc(trained.scores)) <= 0.002


def test_a_file_in_8_bits(trained: Trained, exported: Path, tmp_path: Path) -> None:
    """The ranges are learned from images of the training; what it costs is stated in the README."""
    out = tmp_path / "int8.onnx"
    export_model(ExportJob(trained.folder, out, calibration_images=(str(trained.data / "train" / "good"),)), print)
    assert out.stat().st_size < exported.stat().st_size / 2
    found = run_onnx(out, trained.images, BATCH_SIZE)
    assert abs(trained.auroc(found["score"]) - trained.auroc(trained.scores)) <= 0.01
    assert float(np.median(np.abs(found["score"] / trained.scores - 1))) <= 0.02


@pytest.fixture(scope="module")
def python_without_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with onnxruntime, Pillow and numpy alone."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--retries", "1", "onnxruntime", "pillow", "numpy"]
    installed = subprocess.run(install, capture_output=True, text=True, timeout=600, check=False)
    if installed.returncode:
        pytest.skip(f"pip finds no packages here: {installed.stderr.strip().splitlines()[-1]}")
    return python


def test_the_program_of_the_readme_without_torch(
    trained: Trained, exported: Path, python_without_torch: Path, tmp_path: Path
) -> None:
    assert subprocess.run([python_without_torch, "-c", "import torch"], capture_output=True).returncode, "has torch"
    (tmp_path / SCRIPT).write_text(readme_script())
    chosen = [number for number in range(len(trained.paths)) if number % 9 == 0]
    arguments = [python_without_torch, SCRIPT, exported, *(trained.paths[number] for number in chosen)]
    finished = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    calibration = open_detector(trained.folder, torch.device("cpu")).calibration_
    assert calibration is not None and calibration.pixel is not None
    verdicts = set()
    for number, line in zip(chosen, finished.stdout.splitlines(), strict=True):
        path, score, normalized, verdict = line.rsplit(" ", 3)
        assert path == str(trained.paths[number])
        assert float(score) == pytest.approx(float(trained.scores[number]), rel=1e-5)
        assert float(normalized) == pytest.approx(float(calibration.image.normalized(trained.scores[number])), rel=1e-4)
        assert verdict == ("ANOMALOUS" if trained.scores[number] > calibration.image.threshold else "normal")
        verdicts.add(verdict)
    assert verdicts == {"ANOMALOUS", "normal"}
    last = chosen[-1]
    picture = np.asarray(Image.open(tmp_path / f"{trained.paths[last].stem}_map.png"))
    expected = calibration.pixel.normalized(trained.maps[last]) * 65535
    assert picture.dtype == np.uint16
    np.testing.assert_allclose(picture, expected, atol=3)

"""A stored model on single images, what the page says of them, and how its command fails."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_run, write_category, write_texture
from in_process import invoke, read_rows
from PIL import Image
from small_fastflow import train as train_fastflow
from test_detectors import CPU, EXAMPLES, PREPROCESSING, Batches, anomalous_images, random_images

from patchcore import web
from patchcore.cli import run_patchcore, serve_demo
from patchcore.configs import PreprocessingConfig, RuntimeConfig, TrainingSource
from patchcore.datasets.images import read_image
from patchcore.detector import DETECTORS, AnomalyDetector, Prediction
from patchcore.errors import ConfigurationError
from patchcore.evaluation.plots.pictures import CONTOUR
from patchcore.inference.detector import LoadedDetector
from patchcore.prediction import open_detector
from patchcore.web import Inspector

pytestmark = pytest.mark.usefixtures("one_thread")

HOSTILE = "<img src=x onerror=alert(1)>'\".png"


def fitted(method: str) -> AnomalyDetector:
    """Return a small detector of any method, with calibration where it has one."""
    build = DETECTORS[method].prepare(EXAMPLES[method], PREPROCESSING, RuntimeConfig())
    detector = build(TrainingSource("folder", "part", seed=3), CPU)
    detector.fit(Batches(random_images(6, 1)))
    detector.calibration_ = detector.out_of_fold_calibration()
    detector.release_training_data()
    return detector


@pytest.fixture(scope="module")
def patchcore() -> AnomalyDetector:
    return fitted("patchcore")


@pytest.fixture
def defect(tmp_path: Path) -> Path:
    """An image that every example of a method finds anomalous, at the model's own size."""
    path = tmp_path / "defect.png"
    Image.fromarray(anomalous_images(1, 2)[0].permute(1, 2, 0).numpy()).save(path)
    return path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run with a stored model, and its data."""
    root = tmp_path_factory.mktemp("run")
    write_category(root / "data", "plate")
    finished = invoke(run_patchcore, "--device", "cpu", "--threads", 1, "--save_patchcore_model", root / "results",
                      *small_run(root / "data", "plate", reading=("--resize", "72")))  # fmt: skip
    assert finished.code == 0, finished.err
    return root / "results" / "project" / "group", root / "data"


def test_scores_are_those_of_the_run(run_folder: tuple[Path, Path]) -> None:
    folder, data = run_folder
    detector = open_detector(folder / "models" / "mpdd_plate", CPU)
    rows = read_rows(folder / "anomaly_scores" / "mpdd_plate.csv")
    assert len(rows) == 6
    for row in rows:
        (scored,) = LoadedDetector(detector).predict(data / row["path"])
        assert scored.score == pytest.approx(float(row["score"]), rel=1e-5)
        assert scored.normalized == pytest.approx(float(row["normalized_score"]), rel=1e-4)
        assert scored.is_anomalous == bool(int(row["decision"]))


def test_map_is_that_of_the_crop_and_lies_on_the_image(patchcore: AnomalyDetector, tmp_path: Path) -> None:
    write_texture(tmp_path / "a.png", 1, defect=True)  # a bright square at rows 20 to 36, columns 24 to 40 of 64
    image = read_image(tmp_path / "a.png").resize((192, 192))
    cropped = Inspector(patchcore).detector
    (scored,) = LoadedDetector(cropped).predict(image)
    assert scored.model_map is not None and scored.model_map.shape == (64, 64)
    whole = scored.anomaly_map
    assert whole is not None and whole.shape == (192, 192)
    assert whole[75:93, 87:105].mean() > 1.3 * np.nanmean(whole)


@pytest.mark.parametrize("method", sorted(EXAMPLES))
def test_every_method_answers(method: str, defect: Path) -> None:
    detector = fitted(method)
    answer = Inspector(detector).inspect(defect)
    assert "ANOMALOUS" in answer.verdict and "threshold 0.5" in answer.verdict
    assert answer.image is not None and answer.image.size == (64, 64)
    assert (answer.heat_map is not None) == detector.has_maps
    if answer.heat_map is not None:
        assert answer.heat_map.size == (64, 64)

    detector.calibration_ = None
    bare = Inspector(detector).inspect(defect)
    assert "No decision" in bare.verdict and "without calibration" in bare.verdict and "0.5" not in bare.verdict
    assert (bare.heat_map is not None) == detector.has_maps
    if bare.heat_map is not None:
        assert not (np.asarray(bare.heat_map) == CONTOUR).all(axis=-1).any()


def test_verdict_says_raw_and_normalised_score(patchcore: AnomalyDetector, defect: Path) -> None:
    assert patchcore.calibration_ is not None
    scores = patchcore.predict(anomalous_images(1, 2)).scores
    verdict = Inspector(patchcore).inspect(defect).verdict
    assert f"{scores[0]:.5g} (threshold {patchcore.calibration_.image.threshold:.5g})" in verdict
    assert f"{patchcore.calibration_.image.normalized(scores)[0]:.3f} (from 0 to 1" in verdict
    assert "64 x 64 px" in verdict


def test_contour_encloses_what_lies_above_the_pixel_threshold(patchcore: AnomalyDetector, defect: Path) -> None:
    calibration = patchcore.calibration_
    maps = patchcore.predict(anomalous_images(1, 2)).maps
    assert maps is not None and calibration is not None and calibration.pixel is not None
    answer = Inspector(patchcore).inspect(defect)
    line = (np.asarray(answer.heat_map) == CONTOUR).all(axis=-1)
    above = maps[0] > calibration.pixel.threshold
    assert line.any() and not (line & ~above).any()


def test_good_image_is_called_normal(patchcore: AnomalyDetector, tmp_path: Path) -> None:
    Image.fromarray(random_images(6, 1)[0].permute(1, 2, 0).numpy()).save(tmp_path / "good.png")
    answer = Inspector(patchcore).inspect(tmp_path / "good.png")
    assert ">normal<" in answer.verdict and "ANOMALOUS" not in answer.verdict


def test_large_image_is_shown_small(patchcore: AnomalyDetector, tmp_path: Path) -> None:
    Image.new("RGB", (3000, 1500)).save(tmp_path / "a.png")
    answer = Inspector(patchcore).inspect(tmp_path / "a.png")
    assert answer.image is not None and answer.heat_map is not None
    assert answer.image.size == answer.heat_map.size == (1024, 512)
    assert "3000 x 1500 px" in answer.verdict


def test_camera_and_print_formats(patchcore: AnomalyDetector, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 120)).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(np.full((80, 120), 40_000, np.uint16)).save(tmp_path / "deep.tiff")
    Image.new("CMYK", (120, 80)).save(tmp_path / "print.jpg")
    for path in tmp_path.iterdir():
        answer = Inspector(patchcore).inspect(path)
        assert answer.image is not None and answer.image.size == (120, 80), path
        assert answer.image.mode == "RGB"
    deep = Inspector(patchcore).inspect(tmp_path / "deep.tiff").image
    assert deep is not None and deep.getpixel((0, 0)) == (156, 156, 156)  # 40000 / 65535 * 255


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "the file is empty"), (b"%PDF-1.7 not an image", "unknown format"), (b"<svg/>", "unknown format")],
)
def test_no_image(patchcore: AnomalyDetector, tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    answer = Inspector(patchcore).inspect(path)
    assert "Not scored" in answer.verdict and reason in answer.verdict
    assert str(tmp_path) not in answer.verdict, "where uploads are kept concerns nobody"
    assert answer.image is None and answer.heat_map is None


def test_too_many_pixels(patchcore: AnomalyDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (200, 200)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # twice as many are an error
    verdict = Inspector(patchcore).inspect(tmp_path / "a.png").verdict
    assert "Not scored" in verdict and "40000 pixels" in verdict


def test_too_long(patchcore: AnomalyDetector, tmp_path: Path) -> None:
    Image.new("L", (60_000, 1)).save(tmp_path / "a.png")
    assert "60000 x 1 px is too long" in Inspector(patchcore).inspect(tmp_path / "a.png").verdict


def test_smaller_than_a_tile(patchcore: AnomalyDetector, defect: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(patchcore), "smallest_side_px", 100)
    assert "smaller than a tile of 100 px" in Inspector(patchcore).inspect(defect).verdict


def test_file_names_are_escaped(patchcore: AnomalyDetector, tmp_path: Path) -> None:
    for name, content in ((HOSTILE, None), (f"2{HOSTILE}", b"no image")):
        path = tmp_path / name
        Image.new("RGB", (64, 64)).save(path) if content is None else path.write_bytes(content)
        verdict = Inspector(patchcore).inspect(path).verdict
        assert "<img" not in verdict and "&lt;img src=x" in verdict
    patchcore_of_hostile = fitted("resnet_knn")
    patchcore_of_hostile.source = TrainingSource("<b>", "<script>alert(1)</script>")
    assert "<script>" not in Inspector(patchcore_of_hostile).heading()


def test_heading_and_legend_say_what_holds(patchcore: AnomalyDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    inspector = Inspector(patchcore)
    assert "part" in inspector.heading() and "patchcore, folder" in inspector.heading()
    assert "pixel threshold" in inspector.legend() and "this image alone" not in inspector.legend()
    monkeypatch.setattr(patchcore, "calibration_", None)
    assert "this image alone" in inspector.legend()
    monkeypatch.setattr(patchcore, "preprocessing", PreprocessingConfig(64, 64, "letterbox"))
    assert "longer side" in inspector.heading()
    monkeypatch.setattr(patchcore, "preprocessing", PreprocessingConfig(max_side_px=500))
    assert "500 px at most" in inspector.heading()


def test_scores_of_a_whole_test_set_are_refused() -> None:
    config = replace(EXAMPLES["ensemble"], score_normalization="minmax")
    build = DETECTORS["ensemble"].prepare(config, PREPROCESSING, RuntimeConfig())
    with pytest.raises(ConfigurationError, match="minmax"):
        Inspector(build(TrainingSource("folder", "part"), CPU).fit(Batches(random_images(4, 1))))


def test_one_image_at_a_time(patchcore: AnomalyDetector, defect: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = 0, 0
    counting = threading.Lock()
    predict = patchcore.predict

    def watched(images: torch.Tensor) -> Prediction:
        nonlocal inside, most
        with counting:
            inside += 1
            most = max(most, inside)
        time.sleep(0.02)
        try:
            return predict(images)
        finally:
            with counting:
                inside -= 1

    expected = Inspector(patchcore).inspect(defect).verdict
    monkeypatch.setattr(patchcore, "predict", watched)
    inspector = Inspector(patchcore)
    with ThreadPoolExecutor(4) as threads:
        verdicts = list(threads.map(lambda _: inspector.inspect(defect).verdict, range(8)))
    assert most == 1
    assert set(verdicts) == {expected}


def test_export_of_fastflow_is_a_model(tmp_path: Path) -> None:
    write_category(tmp_path / "data", "plate")
    trained = train_fastflow(tmp_path / "results", tmp_path / "data", "--save_model")
    assert trained.code == 0, trained.err
    (folder,) = (tmp_path / "results").rglob("models/mpdd_plate")
    (export,) = folder.glob("*_final.pth")
    image = tmp_path / "data" / "plate" / "test" / "spot" / "000.png"
    verdicts = {Inspector(open_detector(model, CPU)).inspect(image).verdict for model in (folder, export)}
    assert len(verdicts) == 1
    torch.save({"weight": torch.zeros(3)}, tmp_path / "bare.pth")
    with pytest.raises(ConfigurationError, match="bare state dict"):
        open_detector(tmp_path / "bare.pth", CPU)


@pytest.fixture
def without_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let no test here start a server, should what it expects to fail succeed; and keep the signals."""

    def fail(*args: object) -> None:
        pytest.fail("a server was about to start")

    monkeypatch.setattr(web, "_application", fail)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("without_server")
class TestErrors:
    """Each is one line, exit code 2."""

    @staticmethod
    def error(*args: object) -> str:
        finished = invoke(serve_demo, "--device", "cpu", *args)
        assert finished.code == 2, finished
        (line,) = finished.error_lines
        return line

    @pytest.fixture(autouse=True)
    def gradio_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(web, "_require_gradio", lambda: (None, None))

    def test_no_model(self, tmp_path: Path) -> None:
        assert "not found, expected a model folder" in self.error("--port", 0, tmp_path / "none")
        assert "is no model folder: model.json is missing" in self.error("--port", 0, tmp_path)

    def test_port_is_taken(self, tmp_path: Path) -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            line = self.error("--port", port, tmp_path)
        assert f"--port {port} cannot be used" in line and "choose another" in line

    @pytest.mark.parametrize("port", [-1, 65536])
    def test_no_port(self, port: int, tmp_path: Path) -> None:
        assert f"--port {port}: expected 1 to 65535, or 0" in self.error("--port", port, tmp_path)


def test_without_gradio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    finished = invoke(serve_demo, "--device", "cpu", "--port", 0, tmp_path)
    assert finished.code == 2
    (line,) = finished.error_lines
    assert "pip install '.[web]'" in line


def test_uploads_are_kept_no_longer_than_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "elsewhere")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    import os

    with web._own_temporary_folder():
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        (folder / "upload.png").write_bytes(b"")
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert not folder.exists()

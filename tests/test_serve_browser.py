"""The page that tries a stored model, served by its command, in a real browser."""

from __future__ import annotations

import base64
import http.client
import io
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, write_category
from headless import Browser
from in_process import invoke
from PIL import Image

from patchcore.cli import run_baselines, run_patchcore
from patchcore.prediction import open_detector
from patchcore.web import MAX_UPLOAD_MB, Inspector

pytestmark = pytest.mark.slow

PHONE_PX = (390, 844)
SECONDS = 60
READING = ("--resize", "72", "--imagesize", "64", "--num_workers", "0", "-d", "plate", "mpdd")
COMMON = ("--device", "cpu", "--threads", "1")
DROP = """
const [zone, name, content] = arguments;
const transfer = new DataTransfer();
transfer.items.add(new File([Uint8Array.from(atob(content), c => c.charCodeAt(0))], name));
for (const type of ["dragenter", "dragover", "drop"])
    zone.dispatchEvent(new DragEvent(type, {dataTransfer: transfer, bubbles: true, cancelable: true}));
"""
READ = """
const [url, done] = arguments;
fetch(url).then(r => r.blob()).then(blob => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.split(",")[1]);
    reader.readAsDataURL(blob);
});
"""


@dataclass(frozen=True)
class Models:
    """Stored models of the class `plate`, and its test images."""

    patchcore: Path
    without_map: Path
    images: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[web]'")
    root = tmp_path_factory.mktemp("models")
    data = root / "data"
    write_category(data, "plate", num_train=10)
    save = ("--save_patchcore_model", root)
    features = ("-b", "efficientnet_lite0", "-le", "blocks.2", "-le", "blocks.4", "--anomaly_scorer_num_nn", "1")
    sampler = ("sampler", "-p", "0.5", "approx_greedy_coreset")
    patchcore = invoke(run_patchcore, *COMMON, "--log_group", "bank", *save,
                       "patch_core", *features, *sampler, "dataset", *READING, data)  # fmt: skip
    assert patchcore.code == 0, patchcore.err
    knn = invoke(run_baselines, *COMMON, "--log_group", "knn", "--save_model", root,
                 "resnet_knn", "-b", "efficientnet_lite0", "--clamp_k", "dataset", *READING, data)  # fmt: skip
    assert knn.code == 0, knn.err
    bank, without_map = (root / "project" / group / "models" / "mpdd_plate" for group in ("bank", "knn"))
    return Models(bank, without_map, data / "plate" / "test")


@contextmanager
def served(model: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serve a model as a user does; yields the address and the process."""
    command = [sys.executable, str(REPOSITORY / "bin" / "serve_demo.py"), str(model), "--port", "0", *COMMON, *options]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "HTTP_PROXY": "http://127.0.0.1:9"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdout is not None and server.stderr is not None
        line = server.stdout.readline()
        try:
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            assert found, f"{line!r} {server.stderr.read()}"
            yield found[0], server
        finally:
            server.kill()


@pytest.fixture(scope="module")
def address(models: Models) -> Iterator[str]:
    with served(models.patchcore) as (url, _):
        yield url


@pytest.fixture
def page(browser: Browser, address: str) -> Browser:
    """The page in a browser whose fixture fails a test after an error on the console or a request to elsewhere."""
    browser.open(address)
    wait(browser, lambda: browser.driver.find_elements("css selector", "input[type=file]"))
    return browser


def wait(browser: Browser, condition: Callable[[], Any]) -> Any:
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    waiting = WebDriverWait(browser.driver, SECONDS, ignored_exceptions=[StaleElementReferenceException])
    return waiting.until(lambda _: condition())


def upload(browser: Browser, path: Path) -> None:
    """Choose a file, as the dialog does that a click opens."""
    browser.find("input[type=file]").send_keys(str(path))


def verdict(browser: Browser, name: str) -> str:
    """Wait for what the page says of a file, and return it."""
    return str(wait(browser, lambda: next((text for text in browser.texts(".verdict") if name in text), None)))


def picture(browser: Browser, label: str) -> Image.Image:
    """Wait for the picture of that label, and return what the browser shows."""
    xpath = f"//*[contains(@class, 'block')][.//label[contains(., '{label}')]]//img"
    image = wait(browser, lambda: browser.driver.find_elements("xpath", xpath))[0]
    wait(browser, lambda: browser.run("return arguments[0].complete && arguments[0].naturalWidth", image))
    content = browser.driver.execute_async_script(READ, image.get_attribute("src"))
    return Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")


def test_dropped_images_are_scored_one_after_the_other(page: Browser, models: Models) -> None:
    inspector = Inspector(open_detector(models.patchcore, torch.device("cpu")))
    for folder, decision in (("spot", "ANOMALOUS"), ("good", "normal")):
        path = models.images / folder / "000.png"
        named = f"{folder}_000.png"
        zone = page.find("input[type=file]").find_element("xpath", "./ancestor::button")
        page.run(DROP, zone, named, base64.b64encode(path.read_bytes()).decode())
        said = verdict(page, named)
        expected = inspector.inspect(path)
        assert decision in said
        for number in re.findall(r"\d+\.\d+", expected.verdict):
            assert number in said
        assert expected.image is not None and expected.heat_map is not None
        np.testing.assert_array_equal(np.asarray(picture(page, "Image")), np.asarray(expected.image))
        np.testing.assert_array_equal(np.asarray(picture(page, "Heat map")), np.asarray(expected.heat_map))


def test_nothing_offers_to_send_a_picture_elsewhere(page: Browser, models: Models) -> None:
    upload(page, models.images / "spot" / "000.png")
    verdict(page, "000.png")
    picture(page, "Heat map")
    found = page.run(
        "return [...document.querySelectorAll('button[aria-label], a[href]')].map(e => [e.ariaLabel, e.href])"
    )
    assert [label for label, _ in found if label], "the pictures have buttons"
    assert not [label for label, _ in found if label and "share" in label.lower()]
    assert not [href for _, href in found if href and not href.startswith(("http://127.0.0.1:", "data:", "blob:"))]


def test_what_is_no_image_is_said_and_the_page_goes_on(page: Browser, models: Models, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    upload(page, tmp_path / "notes.txt")
    said = verdict(page, "notes.txt")
    assert "Not scored" in said and "unknown format" in said
    wait(page, lambda: page.driver.find_elements("css selector", "input[type=file]"))
    (tmp_path / "again.png").write_bytes((models.images / "spot" / "001.png").read_bytes())
    upload(page, tmp_path / "again.png")
    assert "ANOMALOUS" in verdict(page, "again.png")


def test_oversize_file_is_refused_in_words(page: Browser, models: Models, tmp_path: Path) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate((MAX_UPLOAD_MB + 1) * 1024**2)
    upload(page, tmp_path / "huge.png")
    wait(page, lambda: "maximum" in page.find("body").text)


def test_hostile_file_name_is_text(page: Browser, models: Models, tmp_path: Path) -> None:
    path = tmp_path / "<img src=x onerror=document.title='owned'>.png"
    path.write_bytes((models.images / "good" / "000.png").read_bytes())
    upload(page, path)
    assert "normal" in verdict(page, ".png")
    assert page.driver.title.startswith("plate")
    assert not page.driver.find_elements("css selector", ".verdict img")


def test_method_without_maps_on_a_phone(models: Models, browser: Browser) -> None:
    browser.resize(*PHONE_PX, mobile=True, dark=True)
    with served(models.without_map) as (url, _):
        browser.open(url)
        wait(browser, lambda: browser.driver.find_elements("css selector", "input[type=file]"))
        upload(browser, models.images / "spot" / "000.png")
        assert "ANOMALOUS" in verdict(browser, "000.png")
        assert picture(browser, "Image").size == (64, 64)
        assert "Heat map" not in browser.find("body").text
        assert browser.run("return document.documentElement.scrollWidth") <= PHONE_PX[0]
        browser.open("about:blank")  # before the server goes, or the page complains that it has


def test_only_this_machine_is_served(address: str) -> None:
    port = int(address.rpartition(":")[2])
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=5):
        pass  # another address of this machine, which a page for everybody would answer at
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    connection.request("GET", "/", headers={"Host": "elsewhere.example"})
    assert connection.getresponse().status == 400


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_without_a_trace(ending: signal.Signals, models: Models, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with served(models.without_map) as (_, server):
        assert len(list(tmp_path.glob("patchcore_demo_*"))) == 1
        server.send_signal(ending)
        out, err = server.communicate(timeout=SECONDS)
        assert server.returncode == 0, err
        assert out.splitlines() == ["ended"]
        assert "Traceback" not in err
    assert not list(tmp_path.glob("patchcore_demo_*"))

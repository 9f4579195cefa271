"""A real browser without a window, for tests of pages."""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

BINARIES = ("chromium", "chromium-browser", "google-chrome")
ALLOWED_ADDRESSES = ("file:", "data:", "blob:", "about:", "http://127.0.0.1:", "chrome:")


def why_no_browser() -> str | None:
    """Say what is missing to drive a browser; None where all is there."""
    if importlib.util.find_spec("selenium") is None:
        return "selenium is not installed: pip install -e '.[dev]'"
    if not any(map(shutil.which, BINARIES)) or not shutil.which("chromedriver"):
        return "no Chromium with chromedriver: apt-get install chromium chromium-driver"
    return None


class Browser:
    """Chromium and what it noted; `driver` is selenium's."""

    def __init__(self) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = next(path for path in map(shutil.which, BINARIES) if path)
        # Root has no sandbox, containers have a small /dev/shm, and a browser's own business asks for addresses.
        for argument in (
            "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1280,900",
            "--disable-background-networking", "--disable-component-update", "--no-first-run",
        ):  # fmt: skip
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.driver.set_page_load_timeout(120)

    def open(self, page: Path | str) -> None:
        """Open a file or an address."""
        self.driver.get(page.resolve().as_uri() if isinstance(page, Path) else page)

    def run(self, script: str, *arguments: object) -> Any:
        """Run the body of a function in the page and return what it returns."""
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        """Return the texts of all elements, also of those that are not in sight."""
        found: list[str] = self.run(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
        )
        return found

    def press(self, key: str) -> None:
        """Press a key where the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(key).perform()

    def choose(self, selector: str, value: str) -> None:
        """Choose an option, or set a slider or a number, as a user's input would."""
        self.run(
            "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input', {bubbles: true}));"
            "e.dispatchEvent(new Event('change', {bubbles: true}));",
            selector,
            value,
        )

    def resize(self, width: int, height: int, mobile: bool = False, dark: bool = False) -> None:
        """Give the page a size, px, and a colour scheme."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Save what is in sight, or the whole page, as PNG."""
        taken = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": whole})
        path.write_bytes(base64.b64decode(taken["data"]))

    def printed(self) -> bytes:
        """Return the page as the PDF that printing gives."""
        return base64.b64decode(self.driver.print_page())

    def require_quiet(self) -> None:
        """Fail if a page wrote an error to the console or asked for an address outside."""
        errors = [e["message"] for e in self.driver.get_log("browser") if e["level"] == "SEVERE"]
        assert not errors, errors
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        outside = [url[:200] for url in asked if not url.startswith(ALLOWED_ADDRESSES)]
        assert not outside, outside

    def quit(self) -> None:
        self.driver.quit()

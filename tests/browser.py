"""A real headless Chromium for tests of the report's page; one for all tests of a file."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PHONE, DESKTOP = (390, 844), (1280, 900)

# Without the background flags Chromium asks for its makers' hosts at every start.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


def obstacle() -> str | None:
    """Why no browser can be started here."""
    missing = [program for program in ("chromium", "chromedriver") if shutil.which(program) is None]
    missing += [] if importlib.util.find_spec("selenium") else ["selenium"]
    return (
        f"{', '.join(missing)} not installed: apt-get install chromium chromium-driver, pip install selenium"
        if missing
        else None
    )


def require() -> None:
    """Skips the tests where no browser is; fails them under HPC_REQUIRE_SLURM=1, as those on the cluster."""
    if reason := obstacle():
        if os.environ.get("HPC_REQUIRE_SLURM") == "1":
            pytest.fail(f"HPC_REQUIRE_SLURM=1, but no browser can be started here ({reason})", pytrace=False)
        pytest.skip(f"no browser can be started here ({reason})")


class Browser:
    """What the tests ask of a page, by way of chromedriver."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, size: tuple[int, int] = DESKTOP, dark: bool = False, address: str = "") -> None:
        """The page of a file, as if opened afresh, in a window whose inside is `size` (width, height)."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.cdp("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])
        self.driver.get("about:blank")
        self.logs()
        self.requests()
        self.driver.get(path.as_uri() + address)
        # Curves are drawn with the page's first picture.
        undrawn = "return document.querySelectorAll('#curves svg.curves:empty').length"
        self.wait(lambda: self.run(undrawn) == 0)

    def cdp(self, command: str, **arguments: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, arguments)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        """Of what is shown, in the page's order."""
        script = (
            "return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility()).map(e => e.innerText)"
        )
        return list(self.run(script, selector))

    def wait(self, wanted: Callable[[], bool], at_most_s: float = 20) -> None:
        """What the page does at its next pictures."""
        end = time.monotonic() + at_most_s
        while not wanted():
            assert time.monotonic() < end, f"not in {at_most_s} s"
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        """Keys to whatever has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def logs(self) -> list[str]:
        """What the console was told since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses asked for since the last call, but for data: and the browser's own pages."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("data:", "about:", "chrome:"))]

    def shot(self, path: Path) -> None:
        self.driver.save_screenshot(str(path))


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """`profile`: an empty folder of its own."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield Browser(driver)
    finally:
        driver.quit()

"""A real Chromium, driven over chromedriver's HTTP protocol by the standard library alone."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)

START_SECONDS = 60.0


def missing() -> str:
    """Why there is no browser here; "" where there is one."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        return "there is no chromium here (Debian: chromium chromium-driver)"
    return "" if shutil.which("chromedriver") else "there is no chromedriver here (Debian: chromium-driver)"


class Browser:
    """A session of a browser; raises RuntimeError with what chromedriver says."""

    def __init__(self, base: str, profile: Path) -> None:
        self.base = base
        chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"], "binary": chromium}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"}}
        answer = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/session/{answer['sessionId']}"

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
        try:
            with opener.open(request, timeout=START_SECONDS) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode(errors="replace")) from error

    def open(self, page: Path, fragment: str = "") -> None:
        """Show a file."""
        self._ask("POST", f"{self.session}/url", {"url": page.as_uri() + fragment})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self._ask("POST", f"{self.session}/execute/sync", {"script": script, "args": list(arguments)})

    def until(self, script: str, *arguments: Any, seconds: float = 20.0) -> Any:
        """What a script returns once that is true; what it returned last where it never is."""
        end = time.monotonic() + seconds
        while not (found := self.run(script, *arguments)) and time.monotonic() < end:
            select.select([], [], [], 0.05)
        return found

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of the browser's own protocol."""
        return self._ask("POST", f"{self.session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        """Be a screen of that size."""
        scale = {"deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height, **scale)

    def media(self, kind: str = "", scheme: str = "light") -> None:
        """Show the page as on that medium, in light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", media=kind, features=features)

    def picture(self, place: Path, *, whole: bool = False) -> None:
        """Keep what is seen, or the whole page, as PNG."""
        answer = self.devtools("Page.captureScreenshot", captureBeyondViewport=whole)
        place.write_bytes(base64.b64decode(answer["data"]))

    def printed(self, place: Path) -> None:
        """Keep the page as it is printed, as PDF."""
        place.write_bytes(base64.b64decode(self.devtools("Page.printToPDF", printBackground=True)["data"]))

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What the browser has logged since it was asked last: `performance` has its requests, `browser` its errors."""
        found: list[dict[str, Any]] = self._ask("POST", f"{self.session}/se/log", {"type": kind})
        return found

    def close(self) -> None:
        """End the session."""
        self._ask("DELETE", self.session)


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a profile of its own, which ends with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        home = {**os.environ, "HOME": folder}
        driver = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", "chromedriver", "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=home,
        )
        try:
            shown = Browser(f"http://127.0.0.1:{_port(driver)}", Path(folder) / "profile")
            try:
                yield shown
            finally:
                shown.close()
        finally:
            driver.terminate()
            driver.wait(timeout=20)


def _port(driver: subprocess.Popen[str]) -> int:
    assert driver.stdout is not None
    for line in driver.stdout:
        if "on port" in line and (digits := line.rstrip().rstrip(".").rpartition(" ")[2]).isdigit() and int(digits):
            return int(digits)
    raise RuntimeError("chromedriver ended without saying its port")

"""A headless Chromium that tests drive: they open pages, press keys, and look at what the page shows.

Without a browser these tests are skipped. With VIDEOALIGN_REQUIRE_BROWSER in the environment, as .ci/run sets it, they
fail instead: there, a skip would hide that nobody has tried the page.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
REQUIRED = bool(os.environ.get("VIDEOALIGN_REQUIRE_BROWSER"))
needs_browser = pytest.mark.skipif(not BROWSER and not REQUIRED, reason=f"needs one of {', '.join(NAMES)}")


class Chrome:
    """One page of a browser, driven over the DevTools protocol.

    Args:
        width: Width of the window in pixels.
        height: Height of the window in pixels.
    """

    def __init__(self, width: int = 1200, height: int = 900) -> None:
        if not BROWSER:
            pytest.fail(f"VIDEOALIGN_REQUIRE_BROWSER is set, but there is none of {', '.join(NAMES)}", pytrace=False)
        self.folder = tempfile.mkdtemp()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        options += [f"--user-data-dir={self.folder}", f"--window-size={width},{height}"]
        self.process = subprocess.Popen([BROWSER, *options, "about:blank"], stderr=subprocess.DEVNULL)
        place = Path(self.folder) / "DevToolsActivePort"
        self.wait(place.exists, 60)
        port = place.read_text().split()[0]
        pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        self.socket = connect(next(p for p in pages if p["type"] == "page")["webSocketDebuggerUrl"], max_size=None)
        self.number = 0
        self("Page.enable")

    def __call__(self, method: str, **parameters: Any) -> dict:
        """Call a method of the protocol; returns its result."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("id") == self.number:
                return message.get("result", message)

    def open(self, url: str) -> None:
        """Open a page."""
        self("Page.navigate", url=url)

    def look(self, script: str) -> Any:
        """Evaluate a script in the page; returns its value."""
        answer = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        return answer["result"].get("value")

    def key(self, key: str, code: str = "") -> None:
        """Press and release a key.

        Args:
            key: What the key types, or its name.
            code: Name of its place on the keyboard, where that matters.
        """
        text, number = {"Enter": "\r"}.get(key, key if len(key) == 1 else ""), {"Tab": 9}.get(key, 0)
        self("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, code=code, windowsVirtualKeyCode=number)
        self("Input.dispatchKeyEvent", type="keyUp", key=key)

    def keys(self, *keys: str) -> None:
        """Press and release several keys, one after the other."""
        for key in keys:
            self.key(key)

    def until(self, script: str, seconds: float = 20) -> Any:
        """Wait until the value of a script is true; returns the value."""
        return self.wait(lambda: self.look(script), seconds, script)

    @staticmethod
    def wait(what: Callable[[], Any], seconds: float, why: object = "") -> Any:
        """Wait until a function returns something true; returns that.

        Args:
            what: The function.
            seconds: Time limit.
            why: What is waited for, in the message when the time is over.
        """
        end = time.monotonic() + seconds
        while not (found := what()):
            if time.monotonic() > end:
                raise TimeoutError(f"waited {seconds} s for {why or what}")
            time.sleep(0.05)
        return found

    def shot(self, path: Path) -> None:
        """Write a picture of the page as a PNG file."""
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot")["data"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

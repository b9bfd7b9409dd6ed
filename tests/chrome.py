"""A headless Chromium that tests drive: navigate, press keys, look."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

from websockets.sync.client import connect

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Chrome:
    """One page, over the DevTools protocol."""

    def __init__(self, width: int = 1200, height: int = 900) -> None:
        self.folder = tempfile.mkdtemp()
        self.process = subprocess.Popen(
            [
                BROWSER,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--remote-debugging-port=0",
                f"--user-data-dir={self.folder}",
                f"--window-size={width},{height}",
                "about:blank",
            ],
            stderr=subprocess.DEVNULL,
        )
        place = Path(self.folder) / "DevToolsActivePort"
        self.wait(place.exists, 60)
        port = place.read_text().split()[0]
        pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        self.socket = connect(next(p for p in pages if p["type"] == "page")["webSocketDebuggerUrl"], max_size=None)
        self.number = 0
        self("Page.enable")

    def __call__(self, method: str, **parameters: Any) -> dict:
        """One command's result."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("id") == self.number:
                return message.get("result", message)

    def open(self, url: str) -> None:
        """Go to a page."""
        self("Page.navigate", url=url)

    def look(self, script: str) -> Any:
        """The value of an expression in the page."""
        return self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)["result"].get("value")

    def key(self, key: str, code: str = "") -> None:
        """Press and release a key. Args: code: its place on the keyboard, where that matters."""
        text, number = {"Enter": "\r"}.get(key, key if len(key) == 1 else ""), {"Tab": 9}.get(key, 0)
        self("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, code=code, windowsVirtualKeyCode=number)
        self("Input.dispatchKeyEvent", type="keyUp", key=key)

    def until(self, script: str, seconds: float = 20) -> Any:
        """The expression's value as soon as it is true."""
        return self.wait(lambda: self.look(script), seconds, script)

    @staticmethod
    def wait(what: Any, seconds: float, why: object = "") -> Any:
        """What a function returns as soon as that is true."""
        end = time.monotonic() + seconds
        while not (found := what()):
            if time.monotonic() > end:
                raise TimeoutError(f"waited {seconds} s for {why or what}")
            time.sleep(0.05)
        return found

    def shot(self, path: Path) -> None:
        """A picture of the page."""
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot")["data"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

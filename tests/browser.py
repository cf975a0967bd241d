"""A headless Chromium for tests, driven by its DevTools protocol: what a person would see, type and press."""

import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

KEYS = {"Tab": 9, "Enter": 13, "ArrowUp": 38, "ArrowDown": 40, "ArrowRight": 39, "Space": 32}
PATIENCE = 60.0
"""Seconds until something that was waited for counts as missing."""


class Page:
    """One tab."""

    def __init__(self, socket) -> None:
        """`socket` is open on the tab's DevTools address."""
        self._socket, self._numbers = socket, itertools.count(1)

    def call(self, method: str, **params: Any) -> dict:
        """A DevTools command; raises AssertionError with the browser's words if it fails."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (answer := json.loads(self._socket.recv(PATIENCE))).get("id") != number:
            pass  # an event
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def text(self) -> str:
        """What the page says."""
        return self.run("document.body?.innerText ?? ''")

    def wait(self, script: str) -> Any:
        """The value of a JavaScript expression once it is true."""
        end = time.monotonic() + PATIENCE
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}\n{self.text()}"
            time.sleep(0.1)
        return value

    def open(self, url: str, width: int, height: int, mobile: bool = False) -> None:
        """Show a page in a window of this size."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.call("Page.navigate", url=url)

    def press(self, key: str) -> None:
        """Press and release a key of KEYS."""
        text = {"Enter": "\r", "Space": " "}.get(key)
        given = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", **given, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    def tab_to(self, script: str) -> None:
        """Press Tab until a JavaScript expression about `e`, the focused element, is true."""
        for _ in range(80):
            if self.run(f"(e => {script})(document.activeElement)"):
                return
            self.press("Tab")
            time.sleep(0.05)  # the page may still be drawing, and takes the focus along
        raise AssertionError(f"Tab never reaches an element with {script}")

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def choose_file(self, selector: str, file: Path) -> None:
        """Put a file into an upload field."""
        self.wait(f"document.querySelector({selector!r}) !== null")
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def screenshot(self, file: Path) -> None:
        """The window as PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


def executable() -> str:
    """The browser's path; skips the test where there is none."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium here to look at the page: apt-get install chromium")
    return found


@contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A tab of a browser with its profile in `folder`; skips the test where there is none."""
    browser = executable()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
    process = subprocess.Popen(
        [browser, *options, f"--user-data-dir={folder}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        told, end = folder / "DevToolsActivePort", time.monotonic() + PATIENCE
        while not (told.exists() and told.read_text().strip()):
            assert process.poll() is None and time.monotonic() < end, "Chromium did not start"
            time.sleep(0.1)
        port = told.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=PATIENCE) as answer:
            (tab,) = [tab for tab in json.load(answer) if tab["type"] == "page"]
        with connect(tab["webSocketDebuggerUrl"], max_size=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait()

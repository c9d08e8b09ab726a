"""A page in a headless Chromium, driven through its DevTools protocol."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

import httpx
from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE_SECONDS = 180
"""Time for the browser, which waits for its turn on a busy machine."""
KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "Backspace": (8, "")}
"""Key codes, and the text that a key types."""


def find_chromium() -> str | None:
    """Returns the browser's path, or `None` without a browser."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One page.

    Attributes:
        urls: Every address that it requested, in order.
        complaints: Errors that it wrote to the console, threw, or reported, such as a refused script.
    """

    def __init__(self, browser: str, folder: Path, width: int = 1200, height: int = 1200) -> None:
        self.urls: list[str] = []
        self.complaints: list[str] = []
        self._numbers = itertools.count(1)
        # No host name is looked up but the server's. Chromium's sandbox refuses to run as root.
        words = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder}", "--no-first-run"]
        words += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--hide-scrollbars", "--disable-gpu"]
        words += [f"--window-size={width},{height}", *(["--no-sandbox"] if os.geteuid() == 0 else []), "about:blank"]
        with (folder / "chromium.log").open("w") as log:
            self._process = subprocess.Popen([browser, *words], stdout=log, stderr=log)
        try:
            self._socket = connect(self._address(folder), max_size=None, open_timeout=PATIENCE_SECONDS)
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.command(f"{domain}.enable")
        except BaseException:
            self._process.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(PATIENCE_SECONDS)

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        """Returns the command's result; events that arrive meanwhile are recorded."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=PATIENCE_SECONDS))
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self._note(message.get("method"), message.get("params", {}))

    def open(self, url: str) -> None:
        answer = self.command("Page.navigate", url=url)
        assert "errorText" not in answer, (url, answer["errorText"])
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """Returns the value of JavaScript in the page, which JSON must be able to express."""
        result = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, (expression, result["exceptionDetails"])
        return result["result"].get("value")

    def wait_for(self, condition: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Waits until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < deadline, (
                f"{condition} did not come true:\n{self.evaluate('document.body.innerText')}"
            )
            time.sleep(0.1)

    def text(self, selector: str) -> str:
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent.trim()")

    def fill(self, selector: str, text: str) -> None:
        """Replaces a field's content with the text, as pasting does."""
        field = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{field}.focus(), {field}.select()")
        assert self.evaluate(f"document.activeElement === {field}"), f"{selector} cannot be typed into"
        if text:
            self.command("Input.insertText", text=text)
        else:
            self.press("Backspace")

    def click(self, selector: str) -> None:
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def press(self, key: str) -> None:
        """Presses one key, where the focus is."""
        code, typed = KEYS.get(key, (0, ""))
        named = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.command("Input.dispatchKeyEvent", type="keyDown", **named, **({"text": typed} if typed else {}))
        self.command("Input.dispatchKeyEvent", type="keyUp", **named)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"]))

    def _address(self, folder: Path) -> str:
        """Returns the address of the page's socket, once the browser has printed its port."""
        port_file, deadline = folder / "DevToolsActivePort", time.monotonic() + PATIENCE_SECONDS
        while not (port_file.exists() and port_file.read_text().count("\n")):
            log = (folder / "chromium.log").read_text()
            has_time = self._process.poll() is None and time.monotonic() < deadline
            assert has_time, f"Chromium did not start:\n{log}"
            time.sleep(0.1)
        pages = httpx.get(
            f"http://127.0.0.1:{port_file.read_text().split()[0]}/json/list", timeout=PATIENCE_SECONDS
        ).json()
        return next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")

    def _note(self, event: str | None, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.urls.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(params["args"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            entry = params["entry"]
            self.complaints.append(f"{entry['source']}: {entry['text']} {entry.get('url', '')}")

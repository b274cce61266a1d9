"""Headless Chromium, driven over its debugging pipe: no package needed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.patience import PATIENCE_S

__all__ = ["Browser", "find_browser", "open_browser"]

OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")


def find_browser() -> str | None:
    """CASCADE_LLM_CHROMIUM, or what the path has."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CASCADE_LLM_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


class Navigated(AssertionError):
    """The page that was asked has given way to another."""


class Browser:
    """One page."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._out, self._in = os.fdopen(to_browser, "wb", 0), os.fdopen(from_browser, "rb", 0)
        self._rest, self._number, self._session = b"", 0, ""
        self.problems: list[str] = []
        """What the page's console has as errors, and what its policy has stopped."""
        self.answers: dict[str, str] = {}
        """Bodies that are given to the page in the server's place, by the end of the path."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        number = self._send(method, params)
        while True:
            message = self._receive()
            if message.get("id") == number:
                if "navigated" in message.get("error", {}).get("message", ""):
                    raise Navigated(method)
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def open(self, url: str) -> None:
        """Load a page."""
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && document.querySelector('#figures, body') !== null")

    def run(self, expression: str) -> Any:
        """The value of an expression in the page."""
        told = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """The value, once it is true, on this page or on one that is being loaded."""
        end = time.monotonic() + PATIENCE_S
        while True:
            with suppress(Navigated):
                if value := self.run(expression):
                    return value
                assert time.monotonic() < end, f"{expression}: {self.run('document.body.innerText')}"
            time.sleep(0.05)

    def look(self, *, width: int, is_dark: bool) -> None:
        """A size and a theme."""
        is_phone = width < 600
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": is_phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: Path) -> None:
        """Write what is seen."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def answer_instead(self, path: str, body: str) -> None:
        """Give the page this stream in the server's place."""
        self.answers[path] = body
        self.call("Fetch.enable", patterns=[{"urlPattern": f"*{path}"}])

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif message.get("method") == "Fetch.requestPaused":
            body = next(body for path, body in self.answers.items() if params["request"]["url"].endswith(path))
            headers = [{"name": "content-type", "value": "text/event-stream"}]
            text = base64.b64encode(body.encode()).decode()
            fulfilled = {"requestId": params["requestId"], "responseCode": 200, "responseHeaders": headers}
            self._send("Fetch.fulfillRequest", {**fulfilled, "body": text})

    def _send(self, method: str, params: dict[str, Any]) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        return self._number

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = self._in.read(1 << 16)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        read: dict[str, Any] = json.loads(message)
        return read


@contextmanager
def open_browser(path: str, profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile, and a page in it."""
    (from_us, to_browser), (from_browser, to_us) = os.pipe(), os.pipe()
    command = ("bash", "-c", f'exec "$@" 3<&{from_us} 4>&{to_us}', "bash", path, *OPTIONS, f"--user-data-dir={profile}")
    process = subprocess.Popen(command, pass_fds=(from_us, to_us), stderr=subprocess.DEVNULL)
    os.close(from_us)
    os.close(to_us)
    try:
        yield Browser(to_browser, from_browser)
    finally:
        process.kill()
        process.wait()

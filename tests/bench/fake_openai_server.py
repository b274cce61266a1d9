"""A tiny server that speaks OpenAI's completions protocol over real sockets, well or badly."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeServer:
    """What it was asked, and how it behaves."""

    url: str = ""
    behaviour: str = "well"
    """well | tells ids | no usage | refuses | breaks off | speaks nonsense | says error | fails every third"""
    token_s: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    num_running: int = 0
    most_running: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def fake_openai_server(**options: Any) -> Iterator[FakeServer]:
    """Serves "first" and "second" on a free port."""
    state = FakeServer(**options)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            state.paths.append(self.path)
            state.authorizations.append(self.headers.get("Authorization"))
            if state.behaviour == "speaks nonsense":
                self._answer(b"<html>hello</html>")
            else:
                self._answer(json.dumps({"data": [{"id": "first"}, {"id": "second"}]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.bodies.append(body)
                number = len(state.bodies)
                state.num_running += 1
                state.most_running = max(state.most_running, state.num_running)
            self._is_running = True
            try:
                self._complete(body, number)
            finally:
                self._end()

        def _end(self) -> None:
            with state.lock:
                state.num_running -= self._is_running
                self._is_running = False

        def _complete(self, body: dict[str, Any], number: int) -> None:
            if state.behaviour == "refuses" or (state.behaviour == "fails every third" and number % 3 == 0):
                self.send_error(429, "too many")
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            if state.behaviour == "says error":
                self._event({"error": {"message": "out of pages"}})
                return
            for step in range(body["max_tokens"]):
                time.sleep(state.token_s)
                for index in range(body["n"]):
                    told = {"token_ids": [7 + step]} if state.behaviour == "tells ids" else {}
                    self._event({"choices": [{"index": index, "text": f" {step}", **told}]})
                if state.behaviour == "breaks off" and step == 1:
                    return
            if state.behaviour != "no usage":
                self._event({"choices": [], "usage": {"completion_tokens": body["max_tokens"] * body["n"]}})
            self._end()  # before the last bytes: whoever reads them may send the next request at once
            self.wfile.write(b": a comment\n\ndata: [DONE]\n\n")

        def _event(self, value: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
            self.wfile.flush()

        def _answer(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

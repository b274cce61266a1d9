"""Connections of clients that are slow, odd or many, against the sockets of a server in a thread."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

import pytest

from cascade_llm.server.guard import Receive, Scope, Send
from cascade_llm.server.http_server import ConnectionLimits, HttpServer, most_connections
from tests.patience import PATIENCE_S

GET = b"GET / HTTP/1.1\r\nhost: localhost\r\n"
LIMITS = ConnectionLimits(head_timeout_s=0.3, most=4)


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers POST with how long its body was, and everything else at once."""
    size, is_over = 0, scope["method"] != "POST"
    while not is_over:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message.get("body", b""))
        is_over = not message.get("more_body", False)
    body = str(size).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = HttpServer(application, LIMITS, drain_s=1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)


def told(port: int, parts: Sequence[bytes], pause_s: float = 0.0) -> bytes:
    """What the server says until it closes, while these are sent."""
    with connect(port) as client:
        with suppress(BrokenPipeError, ConnectionResetError):  # it has closed
            for part in parts:
                client.sendall(part)
                time.sleep(pause_s)
        return read_all(client)


def read_all(client: socket.socket) -> bytes:
    said = b""
    with suppress(ConnectionResetError):  # it closed with something unread
        while part := client.recv(1 << 16):
            said += part
    return said


def read_answer(client: socket.socket) -> bytes:
    """A head and the one byte after it, which may come apart."""
    said = b""
    while not said.endswith(b"\r\n\r\n0"):
        part = client.recv(1 << 16)
        assert part, said
        said += part
    return said


def error(answer: bytes) -> tuple[bytes, str]:
    """Status and message of the only answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return head.split()[1], json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([GET, *[b"x: y\r\n"] * 100], id="a head that never ends"),
        pytest.param([GET], id="a head that stops"),
        pytest.param([b"G"], id="one byte"),
    ],
)
def test_a_head_has_its_time(port: int, parts: list[bytes]) -> None:
    status, message = error(told(port, parts, pause_s=0.02))
    assert (status, message) == (b"408", "the headers did not come in 0.3 s")


def test_a_connection_that_says_nothing_is_closed(port: int) -> None:
    assert told(port, []) == b""
    with connect(port) as client:  # nor does one that was answered live on half a head
        client.sendall(GET + b"\r\n")
        assert b" 200 " in read_answer(client)
        client.sendall(GET)
        assert error(read_all(client))[0] == b"408"


def test_a_body_that_goes_on_after_its_answer_keeps_no_connection(port: int) -> None:
    with connect(port) as client:
        client.sendall(b"PUT / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\nx")
        assert b" 200 " in read_answer(client)
        client.sendall(b"y")
        assert client.recv(1 << 16) == b""


@pytest.mark.parametrize("size", [70_000, 10_000_000])
def test_a_head_has_its_length(port: int, size: int) -> None:
    for head in (b"GET /" + b"a" * size + b" HTTP/1.1\r\n\r\n", GET + b"x: " + b"a" * size, GET + b"x: y\r\n" * size):
        answer = told(port, [head[:size]])
        assert answer == b"" or error(answer)[0] in (b"431", b"400")  # a reset may overtake it
    status, message = error(told(port, [GET + b"x: " + b"a" * 60_000, b"a" * 6000]))
    assert (status, message) == (b"431", "the headers are larger than 65536 bytes: shorten them")
    whole = b"".join((GET, *[b"x: " + b"a" * 1000 + b"\r\n"] * 66, b"\r\n"))
    assert error(told(port, [whole]))[0] == b"431"


def test_bodies_and_heads_in_any_parts(port: int) -> None:
    post = b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"
    size = 300_000
    sent = (post % size + b"a" * size) * 2 + GET + b"x: " + b"a" * 60_000 + b"\r\nconnection: close\r\n\r\n"
    for step in (len(sent), 100_001, 65_536, 7777):
        answer = told(port, [sent[first : first + step] for first in range(0, len(sent), step)])
        assert answer.count(b"HTTP/1.1 200 ") == 3
        assert answer.count(b"300000") == 2


def test_what_is_no_http_is_told_so_as_json(port: int) -> None:
    for sent in (b"\x16\x03\x01\x02\x00" * 9, b"hello\r\n\r\n", GET + b"content-length: x\r\n\r\n"):
        status, message = error(told(port, [sent]))
        assert status == b"400"
        assert message.startswith("what came is no HTTP")


def test_one_connection_too_many_is_told_so(port: int) -> None:
    begun = [connect(port) for _ in range(LIMITS.most)]
    status, message = error(told(port, []))
    assert (status, message) == (b"503", "4 connections are open: try again later")
    for client in begun:
        client.close()
    end = time.monotonic() + PATIENCE_S
    while b" 200 " not in told(port, [GET + b"connection: close\r\n\r\n"]):
        assert time.monotonic() < end


def test_files_are_left_for_others() -> None:
    most = most_connections()
    assert 0 < most <= (1 << 16) - 128
    assert most_connections() == most

"""Who asks the engine for the live view, and when: nobody, where nobody listens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from cascade_llm.errors import WorkerError
from cascade_llm.server import sharing_feed
from cascade_llm.server.sharing_feed import SharingFeed


class Engine:
    """Counts what it is asked; answers with that, but where it has `failed` not at all."""

    def __init__(self) -> None:
        self.num_asked, self.failed = 0, False
        self.asked = asyncio.Event()

    async def ask(self) -> dict[str, Any]:
        self.num_asked += 1
        self.asked.set()
        if self.failed:
            raise WorkerError("no answer")
        return {"number": self.num_asked}


def with_engine(monkeypatch: pytest.MonkeyPatch, body: Callable[[SharingFeed, Engine], Awaitable[None]]) -> None:
    monkeypatch.setattr(sharing_feed, "PAUSE_S", 0)

    async def run() -> None:
        engine = Engine()
        await body(SharingFeed(engine.ask), engine)

    asyncio.run(run())


def test_the_engine_is_asked_while_somebody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(feed: SharingFeed, engine: Engine) -> None:
        await asyncio.sleep(0)
        assert engine.num_asked == 0
        first, second = feed.listen(), feed.listen()
        assert await first.get() == await second.get() == b'event: sharing\ndata: {"number":1}\n\n'
        feed.leave(first)
        assert await second.get() is not None
        feed.leave(second)
        num_asked = engine.num_asked
        for _ in range(5):
            await asyncio.sleep(0)
        assert (engine.num_asked, feed.num_listeners, len(asyncio.all_tasks())) == (num_asked, 0, 1)
        third = feed.listen()
        assert f'"number":{num_asked + 1}}}'.encode() in (await third.get() or b"")
        feed.leave(third)

    with_engine(monkeypatch, body)


def test_a_slow_listener_gets_the_newest_and_then_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(feed: SharingFeed, engine: Engine) -> None:
        slow = feed.listen()
        while engine.num_asked < 5:
            engine.asked.clear()
            await engine.asked.wait()
        assert slow.qsize() == 1
        assert int((await slow.get() or b"").split(b":")[-1].rstrip(b"}\n")) >= 4
        feed.close()
        assert await slow.get() is None
        feed.leave(slow)

    with_engine(monkeypatch, body)


def test_an_engine_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(feed: SharingFeed, engine: Engine) -> None:
        engine.failed = True
        listener = feed.listen()
        while engine.num_asked < 3:
            engine.asked.clear()
            await engine.asked.wait()
        assert listener.empty()
        engine.failed = False
        assert await listener.get() is not None
        feed.leave(listener)

    with_engine(monkeypatch, body)

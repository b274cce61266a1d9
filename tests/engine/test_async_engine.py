"""The loop in its own thread: the tokens of `generate`, whoever asks from wherever, and nobody waits for nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from cascade_llm import LLM, SamplingParams
from cascade_llm.engine.async_engine import AsyncEngine
from cascade_llm.engine.output_queue import OutputQueue, RequestGain
from cascade_llm.engine.requests import RequestState
from cascade_llm.errors import EngineClosedError
from cascade_llm.outputs import CompletionDelta
from cascade_llm.scheduler.sequence import Request
from tests.engine.tiny_llm import save_tiny, tiny_llm
from tests.patience import PATIENCE_S

SHARED = [3 + (i * 7) % 80 for i in range(40)]
PROMPTS = [[*SHARED, 5 + i] for i in range(6)]
SHORT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)


class Readers:
    """Takes whatever queues are ready, from any thread, and keeps all of it."""

    def __init__(self) -> None:
        self.gains: dict[str, list[RequestGain]] = {}
        self._told = threading.Condition()

    def __call__(self, queues: Sequence[OutputQueue]) -> None:
        with self._told:
            for queue in queues:
                gain = queue.take()
                assert gain is not None, "told of a queue that is empty"
                self.gains.setdefault(queue.request_id, []).append(gain)
            self._told.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._told:
            assert self._told.wait_for(condition, PATIENCE_S)

    def end_of(self, request_id: str) -> RequestGain:
        self.wait(lambda: any(gain.finished for gain in self.gains.get(request_id, [])))
        assert [gain.finished for gain in self.gains[request_id]].count(True) == 1
        return self.gains[request_id][-1]

    def token_ids(self, request_id: str) -> list[int]:
        self.end_of(request_id)
        return [token for gain in self.gains[request_id] for delta in gain.deltas for token in delta.token_ids]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), num_hidden_layers=1)


@pytest.fixture(params=[0, 1], ids=["lag 0", "lag 1"])
def llm(tiny: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with tiny_llm(tiny, schedule_lag=request.param) as llm:
        yield llm


def ask(name: str, prompt: Sequence[int], params: SamplingParams) -> Request:
    return Request(request_id=name, prompt_token_ids=list(prompt), params=params, seed=1)


def assert_conserved(engine: AsyncEngine, llm: LLM) -> None:
    """Nothing is held once nothing runs."""
    end = time.monotonic() + PATIENCE_S
    while (stats := engine.call(llm.stats).result(PATIENCE_S))["held_pages"] and time.monotonic() < end:
        time.sleep(0.01)
    assert stats["held_pages"] == 0
    assert stats["free_pages"] + stats["cached_pages"] == stats["total_pages"]


def test_requests_of_several_threads_get_the_tokens_of_generate(llm: LLM) -> None:
    expected = [output["token_ids"] for output in llm.generate(PROMPTS, SHORT)]
    readers = Readers()
    with AsyncEngine(llm.engine, readers) as engine:
        threads = [
            threading.Thread(target=engine.add, args=(ask(str(i), prompt, SHORT),)) for i, prompt in enumerate(PROMPTS)
        ]
        for thread in threads:
            thread.start()
        assert [readers.token_ids(str(i)) for i in range(len(PROMPTS))] == expected
        assert readers.gains["0"][0].num_cached_tokens > 0
        assert_conserved(engine, llm)
    assert llm.generate(PROMPTS[0], SHORT)[0]["token_ids"] == expected[0], "the engine goes on after the loop"


def test_what_a_slow_reader_has_not_taken_is_merged(llm: LLM) -> None:
    expected = llm.generate(PROMPTS[0], LONG)[0]["token_ids"]
    readers = Readers()
    slow: list[OutputQueue] = []

    def on_ready(queues: Sequence[OutputQueue]) -> None:
        slow.extend(queue for queue in queues if queue.request_id == "slow")
        readers([queue for queue in queues if queue.request_id != "slow"])

    with AsyncEngine(llm.engine, on_ready) as engine:
        engine.add(ask("slow", PROMPTS[0], LONG))
        engine.add(ask("other", PROMPTS[0], LONG))
        assert readers.token_ids("other") == expected
        assert_conserved(engine, llm)
        assert len(slow) == 1, "told once, as nothing was taken"
        gain = slow[0].take()
    assert gain is not None
    assert (gain.finished, len(gain.deltas), gain.deltas[0].token_ids) == (True, 1, expected)
    assert gain.deltas[0].finish_reason == "length"
    assert slow[0].take() is None


def test_who_wants_the_whole_is_told_once(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, n=2, prompt_logprobs=1)
    (expected,) = llm.generate(PROMPTS[0], params)
    readers = Readers()
    with AsyncEngine(llm.engine, readers) as engine:
        engine.add(ask("whole", PROMPTS[0], params), only_whole=True)
        gain = readers.end_of("whole")
    assert len(readers.gains["whole"]) == 1
    assert [delta.token_ids for delta in gain.deltas] == [output.token_ids for output in expected.outputs]
    assert gain.prompt_logprobs is not None
    assert len(gain.prompt_logprobs) == len(PROMPTS[0])


def test_an_aborted_request_frees_its_pages_and_leaves_the_others(llm: LLM) -> None:
    expected = llm.generate(PROMPTS[1], SHORT)[0]["token_ids"]
    readers = Readers()
    with AsyncEngine(llm.engine, readers) as engine:
        engine.add(ask("left", PROMPTS[0], LONG))
        readers.wait(lambda: "left" in readers.gains)
        engine.abort("left")
        engine.abort("left")
        engine.abort("never there")
        end = readers.end_of("left")
        assert end.deltas[-1].finish_reason == "abort"
        assert_conserved(engine, llm)
        engine.add(ask("next", PROMPTS[1], SHORT))
        assert readers.token_ids("next") == expected


def test_a_failed_step_ends_its_requests_and_the_loop_goes_on(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate(PROMPTS[1], SHORT)[0]["token_ids"]
    readers = Readers()
    with AsyncEngine(llm.engine, readers) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(llm.engine.executor, "submit", lambda plan: 1 / 0)
            engine.add(ask("bad", PROMPTS[0], SHORT))
            assert "division by zero" in str(readers.end_of("bad").error)
        engine.add(ask("twice", PROMPTS[0], LONG))
        engine.add(ask("twice", PROMPTS[0], LONG))
        readers.wait(lambda: any("of this id" in str(gain.error) for gain in readers.gains.get("twice", [])))
        engine.abort("twice")
        engine.add(ask("good", PROMPTS[1], SHORT))
        assert readers.token_ids("good") == expected
        assert engine.failure is None


def test_requests_that_end_outside_of_a_step_are_told(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    readers = Readers()
    with AsyncEngine(llm.engine, readers) as engine:
        engine.add(ask("running", PROMPTS[0], LONG))
        readers.wait(lambda: "running" in readers.gains)
        with monkeypatch.context() as patch:
            patch.setattr(llm.engine.scheduler, "reset_prefix_cache", lambda: 1 / 0)
            engine.call(llm.engine.reset_prefix_cache).result(PATIENCE_S)
        assert "division by zero" in str(readers.end_of("running").error)
        assert_conserved(engine, llm)


def test_the_end_of_the_loop_answers_everybody_at_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    readers = Readers()
    engine = AsyncEngine(llm.engine, readers)
    names = [str(i) for i in range(len(PROMPTS))]
    for name, prompt in zip(names, PROMPTS, strict=True):
        engine.add(ask(name, prompt, LONG))
    readers.wait(lambda: len(readers.gains) == len(PROMPTS))

    def fail() -> list[object]:
        raise SystemExit("no more")

    monkeypatch.setattr(llm.engine, "step", fail)
    assert all("SystemExit: no more" in str(readers.end_of(name).error) for name in names)
    with pytest.raises(EngineClosedError, match="SystemExit: no more"):
        engine.add(ask("late", PROMPTS[0], SHORT))
    assert engine.stalled_s == 0.0
    engine.close()


def test_closing_ends_what_runs(llm: LLM) -> None:
    readers = Readers()
    engine = AsyncEngine(llm.engine, readers)
    engine.add(ask("running", PROMPTS[0], LONG))
    readers.wait(lambda: "running" in readers.gains)
    engine.close()
    engine.close()
    assert readers.end_of("running").error == "the engine was closed"
    with pytest.raises(EngineClosedError):
        engine.call(llm.stats)
    assert llm.stats()["held_pages"] == 0


def test_gains_merge_by_sample() -> None:
    queue = OutputQueue("a")
    assert queue.take() is None
    assert queue.put(RequestGain("a", [CompletionDelta(1, "x", [1])], 3, [None]))
    assert not queue.put(RequestGain("a", [CompletionDelta(0, "y", [2]), CompletionDelta(1, "z", [3], "stop")], 3))
    assert not queue.put(RequestGain("a", [CompletionDelta(0, "", [4], "length")], 3, finished=True))
    gain = queue.take()
    assert gain is not None
    assert gain.deltas == [CompletionDelta(1, "xz", [1, 3], "stop"), CompletionDelta(0, "y", [2, 4], "length")]
    assert (gain.num_cached_tokens, gain.prompt_logprobs, gain.finished) == (3, [None], True)


def test_a_step_that_hangs_is_seen_from_outside(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    readers, go_on, real_step = Readers(), threading.Event(), llm.engine.step

    def hang() -> list[RequestState]:
        assert go_on.wait(PATIENCE_S)
        return real_step()

    with AsyncEngine(llm.engine, readers) as engine:
        assert engine.call(lambda: engine.stalled_s).result(PATIENCE_S) < PATIENCE_S
        monkeypatch.setattr(llm.engine, "step", hang)
        engine.add(ask("hanging", PROMPTS[0], SHORT))
        end = time.monotonic() + PATIENCE_S
        while not engine.stalled_s > 0.05:
            assert time.monotonic() < end
            time.sleep(0.01)
        go_on.set()
        readers.end_of("hanging")
        while engine.stalled_s:
            assert time.monotonic() < end
            time.sleep(0.01)

"""Whatever is raised wherever inside a call of the engine: later requests get the tokens of a fresh engine."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from cascade_llm import LLM, SamplingParams
from cascade_llm.errors import GenerationError, RequestError
from tests.engine.tiny_llm import save_tiny, tiny_llm

SHARED = [3 + (i * 7) % 80 for i in range(40)]
PROBES = [[*SHARED, 11, 12], [*SHARED[:21], 9], SHARED[:5]]
SHORT = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
MANY = SamplingParams(temperature=0.9, seed=4, n=3, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
NUM_PAGES = 26
SOURCES = ("/scheduler/", "/engine/")


class Injected(Exception):
    """Raised in the middle of a call."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[list[int]]:
    with tiny_llm(tiny) as llm:
        return [output["token_ids"] for output in llm.generate(PROBES, SHORT)]


def small_llm(tiny: Path, **options: Any) -> LLM:
    """A pool that a few sequences fill, so that some are preempted."""
    return tiny_llm(
        tiny,
        **{"max_model_len": 96, "max_num_seqs": 5, "kv_cache_bytes": NUM_PAGES * 4 * 128, "debug": False, **options},
    )


KINDS_AND_LAGS = list(product((Injected, KeyboardInterrupt), (0, 1)))


class RaiseAt:
    """Raises at the k-th call of a function of scheduler or engine; counts calls where it raises nothing."""

    def __init__(self, kind: type[BaseException], at: int) -> None:
        self.kind, self.at, self.num_calls = kind, at, 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or not any(part in frame.f_code.co_filename for part in SOURCES):
            return
        self.num_calls += 1
        if self.num_calls == self.at:
            sys.setprofile(None)
            raise self.kind(f"injected in {frame.f_code.co_name}")


def run_batch(llm: LLM, inject: RaiseAt) -> None:
    """Neighbours, several samples, forks, preemptions; what is raised is caught, and everything comes to its end."""
    streams = []
    try:
        sys.setprofile(inject)
        streams.append(llm.stream([*SHARED, 11, 12], LONG))
        streams.append(llm.stream([*SHARED, 13], MANY))
        llm.step()
        streams.append(llm.stream([*SHARED[:20], 5, 6], LONG))
        streams.append(llm.stream([7, 8, 9], MANY))
        for _ in range(14):
            llm.step()
    except (Injected, RequestError, KeyboardInterrupt):  # what fails while a prompt is read is its request's error
        pass
    finally:
        sys.setprofile(None)
    for _ in range(300):
        if all(stream.output.finished for stream in streams):
            break
        llm.step()
    assert all(stream.output.finished for stream in streams), "a neighbour never ends"
    for stream in streams:
        assert stream.output.error is None or isinstance(stream.output.error, GenerationError)


def assert_as_fresh(llm: LLM, expected: list[list[int]]) -> None:
    outputs = llm.generate(PROBES, SHORT)
    assert [output["token_ids"] for output in outputs] == expected
    scheduler = llm.engine.scheduler
    scheduler.check()
    assert not list(scheduler.sequences())
    assert not llm.engine.has_unfinished
    stats = llm.stats()
    assert stats["held_pages"] == stats["waiting_sequences"] == stats["running_sequences"] == 0


def sweep(
    tiny: Path, expected: list[list[int]], kind: type[BaseException], lag: int, points: Callable[[int], range]
) -> None:
    with small_llm(tiny, schedule_lag=lag) as llm:
        counting = RaiseAt(kind, -1)
        run_batch(llm, counting)
        assert llm.stats()["preemptions"] > 0
        assert_as_fresh(llm, expected)
        for at in points(counting.num_calls):
            run_batch(llm, RaiseAt(kind, at))
            assert_as_fresh(llm, expected)


@pytest.mark.parametrize(("turn", "kind", "lag"), [(i, *pair) for i, pair in enumerate(KINDS_AND_LAGS)])
def test_raising_in_the_middle_of_calls(
    tiny: Path, expected: list[list[int]], turn: int, kind: type[BaseException], lag: int
) -> None:
    """In sixty calls, evenly spread: each of the four takes every fourth of them."""
    sweep(tiny, expected, kind, lag, lambda num_calls: range(1 + turn * num_calls // 60, num_calls, num_calls // 15))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "lag"), KINDS_AND_LAGS)
def test_raising_in_every_call(tiny: Path, expected: list[list[int]], kind: type[BaseException], lag: int) -> None:
    sweep(tiny, expected, kind, lag, lambda num_calls: range(1, num_calls))


def test_waiting_requests_keep_their_place(tiny: Path, expected: list[list[int]]) -> None:
    with small_llm(tiny, max_num_seqs=1) as llm:
        running, waiting = llm.stream(PROBES[0], LONG), llm.stream(PROBES[0], SHORT)
        next(running)
        llm.engine.scheduler._planner._cascade.plan_next = _raising  # type: ignore[method-assign]
        llm.engine.scheduler._planner._cascade.plan = _raising  # type: ignore[method-assign]
        with pytest.raises(GenerationError, match="Injected"):
            for _ in running:
                pass
        assert [token for delta in waiting for token in delta.token_ids] == expected[0]


def _raising(*arguments: object) -> Any:
    raise Injected("planning")


def test_an_interrupted_generate_leaves_nothing_behind(tiny: Path, expected: list[list[int]]) -> None:
    with small_llm(tiny) as llm:
        submit = llm.engine.executor.submit

        def interrupted(plan: Any) -> Any:
            if plan.step_id == 3:
                raise KeyboardInterrupt
            return submit(plan)

        llm.engine.executor.submit = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[*SHARED, i] for i in range(5)], MANY)
        assert_as_fresh(llm, expected)


def test_a_failed_step_ends_all_samples_and_no_neighbour(tiny: Path, expected: list[list[int]]) -> None:
    with small_llm(tiny, max_num_seqs=3) as llm:
        submit = llm.engine.executor.submit

        def failing(plan: Any) -> Any:
            if plan.step_id == 3:
                raise Injected("device")
            return submit(plan)

        llm.engine.executor.submit = failing  # type: ignore[method-assign]
        outputs = llm.generate([[*SHARED, 1], PROBES[0]], [MANY, SHORT], on_error="return")
        assert [output.finish_reason for output in outputs[0].outputs] == ["error"] * 3
        assert "Injected: device" in str(outputs[0].error)
        assert outputs[1]["token_ids"] == expected[0]
        assert_as_fresh(llm, expected)


def test_a_text_that_fails_ends_its_own_request_alone(tiny: Path, expected: list[list[int]]) -> None:
    with small_llm(tiny) as llm:
        stream, other = llm.stream([5, 6], LONG), llm.stream(PROBES[0], SHORT)
        stream._state.apply = _raising  # type: ignore[method-assign]
        with pytest.raises(GenerationError, match="Injected"):
            for _ in stream:
                pass
        assert [token for delta in other for token in delta.token_ids] == expected[0]
        assert_as_fresh(llm, expected)


@pytest.mark.slow
def test_a_stream_in_a_cycle_is_ended_by_the_next_call(tiny: Path, expected: list[list[int]]) -> None:
    with small_llm(tiny) as llm:
        other = llm.stream(PROBES[0], SHORT)
        cycle: list[Any] = [llm.stream([5, 6, 7], LONG)]
        next(cycle[0])
        cycle.append(cycle)
        schedule = llm.engine.scheduler.schedule

        def collecting() -> Any:
            plan = schedule()
            gc.collect()  # in the middle of a step, on the thread that holds the lock
            return plan

        llm.engine.scheduler.schedule = collecting  # type: ignore[method-assign]
        del cycle
        assert [token for delta in other for token in delta.token_ids] == expected[0]
        assert llm.stats()["running_sequences"] == 0
        assert_as_fresh(llm, expected)


@pytest.fixture(autouse=True)
def no_profile_left() -> Iterator[None]:
    yield
    sys.setprofile(None)

"""Requests that arrive by the clock: every token has a time, in order; arrivals follow their rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cascade_llm.bench.latency import LatencyReport, LatencyRun, measure_latency, summarize, summary_spread
from cascade_llm.bench.load import Load, LoadRequest
from cascade_llm.bench.online import AllAtOnce, Arrivals, AtConcurrency, AtRate, RequestTiming, run_requests
from cascade_llm.bench.reading import Reading
from cascade_llm.bench.sides import EngineSide
from cascade_llm.bench.workloads import ChatWorkload, Vocabulary
from cascade_llm.errors import ConfigError
from cascade_llm.sampling_params import SamplingParams
from tests.engine.tiny_llm import tiny_llm

LOAD = Load("test", tuple(LoadRequest([*range(3, 20), 30 + i], 3 + i % 2, n=1 + i % 2) for i in range(5)))


@pytest.mark.parametrize("arrivals", [AllAtOnce(), AtRate(200.0, seed=1), AtConcurrency(2)])
def test_every_token_has_a_time(tiny: Path, arrivals: Arrivals) -> None:
    with tiny_llm(tiny) as llm:
        run = run_requests(llm, LOAD, arrivals)
        assert llm.stats()["held_pages"] == 0
    assert run.reading.num_generated == LOAD.num_generated
    for request, timing in zip(LOAD.requests, run.timings, strict=True):
        assert [len(times) for times in timing.token_times_s] == [request.output_len] * request.n
        for times in timing.token_times_s:
            assert timing.arrival_s <= times[0]
            assert times == sorted(times)
            assert times[-1] <= timing.end_s
        assert timing.ttft_s > 0
        assert timing.e2e_s >= timing.ttft_s
        assert len(timing.gaps_s) == request.n * (request.output_len - 1)


def test_concurrency_is_never_exceeded(tiny: Path) -> None:
    with tiny_llm(tiny) as llm:
        timings = run_requests(llm, LOAD, AtConcurrency(2)).timings
    for timing in timings:
        assert sum(other.arrival_s <= timing.arrival_s < other.end_s for other in timings) <= 2


def test_a_rate_gives_times_of_that_mean() -> None:
    times = AtRate(10.0, seed=3).times_s(4000)
    assert times == sorted(times)
    assert times == AtRate(10.0, seed=3).times_s(4000)
    assert times != AtRate(10.0, seed=4).times_s(4000)
    assert 380 < times[-1] < 420


def test_turns_go_on_from_the_answers(tiny: Path) -> None:
    workload = ChatWorkload(conversations=2, turns=3, system_len=12, user_len=4, output_len=3, think_s=0.01)
    load = workload.load(Vocabulary(97))
    with tiny_llm(tiny) as llm:
        timings = run_requests(llm, load, AtRate(500.0)).timings
        for index, request in enumerate(load.requests):
            if request.follows is not None:
                assert timings[index].arrival_s >= timings[request.follows].end_s + request.delay_s
        expected = []
        ids: list[int] = []
        for request in load.requests[::2]:  # the first conversation, greedy
            ids = [*ids, *request.token_ids]
            answer = llm.generate(ids, SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))[0]["token_ids"]
            expected.append(answer)
            ids = [*ids, *answer]
    assert len(ids) == load.longest


def test_recorded_histories_are_the_same_prompts_in_the_same_order(tiny: Path) -> None:
    workload = ChatWorkload(conversations=2, turns=3, system_len=12, user_len=4, output_len=3, think_s=0.0)
    real = workload.load(Vocabulary(97))
    load = real.with_recorded_history()
    assert load.prompt_lens == real.prompt_lens
    for later in (2, 3, 4, 5):
        before = load.requests[later - 2]
        assert load.requests[later].token_ids[:-4] == [*before.token_ids, *before.recorded_answer]
    with tiny_llm(tiny) as llm:
        run = run_requests(llm, load, AtConcurrency(1))
        assert run.reading.num_generated == load.num_generated
        assert run.reading.counters["cached_tokens"] > 0
    assert all(run.timings[i].arrival_s >= run.timings[i - 2].end_s for i in (2, 3, 4, 5))
    with pytest.raises(ConfigError, match="no recorded answers"):
        Load("file", (LoadRequest([1], 2), LoadRequest([2], 2, follows=0))).with_recorded_history()


def test_a_report_has_both_engines_and_is_json(tiny: Path) -> None:
    report = LatencyReport(str(tiny), LOAD, AtRate(500.0))
    with tiny_llm(tiny) as on, tiny_llm(tiny, enable_cascade_attention=False) as off:
        measure_latency(report, [EngineSide("on", on, LOAD), EngineSide("off", off, LOAD)], repeat=2)
    assert {side: len(runs) for side, runs in report.runs.items()} == {"on": 2, "off": 2}
    spread = summary_spread(report.runs["on"], "ttft", 50)
    assert spread is not None
    assert 0 < spread.low <= spread.median <= spread.high
    printed = json.loads(json.dumps(report.as_dict()))
    assert printed["ratio"]["off"]["e2e"]["p99"]["median"] == report.ratios()["off"]["e2e"]["p99"].median > 0
    assert printed["arrivals"] == {"kind": "AtRate", "per_s": 500.0, "seed": 0}
    assert printed["sides"]["off"]["enable_cascade_attention"] is False


def test_ratios_are_of_the_others_over_the_first_turn_by_turn() -> None:
    def run(first_s: float, told: bool = True) -> LatencyRun:
        timings = [RequestTiming(0.0, [[first_s, first_s + 1.0]] if told else [], first_s + 1.0)]
        return LatencyRun.of(timings, Reading(first_s + 1.0, 2))

    report = LatencyReport("a", LOAD, AllAtOnce())
    report.runs = {"on": [run(1.0), run(3.0)], "other": [run(3.0), run(6.0)], "silent": [run(3.0, told=False)] * 2}
    ratio = report.ratio("other", "ttft", 50)
    assert ratio is not None
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.5, 3.0)
    assert summary_spread(report.runs["silent"], "ttft", 50) is None
    assert report.ratio("silent", "itl", "mean") is None
    ratio = report.ratio("silent", "e2e", 99)
    assert ratio is not None
    assert (ratio.low, ratio.high) == (1.0, 2.0)
    assert report.ratios()["silent"]["ttft"] == {}


def test_an_interruption_keeps_whole_turns(tiny: Path) -> None:
    def interrupt(run: str) -> None:
        announced.append(run)
        if len(announced) == 3:
            raise KeyboardInterrupt

    announced: list[str] = []
    report = LatencyReport(str(tiny), LOAD, AllAtOnce())
    with tiny_llm(tiny) as llm:
        measure_latency(report, [EngineSide("on", llm, LOAD)], repeat=3, on_run=interrupt)
        assert llm.stats()["running_sequences"] == 0
    assert report.interrupted
    assert len(report.runs["on"]) == 1


def test_one_token_has_no_gaps(tiny: Path) -> None:
    load = Load("one", (LoadRequest([5, 6], 1),))
    report = LatencyReport(str(tiny), load, AllAtOnce())
    with tiny_llm(tiny) as llm:
        measure_latency(report, [EngineSide("on", llm, load)], repeat=1)
    assert summary_spread(report.runs["on"], "itl", "mean") is None


def test_percentiles_are_values_that_were_seen() -> None:
    summary = summarize([float(value) for value in range(200, 0, -1)])
    assert summary.percentiles == {50: 100.0, 90: 180.0, 99: 198.0}
    assert (summary.mean, summary.highest) == (100.5, 200.0)
    assert summarize([3.0]).percentiles == {50: 3.0, 90: 3.0, 99: 3.0}


def test_timing_counts_from_arrival() -> None:
    timing = RequestTiming(1.0, [[2.0, 3.5], [1.5]], 3.5)
    assert (timing.ttft_s, timing.e2e_s, timing.gaps_s) == (0.5, 2.5, [1.5])


@pytest.mark.parametrize(("make", "words"), [(lambda: AtRate(0.0), "rate"), (lambda: AtConcurrency(0), "concurrency")])
def test_arrivals_out_of_range_are_refused(make: object, words: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=words):
        make()

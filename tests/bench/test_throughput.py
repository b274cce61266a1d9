"""Throughput: what is counted, kept, compared, and what an interruption leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cascade_llm.bench.instruments import STEP_PARTS, timed_parts
from cascade_llm.bench.reading import Reading, Spread, spread_of_ratios
from cascade_llm.bench.setup import BenchModel, open_model, options_for
from cascade_llm.bench.sides import EngineSide
from cascade_llm.bench.throughput import ThroughputReport, compare, decode_tokens_per_s, measure_sides, num_runs
from cascade_llm.bench.workloads import ChatWorkload, RolloutWorkload, SharedPrefixWorkload, Workload
from cascade_llm.errors import CapacityError, ConfigError, ModelNotFoundError
from cascade_llm.sampling_params import SamplingParams
from tests.engine.tiny_llm import tiny_llm

WORKLOAD = SharedPrefixWorkload(prefix_len=40, num_requests=4, suffix_len=4, output_len=6)
OPTIONS = {"dtype": "float32", "page_size": 4, "cascade_shared_prefix_len": 8}


@pytest.fixture(scope="module")
def bench(tiny: Path) -> BenchModel:
    return open_model(str(tiny), OPTIONS)


@pytest.fixture(scope="module")
def report(bench: BenchModel) -> ThroughputReport:
    return compare(bench, bench.load(WORKLOAD), repeat=2)


def test_every_side_has_every_reading(report: ThroughputReport) -> None:
    assert list(report.readings) == ["cascade on", "cascade off"]
    for readings in report.readings.values():
        assert {run: len(of_run) for run, of_run in readings.items()} == {"cold": 2, "first": 2, "warm": 2}
        assert [reading.num_generated for reading in readings["cold"]] == [4 * 6] * 2
        assert [reading.num_generated for reading in readings["first"]] == [4] * 2


def test_counters_tell_cold_from_warm_and_on_from_off(report: ThroughputReport) -> None:
    on, off = report.readings["cascade on"], report.readings["cascade off"]
    assert on["cold"][0].counters["prefilled_tokens"] == 40 + 4 * 4
    assert on["warm"][0].counters["prefilled_tokens"] <= 4 * 4, "prompts are cached but for their last page"
    assert on["warm"][0].counters["kv_bytes_saved"] > 0
    assert on["warm"][0].counters["cascade_steps"] > 0
    assert off["warm"][0].counters["kv_bytes_saved"] == 0
    assert off["warm"][0].counters["cascade_steps"] == 0


def test_the_floor_is_the_work_of_the_steps_at_the_machines_limits(report: ThroughputReport) -> None:
    cold, warm, first = (report.floors[run] for run in ("cold", "warm", "first"))
    assert cold.work.num_steps == warm.work.num_steps == 6
    assert first.work.num_steps == 1
    assert cold.seconds > warm.seconds > first.seconds > 0
    for name, floor in (("cold", cold), ("warm", warm)):
        speed = report.tokens_per_s("cascade on", name).median
        assert report.share_of_limit("cascade on", name) == pytest.approx(speed * floor.seconds / (4 * 6))


def test_a_report_is_json_and_has_all_that_was_chosen(report: ThroughputReport) -> None:
    printed = json.loads(json.dumps(report.as_dict()))
    assert printed["load"]["name"] == "shared-prefix"
    assert printed["sides"]["cascade off"]["enable_cascade_attention"] is False
    assert printed["sides"]["cascade on"]["kv_cache_bytes"] == printed["sides"]["cascade off"]["kv_cache_bytes"]
    assert printed["ratio"]["cascade off"].keys() >= {"cold", "warm"}
    assert printed["machine"]["versions"]["torch"]
    assert printed["limit"]["machine"]["bytes_per_s"] == report.limits.bytes_per_s > 0


def test_the_parts_of_a_step_are_those_of_the_list(report: ThroughputReport) -> None:
    for side, parts in report.step_parts_s.items():
        assert set(parts) <= set(STEP_PARTS)
        assert "all attention" not in parts, "every backend of the CPU tells its levels apart"
        for part in ("planning", "linear", "suffix attention", "sampling"):
            assert parts[part] > 0, (side, part)
        assert (parts["shared attention"] > 0) == (side == "cascade on")


def test_the_clock_covers_the_step_and_leaves_the_engine_as_it_was(tiny: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    prompts = [[*range(3, 30), 40 + i] for i in range(3)]
    with tiny_llm(tiny) as llm:
        expected = [output["token_ids"] for output in llm.generate(prompts, params)]
        before = (
            dict(vars(llm.engine)),
            dict(vars(llm.engine.executor.runner)),
            dict(vars(llm.engine.executor.runner.decoder)),
        )
        with timed_parts(llm) as clock:
            outputs = llm.generate(prompts, params)
        after = (
            dict(vars(llm.engine)),
            dict(vars(llm.engine.executor.runner)),
            dict(vars(llm.engine.executor.runner.decoder)),
        )
    assert [output["token_ids"] for output in outputs] == expected
    assert [parts.keys() for parts in before] == [parts.keys() for parts in after]
    assert after[2]["lm_head"] is before[2]["lm_head"]
    assert clock.num_steps == 4
    assert sum(clock.per_step_s().values()) > 0
    assert all(seconds >= 0 for seconds in clock.per_step_s().values())


def test_rollouts_and_conversations_run_too(bench: BenchModel) -> None:
    rollout = bench.load(RolloutWorkload(prompts=2, samples=3, prompt_len=20, output_len=4))
    chat = bench.load(ChatWorkload(conversations=2, turns=2, system_len=16, user_len=4, output_len=4))
    sampled = compare(bench, rollout, with_off=False, repeat=1, split_steps=False)
    assert sampled.readings["cascade on"]["warm"][0].num_generated == 2 * 3 * 4
    talked = compare(bench, chat, with_off=False, repeat=1, split_steps=False)
    assert set(talked.readings["cascade on"]) == {"cold", "warm"}
    assert talked.readings["cascade on"]["cold"][0].num_generated == 4 * 4
    assert talked.quantities() == ["cold", "warm"]


class InterruptedSide(EngineSide):
    """As if the user had pressed Ctrl-C in its nth run."""

    runs_left = 0

    def _reading(self, run):  # type: ignore[no-untyped-def]
        if self.runs_left == 0:
            raise KeyboardInterrupt
        self.runs_left -= 1
        return super()._reading(run)


@pytest.fixture
def interrupted(tiny: Path, bench: BenchModel) -> Iterator[InterruptedSide]:
    load = bench.load(WORKLOAD)
    side = InterruptedSide("on", tiny_llm(tiny, **options_for(bench, load)), load)
    yield side
    side.close()


def test_an_interruption_keeps_whole_turns(bench: BenchModel, interrupted: InterruptedSide) -> None:
    interrupted.runs_left = 1 + 3 + 2  # the uncounted one, a whole turn, part of the next
    report = ThroughputReport(bench.name, interrupted.load, bench.limits())
    measure_sides(report, [interrupted], bench.shape(), repeat=3)
    assert report.interrupted
    assert {run: len(of_run) for run, of_run in report.readings["on"].items()} == {"cold": 1, "first": 1, "warm": 1}
    assert json.dumps(report.as_dict())


def test_an_interruption_before_the_first_turn_is_one(bench: BenchModel, interrupted: InterruptedSide) -> None:
    interrupted.runs_left = 2
    report = ThroughputReport(bench.name, interrupted.load, bench.limits())
    with pytest.raises(KeyboardInterrupt):
        measure_sides(report, [interrupted], bench.shape(), repeat=3)


def test_decode_is_what_comes_after_the_first_tokens(bench: BenchModel) -> None:
    load = bench.load(WORKLOAD)
    warm, first = [Reading(3.0, 24), Reading(2.0, 24)], [Reading(1.0, 4), Reading(1.0, 4)]
    assert decode_tokens_per_s({"warm": warm, "first": first}, load) == [20 / 2, 20 / 1]
    assert decode_tokens_per_s({"warm": first, "first": warm}, load) == [], "noise, no speed"
    assert decode_tokens_per_s({"warm": warm}, load) == []


def test_ratios_are_taken_turn_by_turn() -> None:
    assert spread_of_ratios([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == Spread(3.0, 2.0, 4.0)


def test_num_runs_counts_what_is_announced(bench: BenchModel) -> None:
    announced: list[str] = []
    load = bench.load(WORKLOAD)
    compare(bench, load, repeat=1, split_steps=False, on_run=announced.append)
    assert len(announced) == num_runs(2, 1, load, with_off=True)


@pytest.mark.parametrize(
    ("options", "workload", "error", "words"),
    [
        ({}, SharedPrefixWorkload(prefix_len=250), ConfigError, "the context holds 256"),
        ({"max_model_len": 64}, SharedPrefixWorkload(prefix_len=60), ConfigError, "the context holds 64"),
        ({"kv_cache_bytes": 1024}, WORKLOAD, CapacityError, "raise kv_cache_bytes"),
        ({"device": "cuda:7"}, WORKLOAD, ConfigError, "CUDA devices"),
        ({"device": "tpu"}, WORKLOAD, ConfigError, "device is 'tpu'"),
        ({"dtyp": "float32"}, WORKLOAD, ConfigError, "did you mean 'dtype'"),
    ],
)
def test_what_cannot_run_is_refused_before_weights_are_read(
    tiny: Path, options: dict[str, object], workload: Workload, error: type[Exception], words: str
) -> None:
    def prepare() -> None:
        model = open_model(str(tiny), options)
        options_for(model, model.load(workload))

    with pytest.raises(error, match=words):
        prepare()


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ModelNotFoundError):
        open_model("no-such-model", {})

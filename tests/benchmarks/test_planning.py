"""What the planning benchmark plans is what its load says; no times are asserted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.planning import PlanningLoad, growth_exponent, measure_planning, planning_sweep
from cascade_llm.errors import ConfigError


def common_len(first: object, second: object) -> int:
    pairs = zip(first, second, strict=False)  # type: ignore[call-overload]
    return next((i for i, (a, b) in enumerate(pairs) if a != b), -1)


def test_prompts_form_a_tree_of_that_many_levels() -> None:
    load = PlanningLoad(num_sequences=64, num_levels=3, context_len=768)
    prompts = load.prompts()
    assert load.prompts() == prompts, "the same seed gives the same prompts"
    assert len({tuple(prompt) for prompt in prompts}) == 64
    assert len({tuple(prompt[:256]) for prompt in prompts}) == 1
    assert len({tuple(prompt[:512]) for prompt in prompts}) == 8
    assert all(704 < len(prompt) <= 768 for prompt in prompts)
    alone = PlanningLoad(num_sequences=8, num_levels=1, context_len=256).prompts()
    assert len({tuple(prompt[:16]) for prompt in alone}) == 8


@pytest.mark.parametrize("num_levels", [1, 2, 3, 4])
def test_times_of_a_small_load(num_levels: int) -> None:
    times = measure_planning(PlanningLoad(num_sequences=96, num_levels=num_levels, context_len=8192), repeat=2)
    assert min(times.unchanged_s, times.joins_s, times.leaves_s, times.step_s) > 0
    assert (times.report.reason is None) == (num_levels > 1)
    assert times.report.num_levels <= num_levels
    if num_levels > 1:
        assert times.report.grouped_rows == 96
    assert times.as_dict()["load"]["num_levels"] == num_levels


def test_growth_of_known_times() -> None:
    times = measure_planning(PlanningLoad(num_sequences=16, num_levels=2, context_len=256), repeat=1)
    grown = [
        replace(times, load=replace(times.load, num_sequences=n), joins_s=1e-6 * n, leaves_s=1e-6 * n**2)
        for n in (16, 64, 1024)
    ]
    assert growth_exponent(grown, "joins_s") == pytest.approx(1)
    assert growth_exponent(grown, "leaves_s") == pytest.approx(2)


def test_sweep_covers_sizes_levels_and_contexts() -> None:
    loads = planning_sweep()
    assert {load.num_sequences for load in loads} == {2**power for power in range(4, 14)}
    assert {load.num_levels for load in loads} == {1, 2, 3, 4}
    assert {load.context_len for load in loads} == {2**power for power in range(12, 18)}


@pytest.mark.parametrize("change", [{"num_sequences": 1}, {"num_levels": 0}, {"num_levels": 5}, {"context_len": 10}])
def test_loads_out_of_range(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        PlanningLoad(**{"num_sequences": 16, **change})

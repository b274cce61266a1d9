"""The goal table: what counts as reached, what is kept, what goes on after an interruption."""

from __future__ import annotations

import json

import pytest

from benchmarks.goals import GOALS, GoalResult, choose_goals
from cascade_llm.bench.reading import Spread
from cascade_llm.errors import ConfigError


def result(**ratios: float) -> GoalResult:
    spreads = {name: Spread(value, value - 0.1, value + 0.1) for name, value in ratios.items()}
    speeds = {name: Spread(100.0, 90.0, 110.0) for name in ratios}
    return GoalResult(
        name="one",
        title="one request",
        tokens_per_s={"cascade on": speeds, "vllm": speeds},
        ratio={"vllm": spreads},
        share_of_limit={"decode": 0.5, "cold": None},
        goal={"decode": 1.2, "cold": None},
        peak_memory_bytes={"vllm": 1000},
    )


def test_reached_is_the_median_at_the_goal_or_above() -> None:
    assert result(decode=1.2).reached("vllm", "decode") is True
    assert result(decode=1.19).reached("vllm", "decode") is False
    assert result(decode=1.3, cold=9.0).reached("vllm", "cold") is None, "no goal"
    assert result(cold=1.3).reached("vllm", "decode") is None, "no reading"
    assert result(decode=1.3).reached("transformers", "decode") is None, "goals are over one engine"


def test_results_are_written_and_read_back() -> None:
    before = result(decode=1.3, cold=1.1)
    assert GoalResult.from_dict(json.loads(json.dumps(before.as_dict()))) == before


def test_loads_are_chosen_by_name_in_the_tables_order() -> None:
    assert list(choose_goals(())) == list(GOALS)
    assert list(choose_goals(("one", "none"))) == ["none", "one"]
    with pytest.raises(ConfigError, match="did you mean '2048x64'"):
        choose_goals(("2048x6",))


def test_the_table_has_the_goals_that_were_set() -> None:
    goals = {name: (goal.decode, goal.cold) for name, goal in GOALS.items() if name != "sampled"}
    assert goals == {
        "none": (1.25, 1.2),
        "512x16": (1.3, 1.2),
        "2048x32": (1.7, 1.6),
        "2048x64": (1.9, 1.7),
        "6144x16": (2.2, 1.8),
        "4x1024": (1.7, 1.5),
        "one": (1.2, None),
    }

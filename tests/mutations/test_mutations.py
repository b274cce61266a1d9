"""Every planted fault is noticed, and nothing is noticed where none is planted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.mutations import fp8_pages, graphs, sampling, window_pools
from tests.mutations.harness import MUTATIONS, SCENARIOS, Mutation, is_noticed

TABLES = (graphs, fp8_pages, sampling, window_pools)
SLOW = {window_pools.POOLS.name}
"""Scenarios that `make test` leaves out."""
Prepared = Callable[[str], tuple[Path, Any]]
OFTEN = 8
"""In `make test` one fault in so many is planted: each takes a second or two, and tells of tests, not of the engine."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The folder and the right results of a scenario, each made once."""
    known: dict[str, tuple[Path, Any]] = {}

    def prepare(name: str) -> tuple[Path, Any]:
        if name not in known:
            folder = SCENARIOS[name].save(tmp_path_factory.mktemp("model"))
            known[name] = folder, SCENARIOS[name].twin(folder)
        return known[name]

    return prepare


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SCENARIOS]
)
def test_nothing_is_noticed_where_nothing_is_broken(name: str, prepared: Prepared) -> None:
    folder, expected = prepared(name)
    with SCENARIOS[name].around():
        assert SCENARIOS[name].run(folder) == expected


@pytest.mark.parametrize(
    "mutation",
    [
        pytest.param(
            mutation,
            marks=pytest.mark.slow if place % OFTEN or mutation.scenario in SLOW else (),
            id=f"{mutation.scenario}: {mutation.rule}",
        )
        for place, mutation in enumerate(MUTATIONS)
    ],
)
def test_breaking_a_rule_is_noticed(mutation: Mutation, prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, expected = prepared(mutation.scenario)
    scenario = SCENARIOS[mutation.scenario]
    with scenario.around():
        mutation.plant(monkeypatch)
        assert is_noticed(lambda: scenario.run(folder), expected), f"unnoticed: {mutation.rule}"


def test_every_table_has_its_scenario() -> None:
    assert {table.__name__.rsplit(".", 1)[1] for table in TABLES} == {"graphs", "fp8_pages", "sampling", "window_pools"}
    assert {mutation.scenario for mutation in MUTATIONS} == SCENARIOS.keys()
    assert len(MUTATIONS) >= 60

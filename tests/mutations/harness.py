"""The registry of planted faults, and what it means that one is noticed.

A *scenario* is a load whose right results come from a twin that knows nothing of the rules. A *mutation* breaks one
rule in the engine; the scenario's run must then fail or differ. A rule whose breach goes unnoticed here would go
unnoticed on a GPU until it gave a wrong token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

__all__ = ["MUTATIONS", "SCENARIOS", "Mutation", "Plant", "Scenario", "is_noticed", "mutations_of", "scenario"]

Plant = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Scenario:
    """A load on a small model."""

    name: str
    save: Callable[[Path], Path]
    """Writes the model's folder."""
    twin: Callable[[Path], Any]
    """The right results of a folder."""
    run: Callable[[Path], Any]
    """Those of the engine on the double."""
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    """What the run is made in."""


class Mutation(NamedTuple):
    """A rule, and how it is broken."""

    rule: str
    scenario: str
    plant: Plant


SCENARIOS: dict[str, Scenario] = {}
MUTATIONS: list[Mutation] = []


def scenario(made: Scenario) -> Scenario:
    """Register a scenario."""
    assert made.name not in SCENARIOS
    SCENARIOS[made.name] = made
    return made


def mutations_of(of: Scenario) -> Callable[[str], Callable[[Plant], Plant]]:
    """A decorator `@mutation("the rule")` for functions that break rules which this scenario is to notice."""

    def mutation(rule: str) -> Callable[[Plant], Plant]:
        def add(plant: Plant) -> Plant:
            assert all((rule, of.name) != known[:2] for known in MUTATIONS), rule
            MUTATIONS.append(Mutation(rule, of.name, plant))
            return plant

        return add

    return mutation


def is_noticed(run: Callable[[], Any], expected: Any) -> bool:
    """Whether a broken run fails or differs.

    A mutation that no longer fits what it replaces is no breach of a rule: its own errors go through.
    """
    try:
        return bool(run() != expected)
    except Exception as error:
        if isinstance(error.__cause__ or error, TypeError | AttributeError | NameError):
            raise
        print(f"{type(error).__name__}: {error}")
        return True

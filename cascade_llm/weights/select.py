"""The one door to weight formats: which one holds a matrix, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from cascade_llm.errors import ConfigError
from cascade_llm.weights.blocked import Blocked
from cascade_llm.weights.dense import Dense
from cascade_llm.weights.format import MatrixSpec, WeightFormat
from cascade_llm.weights.int4 import Int4
from cascade_llm.weights.onednn import OneDNN

__all__ = ["FORMATS", "Entry", "FormatChoice", "allocate_matrix", "select_format"]


@dataclass(frozen=True)
class Entry:
    """A format of the table."""

    format: type[WeightFormat]
    allocate: Callable[[MatrixSpec, Dense | None], WeightFormat]
    """Given the dense matrix that holds the values, where somebody else loads it: a tied embedding."""
    changes_values: bool = False
    """Whether it rounds, and so is taken only where `quantization` names it."""


FORMATS: Mapping[str, Entry] = {
    "int4": Entry(Int4, lambda spec, _: Int4(spec, partial(_unquantized, spec)), changes_values=True),
    "blocked": Entry(Blocked, Blocked),
    "onednn": Entry(OneDNN, OneDNN),
    "dense": Entry(Dense, lambda spec, dense: dense or Dense(spec)),
}
"""By preference."""


@dataclass(frozen=True)
class FormatChoice:
    """The format that holds a matrix, and what speaks against those that were preferred to it."""

    name: str
    refused: tuple[tuple[str, str], ...]
    """(format, reason), one per reason."""

    def describe(self) -> str:
        """One line for the log."""
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in self.refused)
        return f"weights: {self.name}" + (f" ({reasons})" if reasons else "")


def select_format(spec: MatrixSpec) -> FormatChoice:
    """The format that `quantization` names, or else the first that keeps the values and that nothing speaks against.

    Raises:
        ConfigError: the named format cannot hold this matrix; lists the reasons
    """
    wanted = spec.options.quantization
    if wanted is not None:
        if reasons := FORMATS[wanted].format.reasons_against(spec):
            listed = "; ".join(reasons)
            raise ConfigError(f"quantization={wanted!r} cannot serve this model: {listed}; or leave it out")
        return FormatChoice(wanted, ())
    refused: list[tuple[str, str]] = []
    for name, entry in FORMATS.items():
        if entry.changes_values:
            continue
        reasons = entry.format.reasons_against(spec)
        if not reasons:
            return FormatChoice(name, tuple(refused))
        refused.extend((name, reason) for reason in reasons)
    raise AssertionError("dense holds every matrix")


def allocate_matrix(spec: MatrixSpec, dense: Dense | None = None) -> WeightFormat:
    """A matrix without values in its format; over those of `dense` where somebody else loads them.

    Raises:
        ConfigError: the format that `quantization` names cannot hold it
    """
    return FORMATS[select_format(spec).name].allocate(spec, dense)


def _unquantized(spec: MatrixSpec) -> WeightFormat:
    """For the numbers of rows that a quantized format is slower at."""
    return allocate_matrix(replace(spec, options=replace(spec.options, quantization=None)))

"""A step plan as an object of JSON, and back.

What is the same object as in the step before is written as a reference to it, and is the same object again when it is
read: a backend keeps what it derived from a level by the level's identity, and a replay must exercise that too. Where a
level stands in the step before is counted over all its cascades, coarsest level first.

Without token ids every id is left out and reads as 0; lengths are kept. With them go the users' other words: stop
strings, stop ids and biased ids.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from cascade_llm.errors import PlanError, SamplingParamsError
from cascade_llm.plan import (
    CascadeLevel,
    CascadePlan,
    CascadeReport,
    IntColumn,
    LaneStart,
    PageCopy,
    StepPlan,
    Tier,
    int_column,
)
from cascade_llm.sampling_params import SamplingParams

__all__ = ["StepDecoder", "StepEncoder"]

LEVEL_COLUMNS = ("qo_indptr", "kv_page_indptr", "kv_page_indices", "kv_last_page_len")
STEP_COLUMNS = (
    "positions",
    "slots",
    "lane_rows",
    "lane_row_lanes",
    "sequence_lanes",
    "sequence_epochs",
    "sample_rows",
    "sample_lanes",
    "sample_positions",
    "prompt_logprob_rows",
    "prompt_logprob_counts",
)
TOKEN_COLUMNS = {"token_ids": "positions", "prompt_logprob_token_ids": "prompt_logprob_rows"}
"""Columns of token ids, and columns of the same length."""
USERS_WORDS = ("logit_bias", "stop", "stop_token_ids")

Json = Mapping[str, Any]


class StepEncoder:
    """Turns the plans of one engine, in their order, into JSON objects."""

    def __init__(self, *, token_ids: bool) -> None:
        self._token_ids = token_ids
        self._previous: list[CascadeLevel] = []

    def encode(self, plan: StepPlan) -> dict[str, Any]:
        """The object of the next plan."""
        line: dict[str, Any] = {
            "step": plan.step_id,
            "cascades": [self._cascade(cascade) for cascade in plan.cascades],
        }
        self._previous = [level for cascade in plan.cascades for level in cascade.levels]
        for name in (*STEP_COLUMNS, *(TOKEN_COLUMNS if self._token_ids else ())):
            line[name] = getattr(plan, name).tolist()
        line["lane_starts"] = [self._lane_start(start) for start in plan.lane_starts]
        line["page_copies"] = [list(copy) for copy in plan.page_copies]
        line["report"] = asdict(plan.report)
        return line

    def _cascade(self, cascade: CascadePlan) -> dict[str, Any]:
        levels = [self._level(level) for level in cascade.levels]
        return {"page_size": cascade.page_size, "window_len": cascade.window_len, "levels": levels}

    def _level(self, level: CascadeLevel) -> int | dict[str, Any]:
        for place, earlier in enumerate(self._previous):
            if earlier is level:
                return place
        return {name: self._column(name, getattr(level, name)) for name in LEVEL_COLUMNS}

    def _column(self, name: str, column: IntColumn) -> int | list[int]:
        for place, earlier in enumerate(self._previous):
            if getattr(earlier, name) is column:
                return place
        return column.tolist()

    def _lane_start(self, start: LaneStart) -> dict[str, Any]:
        params = {
            field.name: getattr(start.params, field.name)
            for field in fields(SamplingParams)
            if self._token_ids or field.name not in USERS_WORDS
        }
        if self._token_ids:
            params["logit_bias"] = list((start.params.logit_bias or {}).items())
        line = {"lane": start.lane, "epoch": start.epoch, "seed": start.seed, "sample_index": start.sample_index}
        return {
            **line,
            "params": params,
            "prompt": self._ids(start.prompt_token_ids),
            "output": self._ids(start.output_token_ids),
            "ending": sorted(start.ending_token_ids) if self._token_ids else [],
        }

    def _ids(self, token_ids: Sequence[int]) -> list[int] | int:
        return list(token_ids) if self._token_ids else len(token_ids)


class StepDecoder:
    """Turns JSON objects back into plans; the plans are whole in form, `StepPlan.check` is the caller's."""

    def __init__(self, *, token_ids: bool) -> None:
        self._token_ids = token_ids
        self._previous: list[CascadeLevel] = []

    def decode(self, line: Json) -> StepPlan:
        """The plan of the next object; `PlanError` where it is none."""
        try:
            return self._step(line)
        except KeyError as error:
            raise PlanError(f"the field {error} is missing") from None
        except SamplingParamsError as error:
            raise PlanError(f"sampling parameters of a lane: {error}") from None
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"a field has the wrong form: {error}") from None

    def _step(self, line: Json) -> StepPlan:
        cascades = tuple(self._cascade(cascade) for cascade in line["cascades"])
        self._previous = [level for cascade in cascades for level in cascade.levels]
        columns: dict[str, Any] = {name: _column(line[name]) for name in STEP_COLUMNS}
        for name, alike in TOKEN_COLUMNS.items():
            columns[name] = _column(line[name]) if self._token_ids else int_column([0] * len(columns[alike]))
        return StepPlan(
            step_id=_integer(line["step"]),
            cascades=cascades,
            **columns,
            lane_starts=tuple(self._lane_start(start) for start in line["lane_starts"]),
            page_copies=tuple(
                PageCopy(_integer(source), _integer(target), Tier(source_tier), Tier(target_tier))
                for source, target, source_tier, target_tier in line["page_copies"]
            ),
            report=CascadeReport(**line["report"]),
        )

    def _cascade(self, cascade: Json) -> CascadePlan:
        window_len = cascade["window_len"]
        return CascadePlan(
            tuple(self._level(level) for level in cascade["levels"]),
            _integer(cascade["page_size"]),
            None if window_len is None else _integer(window_len),
        )

    def _level(self, level: Json | int) -> CascadeLevel:
        if isinstance(level, int):
            return self._earlier(level)
        return CascadeLevel(**{name: self._level_column(name, level[name]) for name in LEVEL_COLUMNS})

    def _level_column(self, name: str, column: list[int] | int) -> IntColumn:
        if isinstance(column, int):
            earlier: IntColumn = getattr(self._earlier(column), name)
            return earlier
        return _column(column)

    def _earlier(self, place: int) -> CascadeLevel:
        if not 0 <= place < len(self._previous):
            raise PlanError(f"it refers to level {place} of the step before, which has {len(self._previous)}")
        return self._previous[place]

    def _lane_start(self, start: Json) -> LaneStart:
        params = dict(start["params"])
        if self._token_ids:
            params["logit_bias"] = {_integer(token_id): bias for token_id, bias in params["logit_bias"]}
        return LaneStart(
            lane=_integer(start["lane"]),
            epoch=_integer(start["epoch"]),
            params=SamplingParams(**params),
            seed=_integer(start["seed"]),
            sample_index=_integer(start["sample_index"]),
            prompt_token_ids=self._ids(start["prompt"]),
            output_token_ids=self._ids(start["output"]),
            ending_token_ids=frozenset(map(_integer, start["ending"])),
        )

    def _ids(self, recorded: list[int] | int) -> Sequence[int]:
        if self._token_ids:
            return _column(recorded).tolist()
        if not 0 <= _integer(recorded) < 2**31:
            raise PlanError(f"a length is {recorded!r}")
        return (0,) * _integer(recorded)


def _column(values: object) -> IntColumn:
    if not isinstance(values, list):
        raise PlanError(f"a column is {values!r}, not a list of integers")
    return int_column(array("i", values))


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise PlanError(f"{value!r} is no integer")
    return value

"""Rules of sampling in graphs.

The load holds what the rules are about: lanes that are used again while a late row of the sequence before is under way
(sequences end by a token), graphs captured between steps, lanes that need different things in one step, steps sampled
eagerly among captured ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from cascade_llm import SamplingParams
from cascade_llm.plan import LaneStart, StepPlan
from cascade_llm.sampling import logprobs
from cascade_llm.sampling.lane_tables import TokenLists, UsageCounts
from cascade_llm.sampling.lanes import LaneState, Needs
from cascade_llm.worker import graph_sampling
from cascade_llm.worker.graph_sampling import SamplingGraphs
from cascade_llm.worker.step_buffers import HostBuffers, StepBuffers
from tests.doubles.device import DoubleStream
from tests.engine.tiny_llm import random_forest, save_tiny, tiny_llm
from tests.gpu_path.gpu_engine import SHAPE, double_gpu, gpu_llm
from tests.mutations.harness import Scenario, mutations_of, scenario

Results = list[tuple[list[int], list[list[int]], list[int]]]

ENDINGS = list(range(20, 60))
KINDS: list[dict[str, Any]] = [
    {"temperature": 0, "repetition_penalty": 1.8, "logprobs": 3},
    {"temperature": 0, "presence_penalty": -2.0, "frequency_penalty": -2.0, "stop_token_ids": ENDINGS},
    {"temperature": 0, "presence_penalty": -1.5, "repetition_penalty": 3.0},
    {"temperature": 0.9, "frequency_penalty": 2.0, "repetition_penalty": 0.6, "stop_token_ids": ENDINGS},
    {"temperature": 0, "logit_bias": {7: 3.0, 0: 1.0}, "min_tokens": 6, "stop_token_ids": ENDINGS},
    {"temperature": 0.8, "top_k": 9, "min_tokens": 4, "stop_token_ids": ENDINGS},
    {"temperature": 0, "stop_token_ids": ENDINGS},
]
PROMPTS = random_forest(2, 28, 90, 40)
PARAMS = [SamplingParams(**{"seed": i, "max_tokens": 6 + 4 * (i % 4), **KINDS[i % 7]}) for i in range(28)]
PARAMS[17] = SamplingParams(temperature=0, max_tokens=4, logprobs=30)
"""More than graphs report: the steps of this one are sampled eagerly."""
OPTIONS: dict[str, Any] = {"max_num_seqs": 5}


def results(llm: Any) -> Results:
    """Tokens, the most probable ones, and the ranks, of each request."""
    outputs = [output.outputs[0] for output in llm.generate(PROMPTS, PARAMS)]
    return [
        (
            list(output.token_ids),
            [[token for token, _ in report.top] for report in output.logprobs or ()],
            [report.rank for report in output.logprobs or ()],
        )
        for output in outputs
    ]


def run(folder: Path, **options: Any) -> Results:
    with gpu_llm(folder, double_gpu(), **OPTIONS, **options) as llm:
        return results(llm)


def expected(folder: Path) -> Results:
    """By torch on the CPU."""
    with tiny_llm(folder, **OPTIONS) as llm:
        return results(llm)


SAMPLING = scenario(Scenario("sampling", partial(save_tiny, architecture="qwen3", **SHAPE), expected, run))
WITHOUT_LAG = scenario(replace(SAMPLING, name="sampling without lag", run=partial(run, schedule_lag=0)))
mutation = mutations_of(SAMPLING)


# -- token counts -----------------------------------------------------------------------------------------------------


@mutation("counts are updated from the token that was sampled")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(UsageCounts, "note", lambda self, lanes, tokens: None)


@mutation("a lane begins with the counts of its own sequence")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(UsageCounts, "_start_row", lambda self, row, start: None)


@mutation("a lane that is entered is cleared")
def _(patch: pytest.MonkeyPatch) -> None:
    def on_top(self: UsageCounts, row: torch.Tensor, start: LaneStart) -> None:
        row[torch.tensor(sorted(set(start.prompt_token_ids)))] |= 1

    patch.setattr(UsageCounts, "_start_row", on_top)


@mutation("a lane is entered behind the steps that used it before")
def _(patch: pytest.MonkeyPatch) -> None:
    original = LaneState.start

    def overtaking(self: LaneState, starts: Sequence[LaneStart]) -> None:
        """As if on another stream: what is queued writes over it."""
        upload = self._upload
        self._upload = self.usage._upload = self.lists._upload = lambda values: values
        with _disable_current_modes(), torch.inference_mode():
            original(self, starts)
        self._upload = self.usage._upload = self.lists._upload = upload

    patch.setattr(LaneState, "start", overtaking)


@mutation("the prompt counts for repetition")
def _(patch: pytest.MonkeyPatch) -> None:
    original = UsageCounts._start_row

    def outputs_alone(self: UsageCounts, row: torch.Tensor, start: LaneStart) -> None:
        original(self, row, start)
        row &= ~1

    patch.setattr(UsageCounts, "_start_row", outputs_alone)


@mutation("the prompt does not count for presence and frequency")
def _(patch: pytest.MonkeyPatch) -> None:
    original = UsageCounts._start_row

    def prompt_too(self: UsageCounts, row: torch.Tensor, start: LaneStart) -> None:
        original(self, row, start)
        row *= 2

    patch.setattr(UsageCounts, "_start_row", prompt_too)


@mutation("penalties are those of the sequence in the lane")
def _(patch: pytest.MonkeyPatch) -> None:
    original = UsageCounts.start

    def penalized_alone(self: UsageCounts, starts: Sequence[LaneStart]) -> None:
        if penalized := [start for start in starts if start.params.has_penalties]:
            original(self, penalized)

    patch.setattr(UsageCounts, "start", penalized_alone)


@mutation("steps that are sampled eagerly are counted too")
def _(patch: pytest.MonkeyPatch) -> None:
    original = LaneState.record

    def uncounted(self: LaneState, lanes: Sequence[int], tokens: torch.Tensor) -> None:
        counts = self.usage.allocate().clone()
        original(self, lanes, tokens)
        self.usage.allocate().copy_(counts)

    patch.setattr(LaneState, "record", uncounted)


@mutation("repetition comes before presence and frequency")
def _(patch: pytest.MonkeyPatch) -> None:
    original = UsageCounts.penalize

    def reversed_order(self: UsageCounts, logits: torch.Tensor, lanes: torch.Tensor) -> None:
        penalties = self.penalties.clone()
        self.penalties[:, 2].fill_(1.0)
        original(self, logits, lanes)
        self.penalties.copy_(penalties)
        self.penalties[:, :2].fill_(0.0)
        original(self, logits, lanes)
        self.penalties.copy_(penalties)

    patch.setattr(UsageCounts, "penalize", reversed_order)


# -- lists ------------------------------------------------------------------------------------------------------------


@mutation("lists are set when a sequence enters its lane")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TokenLists, "set", lambda self, lane, bias, endings, ends_from: None)


@mutation("a lane's list goes with its sequence")
def _(patch: pytest.MonkeyPatch) -> None:
    original = TokenLists.set

    def kept(self: TokenLists, *arguments: Any) -> None:
        self._used.clear()
        original(self, *arguments)

    patch.setattr(TokenLists, "set", kept)


@mutation("endings are hidden by the place of the token to come")
def _(patch: pytest.MonkeyPatch) -> None:
    original = TokenLists.apply
    patch.setattr(
        TokenLists, "apply", lambda self, logits, lanes, positions: original(self, logits, lanes, positions - 1)
    )


@mutation("a list is padded by what changes nothing")
def _(patch: pytest.MonkeyPatch) -> None:
    original = TokenLists._set_row

    def by_token_0(self: TokenLists, table: torch.Tensor, lane: int, values: Sequence[float], padding: float) -> None:
        original(self, table, lane, values, 0)

    patch.setattr(TokenLists, "_set_row", by_token_0)


# -- log-probabilities ------------------------------------------------------------------------------------------------


@mutation("log-probabilities are the raw model's")
def _(patch: pytest.MonkeyPatch) -> None:
    original = graph_sampling.choose

    def in_place(needs: Needs, logits: torch.Tensor, *rest: Any, **options: Any) -> Any:
        chosen = original(needs, logits, *rest, **options)
        logits[:, :50] -= 5.0
        return chosen

    patch.setattr(graph_sampling, "choose", in_place)


@mutation("the rank is the chosen token's")
def _(patch: pytest.MonkeyPatch) -> None:
    original = graph_sampling.report
    patch.setattr(
        graph_sampling, "report", lambda logits, token_ids, num_top: original(logits, logits.argmax(-1), num_top)
    )


@mutation("the most probable come first")
def _(patch: pytest.MonkeyPatch) -> None:
    original = logprobs.most_probable

    def by_id(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, largest = original(values, count)
        return ids.sort(-1).values, largest

    patch.setattr(logprobs, "most_probable", by_id)


@mutation("reports are copied behind the graph that writes them")
def _(patch: pytest.MonkeyPatch) -> None:
    original = SamplingGraphs.replay

    def before(
        self: SamplingGraphs, plan: StepPlan, rows: int, features: Any, host: HostBuffers, places: Sequence[int]
    ) -> Any:
        read = host.logprobs, host.logprob_ids
        self._stream.copy(read[0], self._logprobs)
        self._stream.copy(read[1], self._logprob_ids)
        host.logprobs, host.logprob_ids = (self._stream.pinned(x.numel(), x.dtype).view_as(x) for x in read)
        result = original(self, plan, rows, features, host, places)
        host.logprobs, host.logprob_ids = read
        return result

    patch.setattr(SamplingGraphs, "replay", before)


# -- which graph, and when --------------------------------------------------------------------------------------------


@mutation("a step takes a graph that does what all its lanes need")
def _(patch: pytest.MonkeyPatch) -> None:
    original = LaneState.needs
    patch.setattr(LaneState, "needs", lambda self, lanes: original(self, lanes[:1]))


@mutation("what one lane asks for beyond any graph is sampled eagerly")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SamplingGraphs, "_needs", lambda self, lanes: self._lanes.needs(lanes))


@mutation("what a lane needs is noted anew with each sequence")
def _(patch: pytest.MonkeyPatch) -> None:
    original = LaneState.start
    seen: set[int] = set()

    def once(self: LaneState, starts: Sequence[LaneStart]) -> None:
        before = self._needs.copy()
        original(self, starts)
        for lane in seen.intersection(start.lane for start in starts):
            self._needs[lane] = before[lane]
        seen.update(start.lane for start in starts)

    patch.setattr(LaneState, "start", once)


@mutation("a late capture runs on rows of padding")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StepBuffers, "send_padding", lambda self, rows: None)


@mutation("a late capture takes no host from the steps")
def _(patch: pytest.MonkeyPatch) -> None:
    original = StepBuffers.next_host

    def taken(self: StepBuffers) -> HostBuffers:
        host = original(self)
        self._next = (self._next + 1) % 2
        return host

    def take_host(self: StepBuffers) -> HostBuffers:
        return taken(self)

    patch.setattr(StepBuffers, "take_host", take_host)
    patch.setattr(StepBuffers, "next_host", taken)


@mutation("a late capture comes before the step's columns are sent")
def _(patch: pytest.MonkeyPatch) -> None:
    original = SamplingGraphs.prepared

    def unprepared(self: SamplingGraphs, plan: StepPlan, rows: int) -> Any:
        return self._needs(plan.sample_lanes)

    replay = SamplingGraphs.replay

    def preparing(
        self: SamplingGraphs, plan: StepPlan, rows: int, features: Any, host: HostBuffers, places: Sequence[int]
    ) -> Any:
        original(self, plan, rows)
        return replay(self, plan, rows, features, host, places)

    patch.setattr(SamplingGraphs, "prepared", unprepared)
    patch.setattr(SamplingGraphs, "replay", preparing)


@mutation("everything runs once before a late capture")
def _(patch: pytest.MonkeyPatch) -> None:
    def cold(self: SamplingGraphs, rows: int, needs: Needs) -> None:
        work = (lambda: self._report(rows)) if needs is Needs.REPORT else (lambda: self._choose(rows, needs))
        self._graphs[rows, needs] = self._stream.capture(work)

    patch.setattr(SamplingGraphs, "_capture", cold)


@mutation("the host reads nothing while sampling is captured")
def _(patch: pytest.MonkeyPatch) -> None:
    original = graph_sampling.choose

    def reading(needs: Needs, logits: torch.Tensor, *rest: Any, **options: Any) -> Any:
        chosen = original(needs, logits, *rest, **options)
        assert int(chosen[0].max()) >= 0
        return chosen

    patch.setattr(graph_sampling, "choose", reading)


@mutation("uploads are not written over while they are in flight")
def _(patch: pytest.MonkeyPatch) -> None:
    buffers: dict[torch.dtype, torch.Tensor] = {}

    def through_one_buffer(self: DoubleStream, values: torch.Tensor) -> torch.Tensor:
        host = buffers.setdefault(values.dtype, self.pinned(1 << 12, values.dtype))[: values.numel()]
        host.copy_(values.flatten())
        copy = torch.empty(values.shape, dtype=values.dtype)
        self.copy(copy.view(-1), host)
        return copy

    patch.setattr(DoubleStream, "upload", through_one_buffer)


@mutations_of(WITHOUT_LAG)("where the host has a row's token, its lane has none: no lane is that of padding rows")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LaneState, "no_lane", property(lambda self: self.num_lanes - 1))

"""How long planning takes, and how it grows with running sequences, levels and context.

Planning is pure Python in one thread, so it is timed in CPU seconds: what else the machine does hardly matters.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from cascade_llm.config import MAX_CASCADE_LEVELS, CascadeConfig, SchedulerConfig
from cascade_llm.errors import ConfigError
from cascade_llm.plan import CascadeReport, StepResult
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.cascade.cost_model import AttentionShape, CostModel
from cascade_llm.scheduler.cascade.device_costs import DEVICE_COSTS
from cascade_llm.scheduler.cascade.planner import CascadePlanner
from cascade_llm.scheduler.cascade.tree import PlannedRows
from cascade_llm.scheduler.page_keys import root_key
from cascade_llm.scheduler.pages import PageTables
from cascade_llm.scheduler.scheduler import FlashInferScheduler
from cascade_llm.scheduler.sequence import Request
from cascade_llm.scheduler.sequence import Sequence as TokenSequence

__all__ = ["PlanningLoad", "PlanningTimes", "growth_exponent", "measure_planning", "planning_sweep"]

PAGE_SIZE = 16
VOCAB_SIZE = 1 << 16
SHAPE = AttentionShape(num_qo_heads=32, num_kv_heads=8, head_dim=128, kv_dtype_bytes=2)
"""Of an 8B model; a plan's price depends on it, planning time hardly."""


@dataclass(frozen=True, kw_only=True)
class PlanningLoad:
    """Sequences whose prompts form a tree: each level above the suffix divides them into more groups.

    With L levels a prompt has L parts of about equal length. All n sequences share the first, n ** (1 - l / (L - 1))
    of them on average part l, and nobody the last. One level: nobody shares anything.
    """

    num_sequences: int
    num_levels: int = 3
    context_len: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_sequences < 2:
            raise ConfigError(f"num_sequences is {self.num_sequences}: planning needs 2 or more")
        if not 1 <= self.num_levels <= MAX_CASCADE_LEVELS:
            raise ConfigError(f"num_levels is {self.num_levels}: it must be 1 to {MAX_CASCADE_LEVELS}")
        if self.context_len < 4 * PAGE_SIZE * self.num_levels:
            raise ConfigError(f"context_len is {self.context_len}: give {4 * PAGE_SIZE} tokens or more for each level")

    def prompts(self) -> list[array[int]]:
        """Token ids; the last parts differ in length, so that sequences begin pages in different steps."""
        draw = random.Random(self.seed)
        parts: dict[tuple[int, int], array[int]] = {}
        prompts = []
        for index in range(self.num_sequences):
            prompt = array("i")
            for level in range(self.num_levels - 1):
                num_groups = round(self.num_sequences ** (level / (self.num_levels - 1)))
                group = level, index * num_groups // self.num_sequences
                if group not in parts:
                    parts[group] = _tokens(draw, self._part_len)
                prompt += parts[group]
            prompts.append(prompt + _tokens(draw, self._part_len - draw.randrange(2 * PAGE_SIZE)))
        draw.shuffle(prompts)
        return prompts

    @property
    def _part_len(self) -> int:
        return self.context_len // self.num_levels


@dataclass(frozen=True, kw_only=True)
class PlanningTimes:
    """Medians, in CPU seconds."""

    load: PlanningLoad
    unchanged_s: float
    """The cascade plan of a decode step after one of the same sequences."""
    joins_s: float
    """The same after one sequence came."""
    leaves_s: float
    """The same after one sequence went."""
    step_s: float
    """All that the scheduler does for a decode step of the same sequences: `schedule` and `commit`."""
    report: CascadeReport
    """What the plan shares."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def planning_sweep(*, max_sequences: int = 8192, max_context_len: int = 131072, seed: int = 0) -> list[PlanningLoad]:
    """Loads of 1 to 4 levels: 16 sequences and more at 4,096 tokens, then 256 sequences at longer contexts."""
    if max_sequences < 16 or max_context_len < 4096:
        raise ConfigError("a sweep begins at 16 sequences and 4,096 tokens: raise --max-sequences or --max-context-len")
    num_sequences = [2**power for power in range(4, 14) if 2**power <= max_sequences]
    context_lens = [2**power for power in range(13, 18) if 2**power <= max_context_len]
    levels = range(1, MAX_CASCADE_LEVELS + 1)
    by_sequences = [
        PlanningLoad(num_sequences=count, num_levels=num_levels, context_len=4096, seed=seed)
        for num_levels in levels
        for count in num_sequences
    ]
    by_context = [
        PlanningLoad(num_sequences=min(256, max_sequences), num_levels=num_levels, context_len=length, seed=seed)
        for num_levels in levels
        for length in context_lens
    ]
    return by_sequences + by_context


def measure_planning(load: PlanningLoad, *, repeat: int = 15) -> PlanningTimes:
    """Plan decode steps of a load; `repeat` times each kind."""
    if repeat < 1:
        raise ConfigError(f"repeat is {repeat}: it must be 1 or larger")
    prompts = load.prompts()
    running = _Running(load, prompts)
    running.plan()
    gc.disable()  # else a collection of the whole heap falls into some of the timed calls
    try:
        leaves_s, joins_s, unchanged_s = [], [], []
        for _ in range(repeat):
            running.leave()
            leaves_s.append(_cpu_s(running.plan))
            running.join()
            joins_s.append(_cpu_s(running.plan))
        for _ in range(max(repeat, PAGE_SIZE)):  # each sequence begins a page in one step of a page size
            unchanged_s.append(_cpu_s(partial(running.planner.plan_next, running.go_on())))
        return PlanningTimes(
            load=load,
            unchanged_s=statistics.median(unchanged_s),
            joins_s=statistics.median(joins_s),
            leaves_s=statistics.median(leaves_s),
            step_s=_step_s(load, prompts, max(repeat, PAGE_SIZE)),
            report=running.report,
        )
    finally:
        gc.enable()


def growth_exponent(times: Sequence[PlanningTimes], field: str) -> float:
    """The slope of log time over log sequences, by least squares: 1 is linear growth."""
    points = [(math.log(t.load.num_sequences), math.log(getattr(t, field))) for t in times]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


class _Running:
    """Sequences in decode, whose planner is called as the scheduler does."""

    def __init__(self, load: PlanningLoad, prompts: Sequence[array[int]]) -> None:
        num_pages = sum(-(-len(prompt) // PAGE_SIZE) + 8 for prompt in prompts)
        self._tables = PageTables(2 * num_pages, PAGE_SIZE, keep_unheld=True)
        cascade = CascadeConfig(max_levels=MAX_CASCADE_LEVELS)
        self.planner = CascadePlanner(
            PAGE_SIZE, cascade, CostModel(SHAPE, DEVICE_COSTS["h200"]), self._tables.cache.root
        )
        self._draw = random.Random(load.seed)
        self._sequences: list[TokenSequence] = []
        self.report = CascadeReport()
        for prompt in prompts:
            self._admit(prompt)

    def plan(self) -> None:
        """A decode step, planned from the sequences."""
        rows = [PlannedRows(s, s.planned_len, 1, (s,)) for s in self._sequences]
        planned = self.planner.plan(rows)
        self._order, self.report = planned.order, planned.report

    def leave(self) -> None:
        """One sequence ends."""
        self._last_gone = self._sequences.pop(self._draw.randrange(len(self._sequences)))
        self._tables.release(self._last_gone)

    def join(self) -> None:
        """The one that ended last comes again."""
        self._admit(self._last_gone.token_ids)

    def go_on(self) -> list[tuple[int, int]]:
        """Every sequence gets a token more; returns the new pages as `plan_next` takes them."""
        beginning = []
        for segment, index in enumerate(self._order):
            sequence = self._sequences[index]
            sequence.planned_len += 1
            if sequence.planned_len % PAGE_SIZE == 0:
                beginning.append((segment, sequence))
        pages = self._tables.extend([sequence for _, sequence in beginning])
        assert pages is not None
        return [(segment, page) for (segment, _), page in zip(beginning, pages, strict=True)]

    def _admit(self, prompt: array[int]) -> None:
        request = Request(request_id="", prompt_token_ids=prompt, params=SamplingParams(), seed=0)
        sequence = TokenSequence(request, 0, 0, PAGE_SIZE, root_key())
        self._tables.admit(sequence, self._tables.match(sequence))
        reserved = self._tables.reserve(sequence, len(prompt) + 1)
        assert reserved is not None
        self._tables.publish_planned(sequence, len(prompt))
        sequence.planned_len = len(prompt)
        self._sequences.append(sequence)


def _step_s(load: PlanningLoad, prompts: Sequence[array[int]], num_steps: int) -> float:
    """The scheduler's own time of a decode step."""
    num_tokens = sum(map(len, prompts))
    config = SchedulerConfig(
        page_size=PAGE_SIZE,
        total_pages=num_tokens // PAGE_SIZE + (8 + num_steps) * len(prompts),
        max_model_len=2 * load.context_len,
        max_num_seqs=len(prompts),
        max_num_batched_tokens=num_tokens,
        cascade=CascadeConfig(max_levels=MAX_CASCADE_LEVELS),
    )
    scheduler = FlashInferScheduler(config, CostModel(SHAPE, DEVICE_COSTS["h200"]))
    params = SamplingParams(max_tokens=load.context_len, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        scheduler.add(Request(request_id=str(index), prompt_token_ids=prompt, params=params, seed=0))

    token_ids = random.Random(load.seed).choices(range(VOCAB_SIZE), k=len(prompts))

    def step() -> None:
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.commit(plan, StepResult(step_id=plan.step_id, token_ids=token_ids))

    step()
    step()
    return statistics.median([_cpu_s(step) for _ in range(num_steps)])


def _cpu_s(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def _tokens(draw: random.Random, count: int) -> array[int]:
    return array("i", array("H", draw.randbytes(2 * count)))

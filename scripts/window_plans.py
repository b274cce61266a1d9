"""What decode steps of attention kinds with windows read and cost to plan; of the scheduler alone, without a model.

python scripts/window_plans.py          tokens of K/V of a windowed layer, shared and by each sequence alone
python scripts/window_plans.py --time   processor time of planning a decode step of 256 sequences
"""

from __future__ import annotations

import gc
import sys
import time

from cascade_llm.config import SchedulerConfig
from cascade_llm.plan import CascadePlan, StepPlan, StepResult
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.cascade.choice import TokensRead
from cascade_llm.scheduler.scheduler import FlashInferScheduler
from cascade_llm.scheduler.sequence import Request

PAGE_SIZE, NUM_STEPS = 16, 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=20_000)
LOADS: list[tuple[str, tuple[int | None, ...], int, int]] = [
    ("Mistral, 4,096", (4096,), 8000, 200),
    ("Mistral, 4,096", (4096,), 8000, 2000),
    ("Gemma 2, 4,096", (None, 4096), 6000, 200),
    ("Gemma 3, 1,024", (None, 1024), 2000, 200),
    ("gpt-oss, 128", (None, 128), 2000, 40),
    ("gpt-oss, 128", (None, 128), 2000, 200),
]
"""Windows, tokens of the prefix, and tokens of the first sequence's own; each of the others has one more."""


def started(kinds: tuple[int | None, ...], prompts: list[list[int]]) -> FlashInferScheduler:
    """A scheduler whose sequences all decode."""
    config = SchedulerConfig(
        page_size=PAGE_SIZE,
        total_pages=300_000,
        max_model_len=32_768,
        max_num_seqs=len(prompts),
        max_num_batched_tokens=1_000_000,
        attention_kinds=kinds,
        layer_kinds=tuple(range(len(kinds))),
    )
    scheduler = FlashInferScheduler(config, TokensRead())
    for i, prompt in enumerate(prompts):
        scheduler.add(Request(request_id=str(i), prompt_token_ids=prompt, params=GREEDY, seed=1))
    commit(scheduler, planned(scheduler))
    return scheduler


def planned(scheduler: FlashInferScheduler) -> StepPlan:
    """The next step."""
    plan = scheduler.schedule()
    assert plan is not None
    return plan


def commit(scheduler: FlashInferScheduler, plan: StepPlan) -> None:
    """Any token for every sequence."""
    scheduler.commit(plan, StepResult(step_id=plan.step_id, token_ids=[5] * len(plan.sample_rows)))


def tokens_read(cascade: CascadePlan) -> int:
    """Over all segments."""
    return sum(level.kv_len(i, cascade.page_size) for level in cascade.levels for i in range(level.num_segments))


def compare_reads() -> None:
    """A table of the loads."""
    for name, kinds, prefix, own in LOADS:
        scheduler = started(kinds, [[7] * prefix + [1000 + i] * (own + i) for i in range(64)])
        shared = alone = 0
        for _ in range(NUM_STEPS):
            plan = planned(scheduler)
            cascade = plan.cascades[-1]
            assert cascade.window_len is not None
            shared += tokens_read(cascade)
            ends = [position + 1 for position in plan.positions]
            alone += sum(end - max(0, end - cascade.window_len) // PAGE_SIZE * PAGE_SIZE for end in ends)
            commit(scheduler, plan)
        a, b = alone / NUM_STEPS, shared / NUM_STEPS
        print(f"{name}: {prefix} + {own} to {own + 63}: {a:,.0f} alone, {b:,.0f} shared, {a / b:.1f}x")


def time_planning() -> None:
    """Microseconds a step, from the one before where that is possible; nothing else is timed."""
    prompts = [[i % 8] * 1024 + [100 + i % 8] * 256 + [1000 + i] * (20 + i // 8) for i in range(256)]
    kinds_of_models: list[tuple[int | None, ...]] = [(None,), (None, 1024), (None, 4096), (1024,)]
    for kinds in kinds_of_models:
        scheduler = started(kinds, prompts)
        total_s = 0.0
        gc.disable()
        for _ in range(300):
            begun = time.process_time()
            plan = planned(scheduler)
            total_s += time.process_time() - begun
            commit(scheduler, plan)
        gc.enable()
        print(f"{kinds}: {total_s / 300 * 1e6:.0f} us")


if __name__ == "__main__":
    time_planning() if "--time" in sys.argv[1:] else compare_reads()

"""The story of claude_docs/cascade_plan.md, run."""

from __future__ import annotations

from cascade_llm.config import CascadeConfig, SchedulerConfig
from cascade_llm.plan import CascadeLevel, StepPlan, StepResult
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.cascade.choice import TokensRead
from cascade_llm.scheduler.scheduler import FlashInferScheduler
from cascade_llm.scheduler.sequence import Request

SYSTEM, DOCUMENT = list(range(100, 108)), list(range(200, 204))


def columns(level: CascadeLevel) -> tuple[list[int], ...]:
    return tuple(
        column.tolist()
        for column in (level.qo_indptr, level.kv_page_indptr, level.kv_page_indices, level.kv_last_page_len)
    )


def test_three_requests_through_three_steps() -> None:
    config = SchedulerConfig(
        page_size=4,
        total_pages=20,
        max_model_len=40,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        cascade=CascadeConfig(max_levels=3, shared_prefix_len=4),
    )
    scheduler = FlashInferScheduler(config, TokensRead())
    for name, own in (
        ("r0", [*DOCUMENT, 10, 11, 12]),
        ("r1", [*DOCUMENT, 20, 21]),
        ("r2", [30, 31, 32, 33, 34]),
    ):
        prompt = SYSTEM + own
        scheduler.add(Request(request_id=name, prompt_token_ids=prompt, params=SamplingParams(max_tokens=4), seed=0))

    def step() -> StepPlan:
        plan = scheduler.schedule()
        assert plan is not None
        plan.check()
        scheduler.commit(plan, StepResult(step_id=plan.step_id, token_ids=[50 + plan.step_id] * 3))
        return plan

    prefill = step()
    assert prefill.num_rows == 22
    assert [columns(level) for level in prefill.cascade.levels] == [
        ([0, 7, 22], [0, 2, 2], [0, 1], [4, 0]),
        ([0, 2, 7, 22], [0, 2, 4, 8], [2, 4, 5, 6, 0, 1, 2, 3], [2, 1, 3]),
    ]
    assert (prefill.report.kv_tokens_read, prefill.report.kv_tokens_one_level) == (34, 42)

    decode = step()
    assert [columns(level) for level in decode.cascade.levels] == [
        ([0, 3], [0, 2], [0, 1], [4]),
        ([0, 2, 3], [0, 1, 1], [2], [4, 0]),
        ([0, 1, 2, 3], [0, 1, 2, 4], [3, 4, 5, 6], [4, 3, 2]),
    ]
    assert (decode.report.kv_tokens_read, decode.report.kv_tokens_one_level) == (25, 45)
    assert decode.report.num_groups == 2

    crossing = step()
    assert crossing.cascade.levels[0] is decode.cascade.levels[0]
    assert crossing.cascade.levels[1] is decode.cascade.levels[1]
    assert columns(crossing.cascade.leaf) == ([0, 1, 2, 3], [0, 2, 3, 5], [3, 7, 4, 5, 6], [1, 4, 3])

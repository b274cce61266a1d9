"""Look at a cascade plan: drive the scheduler alone, without a model, and print what each level reads."""

from __future__ import annotations

from cascade_llm import SamplingParams
from cascade_llm.config import CascadeConfig, SchedulerConfig
from cascade_llm.plan import StepResult
from cascade_llm.scheduler.cascade.cost_model import AttentionShape, CostModel
from cascade_llm.scheduler.cascade.device_costs import DEVICE_COSTS
from cascade_llm.scheduler.scheduler import FlashInferScheduler
from cascade_llm.scheduler.sequence import Request

SYSTEM = list(range(1000, 1064))
LEFT, RIGHT = [*SYSTEM, *range(2000, 2032)], [*SYSTEM, *range(3000, 3032)]
PROMPTS = [[*LEFT, 1], [*LEFT, 2], [*RIGHT, 3], [*RIGHT, 4], [*SYSTEM, 5]]


def main() -> None:
    config = SchedulerConfig(
        page_size=16,
        total_pages=64,
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=1024,
        cascade=CascadeConfig(shared_prefix_len=16),  # these prompts are far too short for the cost model
    )
    shape = AttentionShape(num_qo_heads=9, num_kv_heads=3, head_dim=64, kv_dtype_bytes=2)
    scheduler = FlashInferScheduler(config, CostModel(shape, DEVICE_COSTS["cpu"]))
    for index, prompt in enumerate(PROMPTS):
        scheduler.add(Request(request_id=str(index), prompt_token_ids=prompt, params=SamplingParams(), seed=0))

    prefill = scheduler.schedule()
    assert prefill is not None
    print(f"prefill: {prefill.num_rows} rows for {sum(map(len, PROMPTS))} prompt tokens")
    scheduler.commit(prefill, StepResult(step_id=prefill.step_id, token_ids=[9] * len(PROMPTS)))

    decode = scheduler.schedule()
    assert decode is not None
    for depth, level in enumerate(decode.cascade.levels):
        print(f"level {depth}" + (" (leaf)" if level is decode.cascade.leaf else ""))
        for segment in range(level.num_segments):
            rows, pages = level.rows(segment), level.pages(segment).tolist()
            tokens = level.kv_len(segment, config.page_size)
            print(f"  rows {rows.start} to {rows.stop - 1}: {tokens} tokens in pages {pages}")
    report = decode.report
    print(f"K/V tokens read: {report.kv_tokens_read}; by one level: {report.kv_tokens_one_level}")


if __name__ == "__main__":
    main()

"""What sequences hold of each pool, where attention kinds have pools of their own and where they have one.

    python scripts/window_pools.py

The scheduler runs without a model: sequences of 8,192 tokens, prefilled in chunks, of a model like Gemma 3 4B (29
layers with a window of 1,024 and 5 that read everything; 4 KV heads of 256, bfloat16) and of one like Gemma 3 270M (15
layers of 512 and 3; one KV head of 256).
"""

from __future__ import annotations

from dataclasses import replace

from cascade_llm.config import CascadeConfig, EngineOptions, ModelConfig, SchedulerConfig, kinds_of_layers
from cascade_llm.plan import StepResult
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.cascade.choice import TokensRead
from cascade_llm.scheduler.scheduler import FlashInferScheduler
from cascade_llm.scheduler.sequence import Request
from cascade_llm.worker.pool_sizes import PoolShape

LENGTH, NUM_SEQUENCES, NUM_DECODED = 8192, 16, 256
GIB = 1 << 30
MODELS = {"like Gemma 3 4B": (29, 5, 1024, 4), "like Gemma 3 270M": (15, 3, 512, 1)}
"""Layers with a window and without, the window, KV heads."""


def shape_of(windowed: int, full: int, window_len: int, num_kv_heads: int) -> PoolShape:
    """The pools of a model for sequences of `LENGTH` tokens."""
    kinds, layer_kinds = kinds_of_layers([window_len] * windowed + [None] * full)
    model = ModelConfig(
        architecture="gemma3_text",
        vocab_size=1,
        hidden_size=1,
        intermediate_size=1,
        num_layers=windowed + full,
        num_qo_heads=num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=256,
        max_position_embeddings=LENGTH,
        attention_kinds=kinds,
        layer_kinds=layer_kinds,
    )
    options = EngineOptions(max_num_batched_tokens=2048)
    return PoolShape.of(options, model, LENGTH, kv_number_bytes=2)


def held(shape: PoolShape, pages: tuple[int, ...], num_sequences: int) -> tuple[list[int], int]:
    """Pages of each pool that sequences hold when all have been prefilled and decode, and how many were preempted."""
    config = SchedulerConfig(
        page_size=shape.page_size,
        total_pages=pages[0],
        max_model_len=LENGTH,
        max_num_seqs=256,
        max_num_batched_tokens=shape.max_num_batched_tokens,
        cascade=CascadeConfig(enabled=False),
        attention_kinds=(None, *shape.windows),
        layer_kinds=(0, *range(1, len(pages))) if pages[1:] else (),
        window_pages=pages[1:],
    )
    scheduler = FlashInferScheduler(config, TokensRead())
    params = SamplingParams(max_tokens=NUM_DECODED, ignore_eos=True)
    for index in range(num_sequences):
        prompt = [index, *range(LENGTH - NUM_DECODED - 1)]
        scheduler.add(Request(request_id=str(index), prompt_token_ids=prompt, params=params, seed=0))
    found = [0] * len(pages)
    while scheduler.has_unfinished:
        plan = scheduler.schedule()
        if plan is None:
            break
        if plan.num_rows == num_sequences:
            found = [counts.held_pages for _, counts in scheduler.pools]
        scheduler.commit(plan, StepResult(step_id=plan.step_id, token_ids=[1] * len(plan.sample_rows)))
    return found, scheduler.counters.preemptions


def in_one_pool(shape: PoolShape) -> PoolShape:
    """The same where a page has all layers."""
    return replace(shape, windows=(), page_bytes=(sum(shape.page_bytes),))


def main() -> None:
    """Print both tables."""
    for name, sizes in MODELS.items():
        shape = shape_of(*sizes)
        one = in_one_pool(shape)
        print(f"{name}: {NUM_SEQUENCES} sequences of {LENGTH:,} tokens, pages held and their MiB")
        wanted = NUM_SEQUENCES * shape.pages_per_sequence
        for title, each, pages in (("one pool", one, (wanted,)), ("pools", shape, shape.with_windows(wanted))):
            found, preempted = held(each, pages, NUM_SEQUENCES)
            by_pool = [count * width / (1 << 20) for count, width in zip(found, each.page_bytes, strict=True)]
            mib = " + ".join(f"{size:,.0f}" for size in by_pool)
            print(f"  {title:9} {' + '.join(map(str, found)):>14} pages {mib:>14} MiB, {preempted} preempted")
        print("  1 GiB holds")
        for title, each in (("one pool", one), ("pools", shape)):
            most = each.most(GIB)
            pages = each.with_windows(most, lean=most < each.pages_per_sequence)
            if most < each.pages_per_sequence:
                pages = each.with_windows(each.most(GIB, lean=True), lean=True)
            print(f"  {title:9} {' + '.join(map(str, pages)):>14} pages: {most_sequences(each, pages)} sequences")


def most_sequences(shape: PoolShape, pages: tuple[int, ...]) -> int:
    """How many such sequences decode together in pools of so many pages, none of them preempted."""
    if pages[0] < shape.pages_per_sequence:
        return 0
    number = pages[0] // shape.pages_per_sequence
    while number > 1 and not all_run(shape, pages, number):
        number -= 1
    return number


def all_run(shape: PoolShape, pages: tuple[int, ...], number: int) -> bool:
    """Whether that many decode in one step, and none was preempted."""
    found, preempted = held(shape, pages, number)
    return any(found) and not preempted


if __name__ == "__main__":
    main()

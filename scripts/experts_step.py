#!/usr/bin/env python
"""A layer's block of experts by processor time: what a step costs, and what it reads, against one read of memory.

    PYTHONPATH=. scripts/experts_step.py [--shape 2048,768,128,8] [--formats bfloat16,q4_k,int4] [--rows 1,16,64]

Shape: hidden size, outputs of an expert's gate, experts, experts of a row; the default is Qwen3-30B-A3B's. Rows are
random, and others each time, so that experts come from memory. One thread; least processor time of some rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from cascade_llm.config import ModelConfig
from cascade_llm.layers.native_ops import select_fused_ops
from cascade_llm.layers.native_routing import select_router
from cascade_llm.layers.routing import Routing
from cascade_llm.models.blocks import BlockOptions
from cascade_llm.models.experts import Experts
from cascade_llm.weights.format import StoredTensor, WeightOptions
from cascade_llm.weights.stack import OneByOne

ROUNDS = 25
READ_BYTES = 1 << 28
"""More than a cache holds."""


def block(hidden: int, inner: int, experts: int, chosen: int, quantization: str | None) -> Experts:
    """With random bfloat16 weights, or what they are rounded to."""
    config = ModelConfig(
        architecture="qwen3_moe",
        vocab_size=8,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=1,
        num_qo_heads=1,
        num_kv_heads=1,
        head_dim=64,
        max_position_embeddings=64,
    )
    cpu, dtype = torch.device("cpu"), torch.bfloat16
    weights = WeightOptions(dtype=dtype, device=cpu, quantization=quantization)
    options = BlockOptions(config, weights, select_fused_ops(dtype, cpu), select_router(dtype, cpu))
    made = Experts(options, Routing(num_experts=experts, num_chosen=chosen, divides_by_sum=True), inner)
    for _, parameter in made.named_parameters():
        if not parameter.stands_for:
            values = torch.randn(parameter.shape).mul_(parameter.shape[-1] ** -0.5).bfloat16()
            parameter.load(StoredTensor.plain(values))
    return made


def least_s(work: Callable[[], object]) -> float:
    """Processor seconds."""
    took = []
    for _ in range(ROUNDS):
        before = time.process_time()
        work()
        took.append(time.process_time() - before)
    return min(took)


def measure(made: Experts, rows: int, rates: float, chosen_bytes: float, hidden: int) -> None:
    """One line of the table."""
    seconds, used = [], []
    for seed in range(ROUNDS):
        x = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(seed)).bfloat16()
        before = time.process_time()
        made(x)
        seconds.append(time.process_time() - before)
        ends = made._route(made.router(x), made.routing).ends
        used.append(int((ends.diff(prepend=ends.new_zeros(1)) > 0).sum()))
    best = min(range(ROUNDS), key=seconds.__getitem__)
    read = used[best] * chosen_bytes
    print(
        f"{made.gate_up.matrix.describe():55} {rows:5} rows {used[best]:5} experts {read / 1e6:8.1f} MB "
        f"{1e3 * seconds[best]:8.2f} ms {read / seconds[best] / 1e9:6.1f} GB/s {read / seconds[best] / rates:5.0%}"
    )


@torch.inference_mode()
def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="2048,768,128,8")
    parser.add_argument("--formats", default="bfloat16,q4_k,int4")
    parser.add_argument("--rows", default="1,16,64")
    parser.add_argument("--one-by-one", action="store_true", help="products one by one beside")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hidden, inner, experts, chosen = map(int, arguments.shape.split(","))
    numbers = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    rate = READ_BYTES / least_s(numbers.sum)
    print(f"one thread reads {rate / 1e9:.1f} GB/s")
    del numbers
    for name in arguments.formats.split(","):
        made = block(hidden, inner, experts, chosen, None if name == "bfloat16" else name)
        expert_bytes = (made.gate_up.matrix.num_bytes + made.down.matrix.num_bytes) / experts
        for rows in map(int, arguments.rows.split(",")):
            measure(made, rows, rate, expert_bytes, hidden)
        if arguments.one_by_one:
            for stack in (made.gate_up, made.down):
                stack._stack = OneByOne(list(stack.matrix._matrices), stack.spec.out_features)  # type: ignore[attr-defined]
            for rows in map(int, arguments.rows.split(",")):
                measure(made, rows, rate, expert_bytes, hidden)


if __name__ == "__main__":
    main()

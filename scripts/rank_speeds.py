#!/usr/bin/env python
"""What ranks can gain: a decode step on 1 to 8 GPUs from bytes, operations and link time, or as measured here.

    scripts/rank_speeds.py                     the table of claude_docs/tensor_parallel.md
    scripts/rank_speeds.py --measure MODEL [--ranks 1 2] [--dummy]     processor seconds on this machine's CPU

The table is arithmetic, and nothing of it was measured: a part takes the longer of its bytes over the memory's rate and
its operations over the processor's, and an exchange a latency and its bytes over the link's rate.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

NUMBER_BYTES = 2
"""bfloat16, of weights, pages and exchanges."""
COUNTS = (1, 2, 4, 8)
HELD_GB = 72
"""Of 80, what weights and pages may take: the default of gpu_memory_utilization."""


@dataclass(frozen=True)
class Machine:
    """An H100 SXM by its data sheet, and the shares of it that kernels reach, which are assumed."""

    memory_bytes_per_s: float = 3.35e12 * 0.8
    flops_per_s: float = 989e12 * 0.6
    link_bytes_per_s: float = 450e9 * 0.8
    exchange_s: float = 10e-6
    """Of a small all-reduce, assumed: from being queued in a graph until all ranks go on."""

    def seconds(self, num_bytes: float, flops: float) -> float:
        """Of work that reads and computes at once."""
        return max(num_bytes / self.memory_bytes_per_s, flops / self.flops_per_s)


@dataclass(frozen=True)
class Shape:
    """What a step's work depends on."""

    name: str
    layers: int
    hidden: int
    inner: int
    qo_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int = 1
    chosen: int = 1

    @property
    def attention_weights(self) -> int:
        """Of a layer."""
        return 2 * self.hidden * self.head_dim * (self.qo_heads + self.kv_heads)

    @property
    def expert_weights(self) -> int:
        """Of one expert, or of the one block."""
        return 3 * self.hidden * self.inner

    @property
    def weights(self) -> int:
        """Of the model, embedding and head two of them."""
        layer = self.attention_weights + self.experts * self.expert_weights
        return self.layers * layer + 2 * self.vocab * self.hidden

    def kv_bytes_per_token(self, ranks: int) -> int:
        """Of the heads that one rank holds, over all layers."""
        return self.layers * 2 * max(1, self.kv_heads // ranks) * self.head_dim * NUMBER_BYTES

    def experts_met(self, rows: int) -> float:
        """How many experts rows that choose at random meet."""
        return self.experts * (1 - (1 - self.chosen / self.experts) ** rows)


SHAPES = (
    Shape("Qwen3-8B", 36, 4096, 12288, 32, 8, 128, 151936),
    Shape("Llama-3-70B", 80, 8192, 28672, 64, 8, 128, 128256),
    Shape("Qwen3-30B-A3B", 48, 2048, 768, 32, 4, 128, 151936, 128, 8),
)


@dataclass(frozen=True)
class Load:
    """Sequences that decode behind one prefix."""

    sequences: int
    shared: int
    own: int

    @property
    def stored_tokens(self) -> int:
        """In the pool, with cascade attention and without."""
        return self.shared + self.sequences * self.own


LOADS = (Load(1, 0, 2256), Load(64, 2000, 256), Load(256, 2000, 256))


@dataclass(frozen=True)
class Step:
    """Seconds of a decode step on one of several ranks, by part."""

    weights_s: float
    attention_s: float
    latency_s: float
    link_s: float

    @property
    def total_s(self) -> float:
        """One part after the other."""
        return self.weights_s + self.attention_s + self.latency_s + self.link_s


def step(shape: Shape, load: Load, ranks: int, machine: Machine, *, with_cascade: bool = True) -> Step:
    """A step of `ranks` ranks; without cascade each sequence reads the shared tokens."""
    rows = load.sequences
    read = shape.layers * (shape.attention_weights + shape.experts_met(rows) * shape.expert_weights)
    used = shape.layers * (shape.attention_weights + shape.chosen * shape.expert_weights)
    head = shape.vocab * shape.hidden
    weights_s = machine.seconds((read + head) * NUMBER_BYTES / ranks, 2 * rows * (used + head) / ranks)
    tokens = load.sequences * load.own + (load.shared if with_cascade else load.sequences * load.shared)
    kv_bytes = tokens * shape.kv_bytes_per_token(ranks)
    pairs = load.sequences * (load.own + load.shared)
    flops = shape.layers * pairs * 4 * shape.qo_heads // ranks * shape.head_dim
    if ranks == 1:
        return Step(weights_s, machine.seconds(kv_bytes, flops), 0.0, 0.0)
    sums = 2 * shape.layers + 1
    sum_bytes = 2 * (ranks - 1) / ranks * rows * shape.hidden * NUMBER_BYTES
    logits = (ranks - 1) / ranks * rows * shape.vocab * NUMBER_BYTES
    return Step(
        weights_s,
        machine.seconds(kv_bytes, flops),
        (sums + 2) * machine.exchange_s,  # the logits and the tokens are exchanged too
        (sums * sum_bytes + logits) / machine.link_bytes_per_s,
    )


def print_table() -> None:
    """All shapes, loads and numbers of ranks."""
    machine = Machine()
    print(
        "| model | sequences x (shared + own) | ranks | weights + pages GB a rank | weights ms | attention ms |", end=""
    )
    print(" exchanges ms | step ms | tokens/s | without cascade |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape in SHAPES:
        for load in LOADS:
            for ranks in COUNTS:
                found = step(shape, load, ranks, machine)
                off = step(shape, load, ranks, machine, with_cascade=False)
                held = shape.weights * NUMBER_BYTES / ranks / 1e9
                pages = load.stored_tokens * shape.kv_bytes_per_token(ranks) / 1e9
                cells = (
                    shape.name,
                    f"{load.sequences} x ({load.shared:,} + {load.own:,})",
                    str(ranks),
                    f"{held:.1f} + {pages:.1f}" + (" (does not fit)" if held + pages > HELD_GB else ""),
                    f"{found.weights_s * 1e3:.2f}",
                    f"{found.attention_s * 1e3:.2f}",
                    f"{(found.latency_s + found.link_s) * 1e3:.2f}",
                    f"{found.total_s * 1e3:.2f}",
                    f"{load.sequences / found.total_s:,.0f}",
                    f"{load.sequences / off.total_s:,.0f}",
                )
                print(f"| {' | '.join(cells)} |")


def measure(model: str, counts: Sequence[int], load_format: str) -> None:
    """Processor seconds of all processes, from the start of an engine to its end, and of its steps alone."""
    from cascade_llm import LLM, SamplingParams

    prompts = [[5 + i % 90 for i in range(256)] + [7 + 3 * i, 11 + i] for i in range(16)]
    for ranks in counts:
        spent = {}
        for num_tokens in (1, 65):
            before = _processor_s()
            with LLM(
                model,
                tensor_parallel_size=ranks,
                distributed_executor_backend="mp",
                load_format=load_format,
                num_threads=1,
                max_num_seqs=16,
                max_model_len=512,
                progress=False,
            ) as llm:
                params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
                started = time.perf_counter()
                llm.generate(prompts, params, progress=False)
                wall_s = time.perf_counter() - started
            spent[num_tokens] = _processor_s() - before, wall_s
        steps_s, steps_wall_s = (spent[65][i] - spent[1][i] for i in range(2))
        print(f"{ranks} rank(s): {spent[1][0]:.1f} s to start and read the prompts, 64 decode steps {steps_s:.2f} s")
        print(
            f"    of processor time of all processes together; {steps_wall_s:.2f} s by the clock, on a shared machine"
        )


def _processor_s() -> float:
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in (own, ended))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure", metavar="MODEL", help="measure ranks here instead")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="with --measure: numbers of ranks")
    parser.add_argument("--dummy", action="store_true", help="with --measure: random weights")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.ranks, "dummy" if arguments.dummy else "auto")
    else:
        print_table()

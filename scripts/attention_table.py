#!/usr/bin/env python
"""Attention of one layer on this CPU: the compiled kernels beside their torch twin, on cascade and one-level plans.

Calls of the two alternate. The figure is the least time of a call, which other work on the machine disturbs least; with
--cpu it is the processor time of the whole process (with one thread: what a call costs on a machine that is shared).
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from cascade_llm.attention.backend import AttentionBackend, AttentionSpec, PreparedAttention
from cascade_llm.attention.native_backend import NativeAttentionBackend
from cascade_llm.attention.torch_backend import TorchAttentionBackend
from cascade_llm.kv_cache.paged_kv_cache import PagedKVCache
from cascade_llm.plan import CascadeLevel, CascadePlan, int_column

PAGE_SIZE = 16


@dataclass(frozen=True)
class Load:
    """Groups of sequences: all of a group share `prefix` tokens, each has its own, `rows` of them new."""

    name: str
    groups: int
    sequences: int
    prefix: int
    own: tuple[int, int]
    rows: int = 1

    def plans(self) -> Iterator[tuple[str, CascadePlan]]:
        """The cascade plan where something is shared, and the one-level plan."""
        rng, next_page = random.Random(0), 0
        pages = list(range(self.num_pages()))
        if self.rows == 1:
            rng.shuffle(pages)
        shared, leaf, flat = [], [], []
        for _ in range(self.groups):
            prefix = pages[next_page : next_page + self.prefix // PAGE_SIZE]
            next_page += len(prefix)
            shared.append((self.sequences * self.rows, prefix, PAGE_SIZE if prefix else 0))
            for _ in range(self.sequences):
                kv_len = rng.randint(*self.own)
                own = pages[next_page : next_page - (-kv_len // PAGE_SIZE)]
                next_page += len(own)
                last = (kv_len - 1) % PAGE_SIZE + 1
                leaf.append((self.rows, own, last))
                flat.append((self.rows, prefix + own, last))
        if self.prefix:
            yield "cascade", CascadePlan((level(shared), level(leaf)), PAGE_SIZE)
        yield "one level", CascadePlan((level(flat),), PAGE_SIZE)

    def num_pages(self) -> int:
        """Enough for the longest of everything."""
        return self.groups * (self.prefix // PAGE_SIZE + self.sequences * -(-self.own[1] // PAGE_SIZE))


LOADS = (
    Load("decode 64 x (2048 shared + 1..100)", 1, 64, 2048, (1, 100)),
    Load("decode 32 x (2048 shared + 1..100)", 1, 32, 2048, (1, 100)),
    Load("decode 16 x (6144 shared + 1..100)", 1, 16, 6144, (1, 100)),
    Load("decode 16 x (512 shared + 16..80)", 1, 16, 512, (16, 80)),
    Load("decode 4 x 8 x (1024 shared + 1..100)", 4, 8, 1024, (1, 100)),
    Load("decode 16 x 256..320", 1, 16, 0, (256, 320)),
    Load("decode 1 x 512", 1, 1, 0, (512, 512)),
    Load("decode 1 x 8192", 1, 1, 0, (8192, 8192)),
    Load("prefill 1 x 512", 1, 1, 0, (512, 512), 512),
    Load("prefill 1 x 2048", 1, 1, 0, (2048, 2048), 2048),
    Load("prefill 64 x 32 behind 2048", 1, 64, 2048, (32, 32), 32),
    Load("prefill 16 x 128", 1, 16, 0, (128, 128), 128),
)


def level(segments: list[tuple[int, list[int], int]]) -> CascadeLevel:
    """From (rows, pages, tokens in the last page) of each segment."""
    return CascadeLevel(
        int_column(accumulate((rows for rows, _, _ in segments), initial=0)),
        int_column(accumulate((len(pages) for _, pages, _ in segments), initial=0)),
        int_column(page for _, pages, _ in segments for page in pages),
        int_column(last for _, _, last in segments),
    )


def least_times(calls: Sequence[Callable[[], object]], seconds: float, clock: Callable[[], float]) -> list[float]:
    """The least time of each call, all of them in turn until the time is over."""
    for call in (*calls, *calls, *calls):
        call()
    least, end = [float("inf")] * len(calls), time.perf_counter() + seconds
    while time.perf_counter() < end:
        for i, call in enumerate(calls):
            start = clock()
            call()
            least[i] = min(least[i], clock() - start)
    return least


def measure(load: Load, args: argparse.Namespace) -> None:
    """Print the rows of one load."""
    dtype = getattr(torch, args.dtype)
    device = torch.device("cpu")
    spec = AttentionSpec(
        num_layers=args.layers,
        num_qo_heads=args.heads[0],
        num_kv_heads=args.heads[1],
        head_dim=args.heads[2],
        sm_scale=args.heads[2] ** -0.5,
        dtype=dtype,
        device=device,
    )
    kv_cache = PagedKVCache(
        num_layers=args.layers,
        num_pages=load.num_pages(),
        page_size=PAGE_SIZE,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=dtype,
    )
    for layer in range(args.layers):
        kv_cache.layer(layer).normal_()
    backends: list[AttentionBackend] = [NativeAttentionBackend(spec, kv_cache), TorchAttentionBackend(spec, kv_cache)]
    for name, plan in load.plans():
        q = torch.randn(plan.num_rows, spec.num_qo_heads, spec.head_dim).to(dtype)
        for backend in backends:
            backend.prepare(plan)  # so that the twin keeps what it gathers
        prepared = [backend.prepare(plan) for backend in backends]

        clock = time.process_time if args.cpu else time.perf_counter
        calls = [functools.partial(all_layers, x, args.layers, q) for x in prepared[: 1 if args.native else 2]]
        attend = [least / args.layers for least in least_times(calls, args.seconds, clock)]
        prepare = least_times([functools.partial(backends[0].prepare, plan)], 0.2, clock)[0]
        twin = f"{attend[1] * 1e3:9.3f} {attend[1] / attend[0]:8.1f}x" if len(attend) > 1 else ""
        flops = 4 * spec.num_qo_heads * spec.head_dim * num_scores(plan)
        print(
            f"{load.name:38} {name:10} {attend[0] * 1e3:9.3f} {twin}"
            f" {flops / attend[0] / 1e9:8.0f} {prepare * 1e6:8.0f}",
            flush=True,
        )


def all_layers(prepared: PreparedAttention, num_layers: int, q: torch.Tensor) -> None:
    """Attention as in a step."""
    for layer in range(num_layers):
        prepared.attend(layer, q)


def num_scores(plan: CascadePlan) -> int:
    """Pairs of a row and a key that it reads."""
    scores = 0
    for depth, x in enumerate(plan.levels):
        for i in range(x.num_segments):
            rows, kv_len = len(x.rows(i)), x.kv_len(i, plan.page_size)
            scores += rows * kv_len - (rows * (rows - 1) // 2 if depth == len(plan.levels) - 1 else 0)
    return scores


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--heads", type=int, nargs=3, default=(9, 3, 64), metavar=("QUERY", "KV", "SIZE"))
    parser.add_argument("--layers", type=int, default=4, help="layers in turn, so that caches are as in a model")
    parser.add_argument("--seconds", type=float, default=2.0, help="per row of the table")
    parser.add_argument("--only", default="", help="loads whose name contains this")
    parser.add_argument("--cpu", action="store_true", help="processor time in place of wall time")
    parser.add_argument("--native", action="store_true", help="leave out the twin")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    kind = "processor" if args.cpu else "wall"
    heads = "/".join(map(str, args.heads))
    print(f"heads {heads}, {args.dtype}, {args.threads} threads, least {kind} time of a layer in ms, prepare in us")
    print(f"{'load':38} {'plan':10} {'native':>9} {'torch':>9} {'':>9} {'GFLOP/s':>8} {'prepare':>8}")
    with torch.inference_mode():
        for load in LOADS:
            if args.only in load.name:
                measure(load, args)


if __name__ == "__main__":
    main()

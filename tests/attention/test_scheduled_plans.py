"""What the scheduler plans, computed by the CPU backends, equals dense float64 attention over each page table."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace

import pytest
import torch

from cascade_llm.attention.backend import AttentionBackend, AttentionSpec
from cascade_llm.attention.native_backend import NativeAttentionBackend, Sharing
from cascade_llm.attention.reference import reference_attention
from cascade_llm.attention.torch_backend import TorchAttentionBackend
from cascade_llm.kv_cache.paged_kv_cache import PagedKVCache
from cascade_llm.plan import CascadeLevel, CascadePlan, int_column
from tests.scheduler.generated import KINDS, generated_steps, random_config

NUM_PAGES = 200
NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM = 2, 3, 8
STEPS_PER_SEED = 60


def one_level(plan: CascadePlan, page_tables: list[list[int]]) -> CascadePlan:
    """The plan that reads every sequence's pages by itself, from the tables and not from the plan's levels."""
    ends = [0]
    for table in page_tables:
        ends.append(ends[-1] + len(table))
    leaf = CascadeLevel(
        plan.leaf.qo_indptr,
        int_column(ends),
        int_column([page for table in page_tables for page in table]),
        plan.leaf.kv_last_page_len,
    )
    return CascadePlan((leaf,), plan.page_size, plan.window_len)


def random_backends(page_size: int, generator: torch.Generator) -> list[AttentionBackend]:
    """Torch, and native where there is a compiler, over one pool."""
    spec = AttentionSpec(
        num_layers=1,
        num_qo_heads=NUM_KV_HEADS * GROUP_SIZE,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        sm_scale=HEAD_DIM**-0.5,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    pool = PagedKVCache(
        num_layers=1,
        num_pages=NUM_PAGES,
        page_size=page_size,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=torch.float32,
    )
    pool.layer(0).normal_(generator=generator)
    backends: list[AttentionBackend] = [TorchAttentionBackend(spec, pool)]
    if shutil.which("gcc") is not None:
        backends.append(NativeAttentionBackend(spec, pool, Sharing(num_threads=2, smallest_task=50)))
    return backends


def num_cascades_that_equal_dense(seed: int, *kinds: int | None) -> int:
    """Compare every plan of one random load, of every attention kind; returns how many of the last had shared levels.

    Dense attention sees the whole page tables and the window; what a kind does not read must not matter.
    """
    generator = torch.Generator().manual_seed(seed)
    backends: list[AttentionBackend] = []
    num_cascades = 0
    config = replace(random_config(random.Random(seed)), attention_kinds=kinds or (None,))
    for step, page_tables in generated_steps(seed, STEPS_PER_SEED, config=config):
        backends = backends or random_backends(step.cascade.page_size, generator)
        q = torch.randn(step.num_rows, NUM_KV_HEADS * GROUP_SIZE, HEAD_DIM, generator=generator)
        kv_cache = backends[0].kv_cache
        for plan in step.cascades:
            expected, expected_lse = reference_attention(one_level(plan, page_tables), kv_cache, 0, q, HEAD_DIM**-0.5)
            for backend in backends:
                out, lse = backend.prepare(plan).attend(0, q)
                torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
        num_cascades += len(step.cascades[-1].levels) > 1
    return num_cascades


def test_scheduled_plans_equal_dense_attention() -> None:
    assert sum(num_cascades_that_equal_dense(seed) for seed in range(5)) > 60


@pytest.mark.slow
def test_1200_scheduled_plans_equal_dense_attention() -> None:
    assert sum(num_cascades_that_equal_dense(seed) for seed in range(100, 120)) > 400


def test_scheduled_plans_of_kinds_with_a_window_equal_dense_attention() -> None:
    """Windows from a token to more than most sequences have."""
    assert sum(num_cascades_that_equal_dense(seed, *KINDS[seed]) for seed in range(len(KINDS))) > 60


@pytest.mark.slow
def test_2400_scheduled_plans_of_kinds_with_a_window_equal_dense_attention() -> None:
    assert sum(num_cascades_that_equal_dense(seed, *KINDS[seed % len(KINDS)]) for seed in range(100, 140)) > 400

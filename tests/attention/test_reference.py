from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cascade_llm.attention.reference import reference_attention
from cascade_llm.kv_cache.paged_kv_cache import KVLayout
from cascade_llm.plan import CascadePlan
from tests.cascade_cases import CascadeCase, cascade_case, make_level, pool_with_only


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("seed", range(12))
def test_equals_torch_sequence_by_sequence(seed: int, layout: KVLayout) -> None:
    case = cascade_case(seed)
    kv_cache = pool_with_only(case, num_layers=2, dtype=torch.float64, seed=seed, layout=layout)
    q = torch.randn(
        case.plan.num_rows,
        case.num_qo_heads,
        case.head_dim,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )
    out, _ = reference_attention(case.plan, kv_cache, 1, q, 0.3)
    for sequence, table in enumerate(case.page_tables):
        rows = case.plan.leaf.rows(sequence)
        kv_len = (len(table) - 1) * case.plan.page_size + case.plan.leaf.kv_last_page_len[sequence]
        slots = [table[t // case.plan.page_size] * case.plan.page_size + t % case.plan.page_size for t in range(kv_len)]
        k, v = (x.transpose(0, 1) for x in kv_cache.read(1, torch.tensor(slots)))
        mask = torch.ones(len(rows), kv_len, dtype=torch.bool).tril(kv_len - len(rows))
        if case.plan.window_len is not None:
            mask = mask.triu(kv_len - len(rows) - case.plan.window_len + 1)
        own = q[rows.start : rows.stop].transpose(0, 1)
        expected = scaled_dot_product_attention(own, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(out[rows.start : rows.stop], expected.transpose(0, 1))


def test_lse_is_the_logarithm_of_the_denominator_in_base_2() -> None:
    case = CascadeCase(*plan_of_three_tokens(), num_pages=2, num_kv_heads=1, group_size=1, head_dim=8)
    kv_cache = pool_with_only(case, num_layers=1, dtype=torch.float64, seed=0)
    q = torch.randn(1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k, _ = kv_cache.read(0, torch.tensor([2, 3, 0]))
    denominator = sum(math.exp(float(q[0, 0] @ key[0]) * 0.5) for key in k)
    _, lse = reference_attention(case.plan, kv_cache, 0, q, 0.5)
    assert lse.item() == pytest.approx(math.log2(denominator), abs=1e-12)


def plan_of_three_tokens() -> tuple[CascadePlan, list[list[int]]]:
    return CascadePlan((make_level([(1, (1,), 2)]), make_level([(1, (0,), 1)])), page_size=2), [[1, 0]]

"""Generated cases have what was chosen for them."""

from __future__ import annotations

import pytest
import torch

from cascade_llm.validation.cases import CaseChoices, cascade_case, pool_with_only, single_level_plan

SEEDS = range(40)


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_page_size_and_numbers_are_the_chosen_ones(page_size: int) -> None:
    for seed in SEEDS:
        case = cascade_case(seed, CaseChoices(page_size=page_size, num_sequences=6, num_shared_levels=3, window=False))
        assert case.plan.page_size == page_size
        assert case.plan.leaf.num_segments == 6
        assert len(case.plan.levels) == 4
        assert case.plan.window_len is None


def test_heads_and_rows_are_the_chosen_ones() -> None:
    for seed in SEEDS:
        case = cascade_case(seed, CaseChoices(heads=(3, 3, 64), decode=True, num_sequences=1))
        assert (case.num_kv_heads, case.num_qo_heads, case.head_dim) == (3, 9, 64)
        assert case.plan.num_rows == 1


def test_identical_sequences_have_identical_keys() -> None:
    choices = CaseChoices(num_sequences=4, num_shared_levels=2, decode=True, identical=True, window=False)
    for seed in SEEDS:
        case = cascade_case(seed, choices)
        kv_cache = pool_with_only(case, num_layers=1, dtype=torch.float32, seed=seed)
        size, lengths = case.plan.page_size, {len(table) for table in case.page_tables}
        assert len(lengths) == 1
        kv_len = (lengths.pop() - 1) * size + case.plan.leaf.kv_last_page_len[0]
        keys = []
        for table in case.page_tables:
            slots = torch.tensor([table[t // size] * size + t % size for t in range(kv_len)])
            keys.append(kv_cache.read(0, slots)[0])
        assert all(torch.equal(key, keys[0]) for key in keys)
        assert keys[0].isfinite().all()


def test_the_single_level_plan_meets_the_same_pages() -> None:
    for seed in SEEDS:
        case = cascade_case(seed)
        single = single_level_plan(case.plan)
        assert len(single.levels) == 1
        assert [single.page_table(i) for i in range(single.leaf.num_segments)] == case.page_tables
        assert single.leaf.kv_last_page_len == case.plan.leaf.kv_last_page_len

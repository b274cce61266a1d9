"""Regular trees: their plans are right, and the planner's choice is among them."""

from __future__ import annotations

import pytest

from cascade_llm.bench.attention_cases import PAGE_SIZE, AttentionCase
from cascade_llm.bench.calibration import FIT_CASES, HELD_OUT_CASES
from cascade_llm.errors import ConfigError
from cascade_llm.scheduler.cascade.choice import TokensRead
from cascade_llm.scheduler.cascade.cost_model import AttentionShape, CostModel, plan_work
from cascade_llm.scheduler.cascade.device_costs import DEVICE_COSTS

SHAPE = AttentionShape(num_qo_heads=9, num_kv_heads=3, head_dim=64, kv_dtype_bytes=2)


@pytest.mark.parametrize("name", [*FIT_CASES, *HELD_OUT_CASES])
def test_every_plan_of_every_case_is_whole(name: str) -> None:
    case = AttentionCase.parse(name)
    assert str(case) == name
    subsets = list(case.subsets(2))
    assert subsets[0] == ()
    plain = case.plan()
    tables = [plain.page_table(i) for i in range(case.num_sequences)]
    assert len({page for table in tables for page in table}) == case.num_pages
    for depths in subsets:
        plan = case.plan(depths)
        plan.check(tables)
        assert len(plan.levels) == len(depths) + 1
        for depth, segments in zip(depths, plan_work(plan).shared, strict=True):
            assert len(segments) == case.nodes[depth]
    assert case.chosen(CostModel(SHAPE, DEVICE_COSTS["cpu"]), 2) in subsets
    assert case.chosen(TokensRead(), len(case.shared_depths)) == case.shared_depths


def test_folded_nodes_are_carried_down() -> None:
    case = AttentionCase.parse("1,2,8/64,32,20")
    assert case.shared_depths == (0, 1)
    work = plan_work(case.plan((1,)))
    assert work.shared == [[(96, 4), (96, 4)]]
    assert work.leaf == [(20, 1)] * 8
    work = plan_work(case.plan((0,)))
    assert work.shared == [[(64, 8)]]
    assert work.leaf == [(52, 1)] * 8
    assert (work.reread_tokens, work.common_tokens) == (2 * 3 * 32, 2 * 32)
    assert plan_work(case.plan()).reread_tokens == 7 * 64 + 2 * 3 * 32


def test_nodes_of_one_sequence_are_not_shared() -> None:
    assert AttentionCase.parse("1,8,8/64,32,20").shared_depths == (0,)
    assert AttentionCase.parse("8/100").shared_depths == ()
    assert AttentionCase.parse("8/100").num_tokens == 800
    assert AttentionCase.parse("8/100").num_pages == 8 * -(-100 // PAGE_SIZE)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("1,2", "write nodes and tokens"),
        ("1,a/3,4", "write nodes and tokens"),
        ("1,2/32", "as many"),
        ("0,2/32,3", "1 or larger"),
        ("4,2/32,3", "no fewer nodes"),
        ("1,2/30,3", "pages of 16"),
    ],
)
def test_bad_cases(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AttentionCase.parse(name)

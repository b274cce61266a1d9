"""Trees of prefixes: read, planned as they are drawn, and timed on real kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cascade_llm.bench.attention_cases import PAGE_SIZE, AttentionCase
from cascade_llm.bench.attention_trees import PUBLIC_TREES, HeadLayout, measure_tree, parse_trees
from cascade_llm.bench.machine_limits import MachineLimits
from cascade_llm.bench.plan_tree import decode_step
from cascade_llm.config import CascadeConfig
from cascade_llm.errors import ConfigError
from cascade_llm.scheduler.cascade.cost_model import AttentionShape, CostModel
from cascade_llm.scheduler.cascade.device_costs import DEVICE_COSTS

LIMITS = MachineLimits(
    device="test",
    dtype="float32",
    num_threads=1,
    bytes_per_s=1e10,
    flops_per_s=1e11,
    linear_flops_per_s=1e11,
    torch_version=torch.__version__,
)
COSTS = CostModel(AttentionShape(num_qo_heads=4, num_kv_heads=2, head_dim=16, kv_dtype_bytes=4), DEVICE_COSTS["cpu"])


def test_the_public_list_is_read_and_written_back() -> None:
    trees = parse_trees(())
    assert [str(tree) for tree in trees] == list(PUBLIC_TREES)
    assert AttentionCase.parse("1,4/16,2").num_tokens == 16 + 4 * 2


@pytest.mark.parametrize("text", ["", "1,2", "1,2/3", "1,x/2,2", "0,2/3,3", "2,3/4,4", "1/2/3"])
def test_a_bad_tree_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        AttentionCase.parse(text)


@pytest.mark.parametrize("text", ["32", "0/1", "6/4", "a/b"])
def test_a_bad_head_layout_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        HeadLayout.parse(text)


def test_prompts_share_exactly_the_trees_nodes() -> None:
    prompts = list(AttentionCase.parse("2,4,8/48,32,1").prompts())
    assert [len(prompt) for prompt in prompts] == [81] * 8
    for length, count in ((48, 2), (80, 4), (81, 8)):
        assert len({tuple(prompt[:length]) for prompt in prompts}) == count
        assert len({tuple(prompt[:length][-1:]) for prompt in prompts}) == count


@pytest.mark.parametrize("enabled", [True, False])
def test_the_plan_covers_every_sequence(enabled: bool) -> None:
    tree = AttentionCase.parse("1,2,8/64,32,32")
    config = CascadeConfig(enabled=enabled, shared_prefix_len=16)
    _, plan, planning_s = decode_step(list(tree.prompts()), COSTS, config, page_size=PAGE_SIZE, max_model_len=130)
    plan.check()
    assert plan.num_rows == 8
    assert planning_s > 0
    assert [plan.report.num_levels, plan.report.num_groups] == ([3, 3] if enabled else [1, 0])
    assert all(position == 64 + 32 + 32 for position in plan.positions)


def test_a_tree_is_timed(tmp_path: Path) -> None:
    result = measure_tree(
        AttentionCase.parse("1,4/512,16"),
        HeadLayout(4, 2, 16),
        LIMITS,
        device=torch.device("cpu"),
        dtype=torch.float32,
        num_threads=1,
        measure_s=0.0,
    )
    assert result.cascade_s > 0
    assert result.one_level_s > 0
    assert result.prepare_s > 0
    assert result.speedup == result.one_level_s / result.cascade_s
    tokens_read = 512 + 4 * 16  # and each row's own token is written
    assert result.floor_s == (tokens_read + 4) * 2 * 2 * 16 * 4 / 1e10
    assert result.costs.startswith("table entry 'cpu'; ")
    assert result.as_dict()["share_of_limit"] == result.floor_s / result.cascade_s


def test_a_tree_beyond_the_memory_is_refused() -> None:
    tree = AttentionCase.parse("1048576/1048576")
    with pytest.raises(ConfigError, match="too many for the free memory"):
        measure_tree(tree, HeadLayout(64, 64), LIMITS, device=torch.device("cpu"), dtype=torch.float32)

"""The roofline: bytes or flops, whichever takes longer, and the fixed costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cascade_llm.plan import CascadeLevel, CascadePlan, int_column
from cascade_llm.scheduler.cascade.cost_model import AttentionShape, CostModel, PlanWork, plan_work, unit_s
from cascade_llm.scheduler.cascade.device_costs import DEVICE_COSTS, DeviceCosts, known_device

SHAPE = AttentionShape(num_qo_heads=8, num_kv_heads=2, head_dim=64, kv_dtype_bytes=2)
COSTS = DeviceCosts(
    shared_bytes_per_s=512e3,
    shared_flops_per_s=2048e3,
    leaf_bytes_per_s=256e3,
    leaf_flops_per_s=1024e3,
    segment_s=1.0,
    level_s=10.0,
    merge_bytes_per_s=1e3,
)


def test_shape() -> None:
    assert SHAPE.kv_bytes_per_token == 512
    assert SHAPE.flops_per_row_token == 2048


def test_a_shared_segment_takes_the_longer_of_bytes_and_flops() -> None:
    model = CostModel(SHAPE, COSTS)
    assert model.shared_segment_s(1000, 1) == pytest.approx(1.0 + 1.0)  # 512 kB at 512 kB/s; as many seconds of flops
    assert model.shared_segment_s(1000, 3) == pytest.approx(3.0 + 1.0)
    slow_memory = CostModel(SHAPE, replace(COSTS, shared_bytes_per_s=51.2e3))
    assert slow_memory.shared_segment_s(1000, 3) == pytest.approx(10.0 + 1.0), "read once, whatever the number of rows"


def test_rows_are_rounded_up_to_tiles() -> None:
    model = CostModel(SHAPE, replace(COSTS, tile_rows=16))  # 4 query heads share a KV head: 4 rows fill a tile
    assert model.shared_segment_s(1000, 1) == model.shared_segment_s(1000, 4) == pytest.approx(4.0 + 1.0)
    assert model.shared_segment_s(1000, 5) == pytest.approx(8.0 + 1.0)


def test_leaf_tokens_add_up() -> None:
    model = CostModel(SHAPE, COSTS)
    assert model.leaf_tokens_s(1000, 1) == pytest.approx(2.0)
    assert model.leaf_tokens_s(1000, 2) == pytest.approx(4.0)
    assert model.leaf_tokens_s(300, 2) + model.leaf_tokens_s(700, 2) == pytest.approx(model.leaf_tokens_s(1000, 2))
    assert model.leaf_tokens_s(0, 5) == 0


def test_a_level_merges_every_row() -> None:
    bytes_per_row = 8 * (3 * 64 * 2 + 8)
    assert CostModel(SHAPE, COSTS).level_s(5) == pytest.approx(10.0 + 5 * bytes_per_row / 1e3)


@pytest.mark.parametrize("device", DEVICE_COSTS)
def test_known_devices_share_long_prefixes_of_many_and_not_short_ones_of_two(device: str) -> None:
    model = CostModel(SHAPE, DEVICE_COSTS[device])

    def gain(tokens: int, rows: int) -> float:
        return rows * model.leaf_tokens_s(tokens, 1) - model.shared_segment_s(tokens, rows) - model.level_s(rows)

    assert gain(8192, 256) > 0
    assert gain(16, 2) < 0


WITH_CACHE = replace(COSTS, cached_bytes_per_s=1024e3, llc_bytes=512_000)


def test_common_tokens_that_fit_the_cache_are_read_cheaply_again() -> None:
    model = CostModel(SHAPE, replace(WITH_CACHE, leaf_flops_per_s=1e12, shared_flops_per_s=1e12))
    assert model.with_common_tokens(0) is model
    assert model.with_common_tokens(1001) is model, "512,512 bytes"
    cached = model.with_common_tokens(1000)
    assert cached.leaf_tokens_s(1000, 1) == pytest.approx(0.5)
    # what a plan gains by sharing is the same as when the first reader is priced as from memory
    first_s = 2.0 - 0.5
    assert cached.shared_segment_s(1000, 4) + first_s >= model.shared_segment_s(1000, 4)
    fast = CostModel(SHAPE, replace(model.costs, shared_bytes_per_s=300e3)).with_common_tokens(1000)
    assert fast.shared_segment_s(1000, 4) == pytest.approx(512 / 300 - first_s + 1.0)


def test_a_plan_of_one_level() -> None:
    model = CostModel(SHAPE, replace(COSTS, step_s=100.0, leaf_segment_s=0.5))
    work = PlanWork((), [(1000, 1), (500, 1)])
    assert model.plan_s(work) == pytest.approx(100 + 2 * 0.5 + 1500 * 512 / 256e3)
    assert model.plan_s(PlanWork((), [(1000, 8)])) == pytest.approx(100 + 0.5 + 8 * 2.0)


def test_a_plan_of_three_levels_adds_levels_segments_and_merges() -> None:
    model = CostModel(SHAPE, COSTS)
    work = PlanWork([[(1000, 3)], [(100, 1), (200, 1)]], [(10, 1)] * 3)
    merge_s = 3 * 8 * (3 * 64 * 2 + 8) / 1e3
    assert model.plan_s(work) == pytest.approx(2 * (10 + merge_s) + 3 * 1.0 + 3.0 + 0.3 + 30 * 512 / 256e3)


def test_leaves_reread_what_fits_the_cache() -> None:
    model = CostModel(SHAPE, replace(WITH_CACHE, leaf_flops_per_s=1e12))
    leaf = [(600, 1)] * 4
    assert model.plan_s(PlanWork((), leaf)) == pytest.approx(2400 * 2e-3)
    fits = PlanWork((), leaf, reread_tokens=1500, common_tokens=500)
    assert model.plan_s(fits) == pytest.approx(900 * 2e-3 + 1500 * 0.5e-3)
    assert model.plan_s(fits._replace(common_tokens=5000)) == pytest.approx(2400 * 2e-3)


def test_a_level_takes_as_long_as_its_longest_segment_on_the_processors_that_it_keeps_busy() -> None:
    model = CostModel(SHAPE, replace(COSTS, num_processors=64, split_tokens=96, tile_rows=16, leaf_flops_per_s=1e12))
    # 2 KV heads and 4 parts of 96 tokens: 8 of 64 processors
    assert model.plan_s(PlanWork((), [(384, 1)])) == pytest.approx(8 * 384 * 2e-3)
    assert model.plan_s(PlanWork((), [(6400, 1)])) == pytest.approx(6400 * 2e-3)
    assert model.plan_s(PlanWork((), [(384, 1)] * 16)) == pytest.approx(16 * 384 * 2e-3)


def test_what_a_plan_uses_is_priced_by_the_constants() -> None:
    model = CostModel(SHAPE, WITH_CACHE)
    work = PlanWork([[(1000, 3)]], [(10, 1)] * 3, reread_tokens=4, common_tokens=2)
    amounts = model.amounts(work)
    assert sum(amount * unit_s(model.costs, name) for name, amount in amounts.items()) == model.plan_s(work)
    assert amounts["segment_s"] == amounts["level_s"] == 1
    assert amounts["shared_flops_per_s"] == 1000 * 3 * 2048


def test_work_of_a_plan() -> None:
    shared = CascadeLevel(*map(int_column, ([0, 2, 3], [0, 2, 2], [0, 1], [4, 0])))
    leaf = CascadeLevel(*map(int_column, ([0, 1, 2, 3], [0, 2, 4, 5], [5, 6, 5, 7, 8], [1, 2, 3])))
    assert plan_work(CascadePlan((shared, leaf), 4)) == PlanWork([[(8, 2)]], [(5, 1), (6, 1), (3, 1)], 4, 4)


def test_names_of_devices() -> None:
    assert known_device("NVIDIA H200") == "h200"
    assert known_device("NVIDIA A100-SXM4-40GB") == "a100"
    assert known_device("NVIDIA GeForce RTX 4090") == "h100"


def test_what_was_found_to_cost_nothing() -> None:
    free = float("inf")
    costs = replace(WITH_CACHE, shared_bytes_per_s=free, cached_bytes_per_s=free, merge_bytes_per_s=free, level_s=0.0)
    model = CostModel(SHAPE, costs).with_common_tokens(10)
    assert model.level_s(100) == 0
    assert model.shared_segment_s(2048, 1) == pytest.approx(2048 * 2048 / 2048e3 + 1.0)
    assert model.leaf_tokens_s(1000, 1) == pytest.approx(2.0), "flops are left"


H200 = CostModel(AttentionShape(num_qo_heads=32, num_kv_heads=8, head_dim=128, kv_dtype_bytes=2), DEVICE_COSTS["h200"])
SHORT_LEAVES = [(256, 1)] * 256


def test_a_level_with_too_many_tiles_to_cut_waits_for_its_longest_segment() -> None:
    """33 tiles are as many as two for each of 132 processors and 8 KV heads."""
    one_processor_s = 32_768 * 512 / (4.3e12 / 132)  # K and V of one head
    heavy, light = [(32_768, 16)], [(512, 4)] * 31
    assert H200.levels_s([heavy + light[:10]], 256) < 0.2 * one_processor_s
    assert H200.levels_s([heavy + light], 256) > one_processor_s
    long_leaf = [*SHORT_LEAVES, (32_768, 1)]
    assert H200.leaf_s(long_leaf) == pytest.approx(32_768 * 512 / (4.0e12 / 132))
    assert H200.leaf_s(long_leaf[-8:]) < 0.2 * H200.leaf_s(long_leaf), "8 rows leave much to cut"


def test_imbalance_is_what_waiting_and_padding_cost() -> None:
    assert H200.imbalance_s(PlanWork((), SHORT_LEAVES)) == pytest.approx(0, abs=1e-9)
    assert H200.imbalance_s(PlanWork([[(8192, 256)]], SHORT_LEAVES)) == pytest.approx(0, abs=1e-9)
    waiting = PlanWork((), [*SHORT_LEAVES, (32_768, 1)])
    assert H200.imbalance_s(waiting) == pytest.approx(
        H200.plan_s(waiting) - (257 * 256 - 256 + 32_768) * 4096 / 4.0e12, rel=1e-6
    )
    pairs = [(1024, 2)] * 64
    mixed, apart = PlanWork([[*pairs, (1024, 128)]], SHORT_LEAVES), PlanWork([pairs, [(1024, 128)]], SHORT_LEAVES)
    assert H200.imbalance_s(mixed) > 1e-5
    assert H200.imbalance_s(apart) == pytest.approx(0, abs=1e-7)


def test_what_is_long_is_what_cannot_be_done_while_the_rest_is() -> None:
    assert H200.longest_balanced(SHORT_LEAVES) == 256
    assert H200.longest_balanced([*SHORT_LEAVES, (3000, 1)]) == 3000
    assert H200.longest_balanced([*SHORT_LEAVES, (100_000, 1), (20_000, 1)]) == 256
    assert H200.longest_balanced([]) == 0

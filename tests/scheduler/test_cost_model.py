"""The roofline: bytes or flops, whichever takes longer, and the fixed costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cascade_llm.scheduler.cost_model import DEVICE_COSTS, AttentionShape, CostModel, DeviceCosts

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

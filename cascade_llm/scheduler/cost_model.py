"""What a segment of a cascade plan costs, in seconds per layer, so that a planner can choose.

A segment joins `rows` query rows with `tokens` of K/V. It reads the K/V once, whatever the number of rows, and does
4 * tokens * rows * num_qo_heads * head_dim flops (two products). Its time is the larger of bytes over bandwidth and
flops over rate: a roofline (Williams et al. 2009). A level costs its launches and its merge besides.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEVICE_COSTS", "AttentionShape", "CostModel", "DeviceCosts"]


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """One layer's attention."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    kv_dtype_bytes: int

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.kv_dtype_bytes

    @property
    def flops_per_row_token(self) -> int:
        """Both products, of one query row and one token."""
        return 4 * self.num_qo_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class DeviceCosts:
    """Constants of a device and its kernels, one layer at a time."""

    shared_bytes_per_s: float
    """K/V read by a shared segment."""
    shared_flops_per_s: float
    leaf_bytes_per_s: float
    """K/V read by one sequence's own segment, which has one or few rows."""
    leaf_flops_per_s: float
    segment_s: float
    """Each shared segment."""
    level_s: float
    """Each shared level: launches and merge, without the bytes merged."""
    merge_bytes_per_s: float
    tile_rows: int = 1
    """Rows * group size are rounded up to this."""


DEVICE_COSTS = {
    "cpu": DeviceCosts(
        shared_bytes_per_s=40e9,
        shared_flops_per_s=400e9,
        leaf_bytes_per_s=12e9,
        leaf_flops_per_s=100e9,
        segment_s=25e-6,
        level_s=40e-6,
        merge_bytes_per_s=10e9,
    ),
    "h200": DeviceCosts(
        shared_bytes_per_s=4.3e12,
        shared_flops_per_s=350e12,
        leaf_bytes_per_s=4.0e12,
        leaf_flops_per_s=100e12,
        segment_s=0.1e-6,
        level_s=6e-6,
        merge_bytes_per_s=4.0e12,
        tile_rows=64,
    ),
}
"""The CPU's are of a 2-core machine with AVX512-BF16 (see claude_docs/LOG.md); the H200's are arithmetic."""


@dataclass(frozen=True)
class CostModel:
    """Predicted seconds per layer of the parts of a plan."""

    shape: AttentionShape
    costs: DeviceCosts

    def shared_segment_s(self, tokens: int, rows: int) -> float:
        """A shared segment of `tokens` full-page tokens under `rows` rows."""
        costs, shape = self.costs, self.shape
        group_size = shape.num_qo_heads // shape.num_kv_heads
        padded_rows = -(-rows * group_size // costs.tile_rows) * costs.tile_rows / group_size
        bytes_s = tokens * shape.kv_bytes_per_token / costs.shared_bytes_per_s
        flops_s = tokens * padded_rows * shape.flops_per_row_token / costs.shared_flops_per_s
        return max(bytes_s, flops_s) + costs.segment_s

    def leaf_tokens_s(self, tokens: int, rows: int) -> float:
        """`tokens` more in the leaf segment of a sequence that has `rows` rows."""
        costs, shape = self.costs, self.shape
        bytes_s = tokens * shape.kv_bytes_per_token / costs.leaf_bytes_per_s
        flops_s = tokens * rows * shape.flops_per_row_token / costs.leaf_flops_per_s
        return max(bytes_s, flops_s)

    def level_s(self, rows: int) -> float:
        """One more shared level over a step of `rows` rows: launches, and outputs and LSE read and merged."""
        merged_bytes = rows * self.shape.num_qo_heads * (3 * self.shape.head_dim * self.shape.kv_dtype_bytes + 8)
        return self.costs.level_s + merged_bytes / self.costs.merge_bytes_per_s

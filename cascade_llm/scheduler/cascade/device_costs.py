"""What devices cost: the constants that the cost model prices plans with."""

from __future__ import annotations

from dataclasses import dataclass

from cascade_llm.tiling import LEAST_CHUNK_TOKENS

__all__ = ["DEVICE_COSTS", "DeviceCosts", "known_device"]


@dataclass(frozen=True, kw_only=True)
class DeviceCosts:
    """Constants of a device and its kernels, one layer at a time. A rate of infinity costs nothing."""

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
    """Rows * group size of a shared segment are rounded up to this, on a device with one processor."""
    cached_bytes_per_s: float = float("inf")
    """K/V that a leaf reads after another leaf did, where they fit the last-level cache."""
    llc_bytes: int = 0
    """What of the last-level cache stays with one layer's shared K/V; 0: no reading comes from it."""
    num_processors: int = 1
    """Streaming multiprocessors, which share a level's tiles out among them (`tiling`); 1 where any segment occupies
    the whole device."""
    split_tokens: int = LEAST_CHUNK_TOKENS
    """The shortest chunks into which a segment is cut for several processors."""
    leaf_segment_s: float = 0.0
    """Each sequence's own segment; every plan of a step pays it."""
    step_s: float = 0.0
    """Each layer; every plan of a step pays it."""
    measured: bool = False
    """Whether the constants were measured on the device; only then are segments spread over levels by their tiles."""


DEVICE_COSTS = {
    "cpu": DeviceCosts(
        shared_bytes_per_s=32e9,
        shared_flops_per_s=640e9,
        leaf_bytes_per_s=28e9,
        leaf_flops_per_s=215e9,
        segment_s=0.0,
        level_s=3.5e-6,
        merge_bytes_per_s=18e9,
        cached_bytes_per_s=78e9,
        llc_bytes=16 * 2**20,
        leaf_segment_s=0.23e-6,
        measured=True,
    ),
    "a100": DeviceCosts(
        shared_bytes_per_s=1.75e12,
        shared_flops_per_s=200e12,
        leaf_bytes_per_s=1.6e12,
        leaf_flops_per_s=60e12,
        segment_s=0.15e-6,
        level_s=7e-6,
        merge_bytes_per_s=1.6e12,
        cached_bytes_per_s=3.5e12,
        llc_bytes=20_000_000,
        num_processors=108,
    ),
    "h100": DeviceCosts(
        shared_bytes_per_s=2.9e12,
        shared_flops_per_s=350e12,
        leaf_bytes_per_s=2.7e12,
        leaf_flops_per_s=100e12,
        segment_s=0.1e-6,
        level_s=6e-6,
        merge_bytes_per_s=2.7e12,
        cached_bytes_per_s=5.5e12,
        llc_bytes=25_000_000,
        num_processors=132,
    ),
    "h200": DeviceCosts(
        shared_bytes_per_s=4.3e12,
        shared_flops_per_s=350e12,
        leaf_bytes_per_s=4.0e12,
        leaf_flops_per_s=100e12,
        segment_s=0.1e-6,
        level_s=6e-6,
        merge_bytes_per_s=4.0e12,
        cached_bytes_per_s=5.5e12,
        llc_bytes=25_000_000,
        num_processors=132,
    ),
}
"""The CPU's are of a 2-core machine with AVX512-BF16 (see claude_docs/LOG.md); the GPUs' are arithmetic, not measured.

Of a GPU's last-level cache half counts: that which is near the processor that asks.
"""


def known_device(name: str) -> str:
    """The entry of `DEVICE_COSTS` for a GPU of that name ("NVIDIA H200"); the H100's where it is not known."""
    return next((device for device in DEVICE_COSTS if device != "cpu" and device in name.lower()), "h100")

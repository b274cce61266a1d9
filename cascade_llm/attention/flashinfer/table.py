"""Which FlashInfer kernel serves which level: the one place where this is decided, and what a benchmark overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from cascade_llm.attention.backend import AttentionSpec

__all__ = ["ChunkRule", "DecodeKernel", "KernelTable", "PrefillKernel", "SharedKernel", "fa3_tile_rows"]

PrefillKernel = Literal["prefill_fa2", "prefill_fa3"]
SharedKernel = Literal["prefill_fa2", "prefill_fa3", "prefill_fa3_chunks"]
DecodeKernel = Literal["decode_tensor_cores", "decode_cuda_cores", "prefill_fa2"]

HOPPER = 9
FA3_TILE_ROWS, FA3_TILE_ROWS_64 = 128, 192
"""Rows of one head that fa3 takes at a time; the second where heads have 64 dimensions."""


@dataclass(frozen=True, kw_only=True)
class ChunkRule:
    """Which shared segments `prefill_fa3_chunks` takes, and into how many chunks it cuts them.

    All of it is arithmetic on FlashInfer's tiles; nothing here was measured.
    """

    min_packed_rows: int = 65
    """Rows x query heads per KV head; fewer would fill half of fa3's tile at most."""
    min_tokens: int = 2048
    """Shorter segments are read sooner than their chunks are merged."""
    chunk_tokens: int = 512
    """A chunk has as many tokens at least."""
    max_chunks: int = 16

    def takes(self, rows: int, tokens: int, group_size: int) -> bool:
        """Whether a segment is large enough."""
        return rows * group_size >= self.min_packed_rows and tokens >= self.min_tokens

    def takes_level(self, segments: Sequence[tuple[int, int]], group_size: int) -> bool:
        """Whether such segments are at least half of a level's work; `segments`: (rows, tokens)."""
        work = sum(rows * tokens for rows, tokens in segments)
        taken = sum(rows * tokens for rows, tokens in segments if self.takes(rows, tokens, group_size))
        return 0 < work <= 2 * taken

    def takes_shape(self, rows: int, num_segments: int, group_size: int) -> bool:
        """Whether a level that is captured with so many segments is meant for large ones: all rows but one per other
        segment in one of them."""
        return (rows - num_segments + 1) * group_size >= self.min_packed_rows

    def num_chunks(self, num_tiles: int, num_processors: int, longest: int | None = None) -> int:
        """Into how many chunks segments are cut: the fewest that take, within an eighth, the least time.

        fa3 gives each processor one tile after the other, so the time is that of the fullest processor.

        Args:
            num_tiles: of all segments, over all KV heads
            num_processors: of the device
            longest: tokens of the longest segment; None where it is not known yet
        """
        most = self.max_chunks if longest is None else max(1, min(self.max_chunks, longest // self.chunk_tokens))
        times = [-(-num_tiles * chunks // num_processors) / chunks for chunks in range(1, most + 1)]
        return next(chunks for chunks, time in enumerate(times, 1) if 8 * time <= 9 * min(times))


@dataclass(frozen=True, kw_only=True)
class KernelTable:
    """The choice of kernels for one model."""

    shared: SharedKernel
    """Shared levels: rows x pages, no mask. `prefill_fa3_chunks` leaves small ones to `prefill_fa2`."""
    decode_leaf: DecodeKernel
    """The leaf where every sequence has one row."""
    row_leaf: PrefillKernel
    """The leaf of prefill and mixed steps, with the causal mask."""
    fused_levels: bool = False
    """Whether eager decode steps that share attend all levels in one launch, see `FusedLevels`."""
    chunks: ChunkRule = field(default_factory=ChunkRule)
    """For `prefill_fa3_chunks`."""

    @property
    def whole_shared(self) -> PrefillKernel:
        """What serves shared levels that are not cut."""
        return "prefill_fa2" if self.shared == "prefill_fa3_chunks" else self.shared

    @property
    def names(self) -> tuple[str, ...]:
        """The kernels that serve: one per kind of level, and what may take their place."""
        beside = (self.whole_shared,) if self.shared != self.whole_shared else ()
        return (
            self.shared,
            self.decode_leaf,
            self.row_leaf,
            *beside,
            *(("fused_levels",) if self.fused_levels else ()),
        )

    @classmethod
    def for_model(cls, spec: AttentionSpec) -> KernelTable:
        """fa2 for shared levels: on Hopper, fa3 neither splits K/V nor packs query heads. One query head per KV head
        leaves tensor cores idle."""
        return cls(
            shared="prefill_fa2",
            decode_leaf="decode_cuda_cores" if spec.group_size == 1 else "decode_tensor_cores",
            row_leaf="prefill_fa2",
        )

    @classmethod
    def of_all_kernels(cls, spec: AttentionSpec, arch: str) -> KernelTable:
        """Names every kernel that a table for this model may name on an architecture ("9.0a"): what a measurement
        wants compiled."""
        has_fa3 = spec.page_dtype == spec.dtype and arch.startswith(f"{HOPPER}.")
        shared: SharedKernel = "prefill_fa3_chunks" if has_fa3 else "prefill_fa2"
        return cls(shared=shared, decode_leaf="decode_cuda_cores", row_leaf="prefill_fa2", fused_levels=True)

    def reasons_against(self, spec: AttentionSpec) -> list[str]:
        """What speaks against these kernels for a model on its device."""
        reasons = []
        fa3 = sorted({name for name in self.names if name.startswith("prefill_fa3")})
        if fa3 and spec.page_dtype != spec.dtype:
            reasons.append(
                f"{' and '.join(fa3)}: fa3 reads {str(spec.page_dtype).removeprefix('torch.')} pages with queries of "
                "that dtype only: leave out kv_cache_dtype, or let prefill_fa2 serve"
            )
        if fa3 and spec.device.type == "cuda" and torch.cuda.get_device_capability(spec.device)[0] != HOPPER:
            reasons.append(f"{' and '.join(fa3)}: fa3 is for Hopper alone: let prefill_fa2 serve")
        return reasons


def fa3_tile_rows(head_dim: int) -> int:
    """Rows of one head that a thread block of fa3 takes."""
    return FA3_TILE_ROWS_64 if head_dim == 64 else FA3_TILE_ROWS

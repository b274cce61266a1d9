"""FlashInfer's calls in torch, by FlashInfer's rules, each of which is checked here rather than hoped for.

Signatures are those recorded in `tests/attention/flashinfer_signatures.json`. A plan lives in the bytes of the
wrapper's int workspace and nowhere else: a run, and the replay of a run, reads it from there, so a plan that is stale,
overwritten or still on its way gives wrong results. Rows outside `qo_indptr` are poisoned, where the original leaves
whatever was there.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Set
from typing import Any

import torch

from cascade_llm.attention.flashinfer.backend import GpuPlatform
from cascade_llm.attention.flashinfer.ops import FlashInferOps
from tests.doubles.device import DoubleStream
from tests.doubles.kernels import assign, merge_states_in_place, normalized
from tests.doubles.planner import DoubleError
from tests.doubles.wrappers import HEAD_DIMS, DecodeWrapper, PrefillWrapper

__all__ = ["ARCH", "FlashInferDouble"]

ARCH = (9, 0)
"""Hopper's."""


class FlashInferDouble:
    """Everything that `FlashInferOps` names, on one `DoubleStream`.

    `exact` lets float32 through, which the original refuses: for comparing whole engines token by token.
    """

    def __init__(self, stream: DoubleStream, *, num_sm: int = 132, exact: bool = False) -> None:
        self.stream, self.num_sm = stream, num_sm
        self.dtypes = (torch.bfloat16, torch.float16, *((torch.float32,) if exact else ()))
        self.num_plans = 0
        self.num_runs = 0
        self.published_pages: frozenset[int] = frozenset()
        self._own_slots: frozenset[int] | None = None
        self._appends_of_others: dict[int, tuple[set[int], set[int]]] = {}
        self._variants: set[tuple[Any, ...]] = set()
        self._workspaces: dict[int, DoubleStream] = {}

    def ops(self) -> FlashInferOps:
        """The calls."""
        return FlashInferOps(
            BatchPrefillWithPagedKVCacheWrapper=functools.partial(PrefillWrapper, self),
            BatchDecodeWithPagedKVCacheWrapper=functools.partial(DecodeWrapper, self),
            merge_state_in_place=self.merge_state_in_place,
            append_paged_kv_cache=self.append_paged_kv_cache,
            rmsnorm=self.rmsnorm,
            fused_add_rmsnorm=self.fused_add_rmsnorm,
            gemma_rmsnorm=self.gemma_rmsnorm,
            gemma_fused_add_rmsnorm=self.gemma_fused_add_rmsnorm,
            silu_and_mul=self.silu_and_mul,
            apply_rope_with_cos_sin_cache_inplace=self.apply_rope_with_cos_sin_cache_inplace,
        )

    def platform(self) -> GpuPlatform:
        """A GPU made of doubles."""
        return GpuPlatform(self.ops(), self.stream, self.num_sm, ARCH)

    def expect_appends(
        self,
        published_pages: set[int],
        own_slots: set[int] | None = None,
        others: Mapping[int, tuple[set[int], set[int]]] | None = None,
    ) -> None:
        """From here on in the stream appends touch no published page, and no slot but these; None: any other.

        others: the same for the layers, by the address of their K, whose pages have ids of their own
        """
        pages, slots = frozenset(published_pages), None if own_slots is None else frozenset(own_slots)

        def expect() -> None:
            self.published_pages, self._own_slots = pages, slots
            self._appends_of_others = dict(others or {})

        self.stream.enqueue(expect, [])

    # -- shared checks ----------------------------------------------------------------------------------------------

    def use(self, *variant: Any) -> None:
        """A kernel variant is compiled and loaded at its first use, which a capture does not survive."""
        if variant not in self._variants:
            if self.stream.capturing:
                raise DoubleError(f"first use of {variant} during capture: warm it up before")
            self._variants.add(variant)

    def check_dtype(self, tensor: torch.Tensor, what: str) -> None:
        if tensor.dtype not in self.dtypes:
            raise DoubleError(f"{what} is {tensor.dtype}")

    def claim_workspace(self, workspace: torch.Tensor) -> None:
        """One float workspace serves one stream."""
        owner = self._workspaces.setdefault(workspace.data_ptr(), self.stream)
        if owner is not self.stream:
            raise DoubleError("two streams share a float workspace")

    # -- calls ------------------------------------------------------------------------------------------------------

    def merge_state_in_place(
        self,
        v: torch.Tensor,
        s: torch.Tensor,
        v_other: torch.Tensor,
        s_other: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> None:
        rows, heads, head_dim = v.shape
        for tensor in (v, v_other):
            self.check_dtype(tensor, "v")
            if not tensor.is_contiguous():
                raise DoubleError("merge_state reads and writes v as contiguous memory")
        if s.dtype != torch.float32:
            raise DoubleError("s is converted to a copy unless it is float32: the merge would be lost")
        if v.dtype != v_other.dtype or v.shape != v_other.shape or s.shape != (rows, heads) or s_other.shape != s.shape:
            raise DoubleError(f"merge of {v.shape} {s.shape} with {v_other.shape} {s_other.shape}")
        if head_dim not in (*HEAD_DIMS, 512) or head_dim // 8 * heads > 1024 or mask is not None:
            raise DoubleError(f"merge_state of {heads} heads of {head_dim}")
        self.use("merge_state", v.dtype, head_dim)
        self.stream.launch(lambda: merge_states_in_place(v, s, v_other, s_other), [v, s, v_other, s_other])

    def append_paged_kv_cache(
        self,
        append_key: torch.Tensor,
        append_value: torch.Tensor,
        batch_indices: torch.Tensor,
        positions: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        kv_indices: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_last_page_len: torch.Tensor,
        kv_layout: str = "NHD",
    ) -> None:
        k_cache, v_cache = paged_kv_cache
        if not k_cache.dtype == v_cache.dtype == append_key.dtype == append_value.dtype:
            raise DoubleError("append reinterprets the bytes of another dtype")
        if kv_layout != "NHD" or k_cache.stride() != v_cache.stride():
            raise DoubleError("K and V pools must be NHD, with equal strides")
        for name, column in (("batch_indices", batch_indices), ("positions", positions), ("kv_indices", kv_indices)):
            if column.dtype != torch.int32:
                raise DoubleError(f"{name} is {column.dtype}: converted by another kernel")
        if len(batch_indices) != len(append_key) or len(positions) != len(append_key):
            raise DoubleError("batch_indices and positions need an entry per row")
        if append_key.stride(-1) != 1 or append_value.stride(-1) != 1:
            raise DoubleError("the head dimension of appended rows must be contiguous")
        self.use("append", k_cache.dtype, k_cache.shape[-1])

        def run() -> None:
            page_size = k_cache.shape[1]
            entry = kv_indptr[batch_indices.long()] + positions // page_size
            if bool((entry < 0).any()) or bool((entry >= len(kv_indices)).any()):
                raise DoubleError("append outside the page table")
            pages, offsets = kv_indices[entry.long()].long(), (positions % page_size).long()
            self._check_append(k_cache.data_ptr(), pages.tolist(), (pages * page_size + offsets).tolist())
            for cache, rows in ((k_cache, append_key), (v_cache, append_value)):
                if cache.dtype.itemsize == 1:
                    cache.view(torch.uint8)[pages, offsets] = rows.view(torch.uint8)
                else:
                    cache[pages, offsets] = rows

        table = [batch_indices, kv_indices, kv_indptr, kv_last_page_len]
        self.stream.launch(run, [append_key, append_value, positions, *table, k_cache, v_cache])

    def _check_append(self, address: int, pages: list[int], slots: list[int]) -> None:
        published_pages: Set[int] = self.published_pages
        own_slots: Set[int] | None = self._own_slots
        if address in self._appends_of_others:
            published_pages, own_slots = self._appends_of_others[address]
        published = published_pages.intersection(pages)
        if published:
            raise DoubleError(f"append to published pages {sorted(published)[:4]}")
        strange = set() if own_slots is None else set(slots) - own_slots
        if strange:
            raise DoubleError(f"append to slots {sorted(strange)[:4]}, which no row of the step owns")

    def rmsnorm(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        eps: float = 1e-6,
        out: torch.Tensor | None = None,
        enable_pdl: bool | None = None,
    ) -> torch.Tensor:
        self.check_dtype(input, "input")
        if input.dim() not in (2, 3) or weight.dtype != input.dtype or input.stride(-1) != 1:
            raise DoubleError(f"rmsnorm of {input.shape} {input.dtype} with {weight.dtype}")
        self.use("rmsnorm", input.dtype, input.dim())
        result = torch.empty(input.shape, dtype=input.dtype, device=input.device) if out is None else out
        self.stream.launch(lambda: assign(result, normalized(input, weight, eps)), [input, weight, result])
        return result

    def fused_add_rmsnorm(
        self,
        input: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float = 1e-6,
        enable_pdl: bool | None = None,
    ) -> None:
        self.check_dtype(input, "input")
        if not input.dtype == residual.dtype == weight.dtype or input.dim() != 2 or input.shape != residual.shape:
            raise DoubleError(f"fused_add_rmsnorm of {input.shape} and {residual.shape}")
        self.use("fused_add_rmsnorm", input.dtype)

        def run() -> None:
            total = input.float() + residual.float()
            residual.copy_(total)
            input.copy_(normalized(total, weight, eps))

        self.stream.launch(run, [input, residual, weight])

    def gemma_rmsnorm(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        eps: float = 1e-6,
        out: torch.Tensor | None = None,
        enable_pdl: bool | None = None,
    ) -> torch.Tensor:
        self.check_dtype(input, "input")
        if input.dim() != 2 or weight.dtype != input.dtype or input.stride(-1) != 1:
            raise DoubleError(f"gemma_rmsnorm of {input.shape} {input.dtype} with {weight.dtype}")
        self.use("gemma_rmsnorm", input.dtype)
        result = torch.empty(input.shape, dtype=input.dtype, device=input.device) if out is None else out
        self.stream.launch(lambda: assign(result, normalized(input, 1 + weight.float(), eps)), [input, weight, result])
        return result

    def gemma_fused_add_rmsnorm(
        self,
        input: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float = 1e-6,
        enable_pdl: bool | None = None,
    ) -> None:
        self.check_dtype(input, "input")
        if not input.dtype == residual.dtype == weight.dtype or input.dim() != 2 or input.shape != residual.shape:
            raise DoubleError(f"gemma_fused_add_rmsnorm of {input.shape} and {residual.shape}")
        self.use("gemma_fused_add_rmsnorm", input.dtype)

        def run() -> None:
            total = input.float() + residual.float()
            residual.copy_(total)
            input.copy_(normalized(total, 1 + weight.float(), eps))

        self.stream.launch(run, [input, residual, weight])

    def silu_and_mul(
        self, input: torch.Tensor, out: torch.Tensor | None = None, enable_pdl: bool | None = None
    ) -> torch.Tensor:
        self.check_dtype(input, "input")
        if input.shape[-1] * input.element_size() % 32 or not input.is_contiguous():
            raise DoubleError("silu_and_mul reads 16 bytes at a time from each contiguous half")
        self.use("silu_and_mul", input.dtype)
        half = input.shape[-1] // 2
        result = torch.empty((*input.shape[:-1], half), dtype=input.dtype, device=input.device) if out is None else out

        def run() -> None:
            gate, up = input.float().split(half, dim=-1)
            result.copy_(torch.nn.functional.silu(gate) * up)

        self.stream.launch(run, [input, result])
        return result

    def apply_rope_with_cos_sin_cache_inplace(
        self,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        head_size: int,
        cos_sin_cache: torch.Tensor,
        is_neox: bool = True,
    ) -> None:
        if cos_sin_cache.dtype != torch.float32 or not cos_sin_cache.is_contiguous():
            raise DoubleError("cos_sin_cache must be contiguous float32")
        if positions.dtype not in (torch.int32, torch.int64) or len(positions) != len(query):
            raise DoubleError("positions must be integers, one per row")
        for heads in (query, key):
            self.check_dtype(heads, "query and key")
            if heads.dim() != 2 or heads.stride(-1) != 1 or heads.shape[1] % head_size:
                raise DoubleError("query and key must be [rows, heads * head_size], contiguous in a row")
        self.use("rope", query.dtype, head_size)

        def run() -> None:
            cos, sin = cos_sin_cache[positions.long()].unsqueeze(1).chunk(2, dim=-1)
            for heads in (query, key):
                parts = heads.unflatten(1, (-1, head_size))[..., : cos_sin_cache.shape[1]]
                pairs = parts.float().unflatten(-1, (2, -1) if is_neox else (-1, 2))
                a, b = pairs.unbind(-2 if is_neox else -1)
                turned = a * cos - b * sin, b * cos + a * sin
                parts.copy_(torch.stack(turned, dim=-2 if is_neox else -1).flatten(-2))

        self.stream.launch(run, [positions, query, key, cos_sin_cache])

"""Where every byte of K and V lies: one pool of pages per layer, in FlashInfer's layouts.

Layers of an attention kind with a window may have fewer pages than the others: their page ids are of their own.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch

from cascade_llm.errors import PlanError
from cascade_llm.kv_cache.page_dtypes import has_vector_scales, int8_vectors, rounded_to_float
from cascade_llm.plan import PageCopy

__all__ = ["KVLayout", "KVScale", "PagedKVCache"]

KVLayout = Literal["NHD", "HND"]
PRIVATE = {} if os.name == "nt" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
"""Memory that a fork would share is counted otherwise by containers."""


class KVScale(NamedTuple):
    """What the stored numbers of a layer are multiplied by to give its K and V; other than 1 for 8-bit floats only."""

    k: float = 1.0
    v: float = 1.0


class PagedKVCache:
    """K and V of every layer, in pages.

    Slot s of a layer is token s % page_size of page s // page_size. K and V of a layer are two contiguous tensors, so
    that in NHD the slots of a layer are one flat dimension: a row is written by its slot alone, and tokens in
    consecutive slots are read as a view.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int | Sequence[int],
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        layout: KVLayout = "NHD",
        scales: Sequence[KVScale] | None = None,
        layer_kinds: Sequence[int] = (),
    ) -> None:
        """Set the memory aside.

        Args:
            num_pages: of every layer, or one number for each attention kind, the first the largest
            scales: one per layer, for pages of 8-bit floats; default 1
            layer_kinds: [layers] the kind of each layer, where kinds have pages of their own
        """
        self.kind_pages = (num_pages,) if isinstance(num_pages, int) else tuple(num_pages)
        """Pages in the layers of each attention kind; one number where all layers have the same."""
        assert self.kind_pages[0] == max(self.kind_pages)
        self._layer_kinds = list(layer_kinds) if len(self.kind_pages) > 1 else [0] * num_layers
        self.page_size = page_size
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.dtype, self.device, self.layout = dtype, torch.device(device), layout
        self.scales = [KVScale()] * num_layers if scales is None else list(scales)
        assert len(self.scales) == num_layers
        assert dtype == torch.float8_e4m3fn or set(self.scales) <= {KVScale()}
        inner = (page_size, num_kv_heads) if layout == "NHD" else (num_kv_heads, page_size)
        shapes = [(2, self.kind_pages[kind], *inner, head_dim) for kind in self._layer_kinds]
        assert len(shapes) == num_layers
        self._layers = [_zeros(shape, dtype, self.device) for shape in shapes]
        self._vector_scales: list[torch.Tensor] = []
        if has_vector_scales(dtype):
            self._vector_scales = [_zeros(shape[:-1], torch.float32, self.device) for shape in shapes]

    @property
    def num_layers(self) -> int:
        """Layers that have a pool."""
        return len(self._layers)

    @property
    def num_pages(self) -> int:
        """Of the layers that have the most."""
        return self.kind_pages[0]

    @property
    def num_slots(self) -> int:
        """Tokens that the pool of a layer holds, of those that have the most pages."""
        return self.num_pages * self.page_size

    def num_slots_of(self, kind: int) -> int:
        """Tokens that the pool of a layer of an attention kind holds."""
        return self.kind_pages[kind] * self.page_size

    @property
    def num_bytes(self) -> int:
        """Memory of all layers' pools, scales included."""
        return sum(x.numel() * x.element_size() for x in (*self._layers, *self._vector_scales))

    def layer(self, index: int) -> torch.Tensor:
        """K and V of one layer, the pool itself.

        Returns:
            [2, pages, page_size, num_kv_heads, head_dim] for NHD, [2, pages, num_kv_heads, page_size, head_dim] for
            HND, with as many pages as the layer's kind has; `k, v = layer(i)` gives two contiguous tensors,
            FlashInfer's tuple `paged_kv_cache`
        """
        return self._layers[index]

    def vector_scales(self, index: int) -> torch.Tensor | None:
        """What the vectors of int8 pages are multiplied by, the pool's own memory; None for pages of another dtype.

        Returns:
            float32, the shape of `layer(index)` without its last dimension
        """
        return self._vector_scales[index] if self._vector_scales else None

    def encode(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        """x, of any shape [...], in the pool's floating-point dtype; see `rounded_to_float`."""
        return rounded_to_float(x, self.dtype, scale)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Store k and v, both [rows, num_kv_heads, head_dim], at int64 `slots` [rows]."""
        own_scales = self.vector_scales(layer)
        for part, (x, scale) in enumerate(zip((k, v), self.scales[layer], strict=True)):
            if own_scales is None:
                numbers = self.encode(x, scale)
            else:
                numbers, scales = int8_vectors(x)
                self._put(own_scales[part], slots, scales)
            self._put(_bytes_of(self._layers[layer][part]), slots, _bytes_of(numbers))

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of K and V, both [tokens, num_kv_heads, head_dim], at int64 `slots` [tokens]; for checks and twins.

        8-bit pages are read as the float32 that they stand for.
        """
        k, v = (self._take(pool, slots).view(self.dtype) for pool in _bytes_of(self._layers[layer]))
        if self.dtype.itemsize > 1:
            return k, v
        own_scales = self.vector_scales(layer)
        if own_scales is None:
            scale = self.scales[layer]
            return k.float() * scale.k, v.float() * scale.v
        k_scales, v_scales = (self._take(scales, slots).unsqueeze(-1) for scales in own_scales)
        return k.float() * k_scales, v.float() * v_scales

    def copy_pages(
        self, copies: Sequence[PageCopy], upload: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        """Copy whole pages in every layer of their pool; all sources are read before any target is written.

        upload: brings page ids [2, copies] to the device without waiting for it; default a plain copy, which waits
        """
        if not copies:
            return
        if any(copy.source_tier or copy.target_tier for copy in copies):
            raise PlanError("a plan copies pages of another tier than the device, and this pool has no other")
        for kind in sorted({copy.pool for copy in copies}):
            pairs = torch.tensor([[copy.source, copy.target] for copy in copies if copy.pool == kind]).T.contiguous()
            source, target = pairs.to(self.device) if upload is None else upload(pairs)
            own = [layer for layer, layer_kind in enumerate(self._layer_kinds) if layer_kind == kind]
            for pools in (self._layers, self._vector_scales):
                for pool in [_bytes_of(pools[layer]) for layer in own if pools]:
                    pool[:, target] = pool[:, source]

    def _put(self, pool: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Rows [rows, num_kv_heads, ...] to their slots of a pool [num_pages, ...] of K or V, or of their scales."""
        if self.layout == "NHD":
            pool.flatten(0, 1).index_put_((slots,), rows)
        else:
            pool[slots // self.page_size, :, slots % self.page_size] = rows

    def _take(self, pool: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """A copy of what `_put` stored."""
        if self.layout == "NHD":
            return pool.flatten(0, 1)[slots]
        return pool[slots // self.page_size, :, slots % self.page_size]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros of a shape. On the CPU the system gives each piece of memory when it is first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **PRIVATE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _bytes_of(x: torch.Tensor) -> torch.Tensor:
    """8-bit floats as bytes, which torch can index everywhere; other types as they are."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x

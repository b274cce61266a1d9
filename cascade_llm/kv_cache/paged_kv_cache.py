"""Where every byte of K and V lies: one pool of pages per layer, in FlashInfer's layouts."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch

from cascade_llm.errors import PlanError
from cascade_llm.plan import PageCopy

__all__ = ["KVLayout", "KVScale", "PagedKVCache"]

KVLayout = Literal["NHD", "HND"]
PRIVATE = {} if os.name == "nt" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
"""Memory that a fork would share is counted otherwise by containers."""


class KVScale(NamedTuple):
    """What the stored numbers of a layer are multiplied by to give its K and V; only 8-bit pages have other than 1."""

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
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        layout: KVLayout = "NHD",
        scales: Sequence[KVScale] | None = None,
    ) -> None:
        """`scales`: one per layer, for pages of 8 bits; default 1."""
        self.num_pages, self.page_size = num_pages, page_size
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.dtype, self.device, self.layout = dtype, torch.device(device), layout
        self.scales = [KVScale()] * num_layers if scales is None else list(scales)
        assert len(self.scales) == num_layers
        assert dtype.itemsize == 1 or set(self.scales) <= {KVScale()}
        inner = (page_size, num_kv_heads) if layout == "NHD" else (num_kv_heads, page_size)
        shape = (2, num_pages, *inner, head_dim)
        self._layers = [_zeros(shape, dtype, self.device) for _ in range(num_layers)]

    @property
    def num_layers(self) -> int:
        """Layers that have a pool."""
        return len(self._layers)

    @property
    def num_slots(self) -> int:
        """Tokens that the pool of a layer holds."""
        return self.num_pages * self.page_size

    @property
    def num_bytes(self) -> int:
        """Memory of all layers' pools."""
        return sum(layer.numel() * layer.element_size() for layer in self._layers)

    def layer(self, index: int) -> torch.Tensor:
        """K and V of one layer, the pool itself.

        Returns:
            [2, num_pages, page_size, num_kv_heads, head_dim] for NHD, [2, num_pages, num_kv_heads, page_size,
            head_dim] for HND; `k, v = layer(i)` gives two contiguous tensors, FlashInfer's tuple `paged_kv_cache`
        """
        return self._layers[index]

    def encode(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        """x, of any shape [...], in the pool's dtype. 8-bit numbers are divided by their scale in float32 and
        clamped to the largest that there is: a conversion may make NaN of what lies beyond."""
        if self.dtype.itemsize > 1:
            return x.to(self.dtype)
        limit = torch.finfo(self.dtype).max
        scaled = x if scale == 1.0 else x.float() / scale
        return scaled.clamp(-limit, limit).to(self.dtype)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Store k and v, both [rows, num_kv_heads, head_dim], at int64 `slots` [rows]."""
        k_pool, v_pool = _bytes_of(self._layers[layer])
        scale = self.scales[layer]
        k, v = _bytes_of(self.encode(k, scale.k)), _bytes_of(self.encode(v, scale.v))
        if self.layout == "NHD":
            self._by_slot(k_pool).index_put_((slots,), k)
            self._by_slot(v_pool).index_put_((slots,), v)
        else:
            pages, offsets = slots // self.page_size, slots % self.page_size
            k_pool[pages, :, offsets] = k
            v_pool[pages, :, offsets] = v

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of K and V, both [tokens, num_kv_heads, head_dim], at int64 `slots` [tokens]; for checks and twins.

        8-bit pages are read as the float32 that they stand for.
        """
        k_pool, v_pool = _bytes_of(self._layers[layer])
        if self.layout == "NHD":
            k, v = self._by_slot(k_pool)[slots], self._by_slot(v_pool)[slots]
        else:
            pages, offsets = slots // self.page_size, slots % self.page_size
            k, v = k_pool[pages, :, offsets], v_pool[pages, :, offsets]
        if self.dtype.itemsize > 1:
            return k, v
        scale = self.scales[layer]
        return k.view(self.dtype).float() * scale.k, v.view(self.dtype).float() * scale.v

    def copy_pages(
        self, copies: Sequence[PageCopy], upload: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        """Copy whole pages in every layer; all sources are read before any target is written.

        upload: brings page ids [2, copies] to the device without waiting for it; default a plain copy, which waits
        """
        if not copies:
            return
        if any(copy.source_tier or copy.target_tier for copy in copies):
            raise PlanError("a plan copies pages of another tier than the device, and this pool has no other")
        pages = torch.tensor([[copy.source for copy in copies], [copy.target for copy in copies]])
        source, target = pages.to(self.device) if upload is None else upload(pages)
        for pool in map(_bytes_of, self._layers):
            pool[:, target] = pool[:, source]

    def _by_slot(self, pool: torch.Tensor) -> torch.Tensor:
        return pool.view(self.num_slots, self.num_kv_heads, self.head_dim)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros of a shape. On the CPU the system gives each piece of memory when it is first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **PRIVATE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _bytes_of(x: torch.Tensor) -> torch.Tensor:
    """8-bit floats as bytes, which torch can index everywhere; other types as they are."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x

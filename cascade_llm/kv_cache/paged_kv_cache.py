"""Where every byte of K and V lies: one pool of pages per layer, in FlashInfer's layouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from cascade_llm.plan import PageCopy

__all__ = ["KVLayout", "PagedKVCache"]

KVLayout = Literal["NHD", "HND"]


class PagedKVCache:
    """K and V of every layer, in pages.

    Each layer has one tensor, [num_pages, 2, page_size, num_kv_heads, head_dim] for NHD or
    [num_pages, 2, num_kv_heads, page_size, head_dim] for HND; index 0 of the second dimension is K, 1 is V. Slot s of
    a layer is token s % page_size of page s // page_size.
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
    ) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.dtype, self.device, self.layout = dtype, torch.device(device), layout
        inner = (page_size, num_kv_heads) if layout == "NHD" else (num_kv_heads, page_size)
        shape = (num_pages, 2, *inner, head_dim)
        self._layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]

    @property
    def num_layers(self) -> int:
        """Layers that have a pool."""
        return len(self._layers)

    @property
    def num_bytes(self) -> int:
        """Memory of all layers' pools."""
        return sum(layer.numel() * layer.element_size() for layer in self._layers)

    def layer(self, index: int) -> torch.Tensor:
        """The 5-D tensor of one layer, K and V together (FlashInfer's `paged_kv_cache`)."""
        return self._layers[index]

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Store k and v, both [rows, num_kv_heads, head_dim], at int64 `slots` [rows]."""
        pages, offsets = slots // self.page_size, slots % self.page_size
        pool = self._layers[layer]
        if self.layout == "NHD":
            pool[pages, 0, offsets] = k.to(self.dtype)
            pool[pages, 1, offsets] = v.to(self.dtype)
        else:
            pool[pages, 0, :, offsets] = k.to(self.dtype)
            pool[pages, 1, :, offsets] = v.to(self.dtype)

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Copy whole pages in every layer; all sources are read before any target is written."""
        if not copies:
            return
        source = torch.tensor([copy.source for copy in copies], device=self.device)
        target = torch.tensor([copy.target for copy in copies], device=self.device)
        for pool in self._layers:
            pool[target] = pool[source]

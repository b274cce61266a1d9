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
    ) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.dtype, self.device, self.layout = dtype, torch.device(device), layout
        inner = (page_size, num_kv_heads) if layout == "NHD" else (num_kv_heads, page_size)
        shape = (2, num_pages, *inner, head_dim)
        self._layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]

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

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Store k and v, both [rows, num_kv_heads, head_dim], at int64 `slots` [rows]."""
        k_pool, v_pool = self._layers[layer]
        if self.layout == "NHD":
            self._by_slot(k_pool).index_put_((slots,), k.to(self.dtype))
            self._by_slot(v_pool).index_put_((slots,), v.to(self.dtype))
        else:
            pages, offsets = slots // self.page_size, slots % self.page_size
            k_pool[pages, :, offsets] = k.to(self.dtype)
            v_pool[pages, :, offsets] = v.to(self.dtype)

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of K and V, both [tokens, num_kv_heads, head_dim], at int64 `slots` [tokens]; for checks and twins."""
        k_pool, v_pool = self._layers[layer]
        if self.layout == "NHD":
            return self._by_slot(k_pool)[slots], self._by_slot(v_pool)[slots]
        pages, offsets = slots // self.page_size, slots % self.page_size
        return k_pool[pages, :, offsets], v_pool[pages, :, offsets]

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Copy whole pages in every layer; all sources are read before any target is written."""
        if not copies:
            return
        source = torch.tensor([copy.source for copy in copies], device=self.device)
        target = torch.tensor([copy.target for copy in copies], device=self.device)
        for pool in self._layers:
            pool[:, target] = pool[:, source]

    def _by_slot(self, pool: torch.Tensor) -> torch.Tensor:
        return pool.view(self.num_slots, self.num_kv_heads, self.head_dim)

from __future__ import annotations

import psutil
import pytest
import torch

from cascade_llm.kv_cache.paged_kv_cache import KVLayout, PagedKVCache
from cascade_llm.plan import PageCopy

LAYOUTS: list[KVLayout] = ["NHD", "HND"]


def make_cache(layout: KVLayout, dtype: torch.dtype = torch.float32) -> PagedKVCache:
    return PagedKVCache(num_layers=2, num_pages=7, page_size=4, num_kv_heads=3, head_dim=8, dtype=dtype, layout=layout)


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_written_rows_are_where_the_layout_says(layout: KVLayout) -> None:
    cache, slots = make_cache(layout), torch.tensor([27, 0, 5, 13])
    k, v = rows(4, 0), rows(4, 1)
    cache.write(1, k, v, slots)
    k_pool, v_pool = cache.layer(1)
    assert k_pool.is_contiguous()
    assert v_pool.is_contiguous()
    for row, slot in enumerate(slots.tolist()):
        page, offset = divmod(slot, 4)
        place = (page, offset) if layout == "NHD" else (page, slice(None), offset)
        assert torch.equal(k_pool[place], k[row])
        assert torch.equal(v_pool[place], v[row])
    assert cache.layer(1).count_nonzero() == k.numel() + v.numel()
    assert cache.layer(0).count_nonzero() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_read_gives_what_was_written(layout: KVLayout) -> None:
    cache, slots = make_cache(layout), torch.randperm(28, generator=torch.Generator().manual_seed(0))
    k, v = rows(28, 0), rows(28, 1)
    cache.write(0, k, v, slots)
    read_k, read_v = cache.read(0, slots[3:9])
    assert torch.equal(read_k, k[3:9])
    assert torch.equal(read_v, v[3:9])


def test_rows_are_rounded_to_the_dtype_of_the_pool() -> None:
    cache, slots = make_cache("NHD", torch.bfloat16), torch.tensor([3])
    k, v = rows(1, 0), rows(1, 1)
    cache.write(0, k, v, slots)
    assert torch.equal(cache.read(0, slots)[0], k.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_float16_cannot_hold_is_read_as_nan(dtype: torch.dtype) -> None:
    cache, slots = make_cache("NHD", torch.float16), torch.tensor([3])
    k, v = rows(1, 0).to(dtype), rows(1, 1).to(dtype)
    k[0, 1, :4] = torch.tensor([65_280, -65_280, 65_536, -1e9])  # these are numbers of bfloat16 too
    v[0, 2, 5] = torch.inf
    cache.write(0, k, v, slots)
    read_k, read_v = cache.read(0, slots)
    assert read_k[0, 1, :2].tolist() == [65_280, -65_280]
    assert read_k[0, 1, 2:4].isnan().all()
    assert (int(read_k.isnan().sum()), int(read_v.isnan().sum())) == (2, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_page_copies_read_before_they_write(layout: KVLayout) -> None:
    cache, every_slot = make_cache(layout), torch.arange(28)
    for layer in range(2):
        cache.write(layer, rows(28, layer), rows(28, layer + 2), every_slot)
    before = [tuple(x.view(7, 4, 3, 8).clone() for x in cache.read(layer, every_slot)) for layer in range(2)]
    cache.copy_pages([PageCopy(0, 1), PageCopy(1, 2), PageCopy(6, 0)])
    for layer in range(2):
        for old, new in zip(before[layer], cache.read(layer, every_slot), strict=True):
            assert torch.equal(new.view(7, 4, 3, 8), old[[6, 0, 1, 3, 4, 5, 6]])


def test_no_copies_are_no_work() -> None:
    cache = make_cache("NHD")
    cache.copy_pages([])
    assert cache.layer(0).count_nonzero() == 0


def test_sizes() -> None:
    cache = make_cache("NHD", torch.bfloat16)
    assert (cache.num_layers, cache.num_slots) == (2, 28)
    assert cache.num_bytes == 2 * 2 * 28 * 3 * 8 * 2


def test_a_pool_on_the_cpu_is_zero_and_costs_memory_as_it_is_written() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    shape = {"num_layers": 2, "num_pages": 1 << 14, "page_size": 16, "num_kv_heads": 4, "head_dim": 64}
    cache = PagedKVCache(**shape, dtype=torch.float32)
    assert cache.num_bytes == 1 << 30
    assert process.memory_info().rss - before < 50_000_000
    slots = torch.arange(1000, 1064)
    cache.write(1, torch.ones(64, 4, 64), torch.ones(64, 4, 64), slots)
    assert process.memory_info().rss - before < 50_000_000
    assert cache.layer(1)[0].view(-1, 4, 64)[990:1074].sum() == 64 * 4 * 64

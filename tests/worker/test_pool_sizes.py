"""How memory is shared out between the pools of attention kinds."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cascade_llm.config import window_pages_needed
from cascade_llm.worker.pool_sizes import PoolShape

SHAPE = PoolShape(
    page_size=16,
    max_model_len=8192,
    max_num_seqs=64,
    max_num_batched_tokens=8192,
    page_bytes=(3 << 14, 15 << 14),
    windows=(512,),
)


@given(
    num_bytes=st.integers(0, 1 << 34),
    window_len=st.integers(1, 20_000),
    max_model_len=st.integers(1, 40_000),
    max_num_seqs=st.integers(1, 300),
    lean=st.booleans(),
)
def test_pools_fit_the_memory_and_one_more_page_would_not(
    num_bytes: int, window_len: int, max_model_len: int, max_num_seqs: int, lean: bool
) -> None:
    shape = replace(SHAPE, windows=(window_len,), max_model_len=max_model_len, max_num_seqs=max_num_seqs)
    total = shape.most(num_bytes, lean=lean)
    pages = shape.with_windows(total, lean=lean)
    assert shape.num_bytes(pages) <= num_bytes
    wanted = max_num_seqs * shape.pages_per_sequence
    assert total == wanted or shape.num_bytes(shape.with_windows(total + 1, lean=lean)) > num_bytes
    assert pages[1] <= pages[0]
    if total >= shape.pages_per_sequence:  # a sequence of any length runs by itself
        assert pages[1] >= window_pages_needed(window_len, 16, max_model_len, 1)


def test_one_pool_is_what_the_memory_gives() -> None:
    shape = replace(SHAPE, windows=(), page_bytes=(1 << 18,))
    assert shape.most(1 << 30) == 4096
    assert shape.with_windows(4096) == (4096,)
    assert shape.bytes_per_sequence == 512 << 18


def test_windows_make_room_for_more_sequences() -> None:
    one = replace(SHAPE, windows=(), page_bytes=(sum(SHAPE.page_bytes),))
    assert SHAPE.most(1 << 30) > 2 * one.most(1 << 30)

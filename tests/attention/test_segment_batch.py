from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.segment_batch import Blocking, Segment, read_segments, split_into_batches
from tests.cascade_cases import make_level

SPEC = AttentionSpec(
    num_layers=1,
    num_qo_heads=4,
    num_kv_heads=2,
    head_dim=8,
    sm_scale=1.0,
    dtype=torch.float32,
    device=torch.device("cpu"),
)
TOKEN_BYTES = 2 * 2 * 8 * 4


def segments_of(shapes: list[tuple[int, int]]) -> list[Segment]:
    """Neighbours with so many (rows, tokens)."""
    segments, row = [], 0
    for num_rows, kv_len in shapes:
        segments.append(Segment(row, num_rows, 0, kv_len))
        row += num_rows
    return segments


def test_segments_without_pages_are_skipped() -> None:
    level = make_level([(2, (), 0), (3, (7, 5), 3), (1, (), 0), (1, (2,), 4)])
    assert read_segments(level, 4) == [Segment(2, 3, 0, 7), Segment(6, 1, 2, 4)]
    assert read_segments(make_level([(2, (), 0)]), 4) == []


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 300)), min_size=1, max_size=40),
    st.integers(0, 5000),
    st.integers(1, 2000),
)
def test_every_segment_is_in_one_batch_within_the_limits(
    shapes: list[tuple[int, int]], batch_overhead: int, max_tokens: int
) -> None:
    segments = segments_of(shapes)
    blocking = Blocking(batch_overhead=batch_overhead, gathered_bytes_per_batch=max_tokens * TOKEN_BYTES)
    batches = split_into_batches(segments, blocking, SPEC)
    assert Counter(segment for batch in batches for segment in batch) == Counter(segments)
    for batch in batches:
        assert batch == sorted(batch, key=lambda s: s.first_row)
        padded = max(s.kv_len for s in batch) * (max(s.num_rows for s in batch) + blocking.token_overhead)
        useful = sum(s.kv_len * (s.num_rows + blocking.token_overhead) for s in batch)
        assert len(batch) * padded - useful <= batch_overhead
        assert len(batch) == 1 or len(batch) * max(s.kv_len for s in batch) <= max_tokens


@pytest.mark.parametrize(
    ("shapes", "num_batches"),
    [
        ([(1, 50)] * 64, 1),
        ([(1, 60 + i % 7) for i in range(64)], 1),
        ([(1, 50)] * 32 + [(1, 4000)], 2),
        ([(1, 50)] * 32 + [(512, 600)], 2),
    ],
)
def test_like_goes_with_like(shapes: list[tuple[int, int]], num_batches: int) -> None:
    assert len(split_into_batches(segments_of(shapes), Blocking(), SPEC)) == num_batches

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade_llm.outputs import TokenLogprob
from cascade_llm.sampling.draw import BLOCK_LEN
from cascade_llm.sampling.logprobs import most_probable, token_logprobs
from tests.sampling.sampling_cases import random_logits


def reference_logprobs(logits: torch.Tensor, token_id: int, count: int) -> TokenLogprob:
    """Float64 and a full sort; ties by ascending id."""
    values = logits.double()
    logprobs = torch.log_softmax(values, -1).tolist()
    order = sorted(range(len(logprobs)), key=lambda i: (-float(values[i]), i))
    rank = 1 + int((values > values[token_id]).sum())
    return TokenLogprob(token_id, logprobs[token_id], rank, tuple((i, logprobs[i]) for i in order[:count]))


def check(found: TokenLogprob, expected: TokenLogprob) -> None:
    assert (found.token_id, found.rank) == (expected.token_id, expected.rank)
    assert found.logprob == pytest.approx(expected.logprob, abs=2e-5)
    assert [token_id for token_id, _ in found.top] == [token_id for token_id, _ in expected.top]
    assert [logprob for _, logprob in found.top] == pytest.approx([logprob for _, logprob in expected.top], abs=2e-5)


@given(
    vocab_size=st.sampled_from([3, 128, 1000]),
    scale=st.sampled_from([0.0, 1.0, 8.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    asked=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 999), st.integers(0, 30)), max_size=8),
)
def test_as_float64_and_a_full_sort_say(
    vocab_size: int, scale: float, dtype: torch.dtype, asked: list[tuple[int, int, int]]
) -> None:
    logits = random_logits(3, vocab_size, seed=vocab_size, scale=scale, dtype=dtype)
    rows, token_ids = [row for row, _, _ in asked], [token_id % vocab_size for _, token_id, _ in asked]
    counts = [count for _, _, count in asked]
    reports = token_logprobs(logits, rows, token_ids, counts)
    assert len(reports) == len(asked)
    for report, row, token_id, count in zip(reports, rows, token_ids, counts, strict=True):
        check(report, reference_logprobs(logits[row], token_id, min(count, vocab_size)))


def test_more_rows_than_one_chunk() -> None:
    logits = random_logits(50, 100_000, seed=4, dtype=torch.bfloat16)
    token_ids, counts = list(range(50)), [i % 3 for i in range(50)]
    together = token_logprobs(logits, range(50), token_ids, counts)
    for row in (0, 1, 20, 21, 41, 49):
        check(together[row], reference_logprobs(logits[row], row, counts[row]))
        assert token_logprobs(logits, [row], [row], [counts[row]]) == [together[row]]


def test_rows_that_are_not_finite_do_not_raise() -> None:
    logits = random_logits(4, 300, seed=1)
    logits[0, 5], logits[1, 5], logits[2] = math.nan, math.inf, -math.inf
    logits[3, 7] = -math.inf
    reports = token_logprobs(logits, range(4), [5, 7, 7, 7], [2, 2, 2, 2])
    assert math.isnan(reports[0].logprob)
    assert not math.isfinite(reports[1].logprob)
    assert not math.isfinite(reports[2].logprob)
    check(reports[3], reference_logprobs(logits[3], 7, 2))


@given(st.integers(1, 5 * BLOCK_LEN), st.integers(1, 20), st.integers(0, 10_000))
def test_the_most_probable_are_in_order_whatever_ties(vocab_size: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    choices = torch.tensor([-1.5, -0.0, 0.0, 0.5, 0.5, 2.0, -torch.inf])[: 1 + seed % 7]
    padded = torch.full((3, vocab_size + -vocab_size % BLOCK_LEN), -torch.inf)
    padded[:, :vocab_size] = choices[torch.randint(len(choices), (3, vocab_size), generator=generator)]
    count = min(count, vocab_size)
    ids, largest = most_probable(padded, count)
    expected = padded.sort(dim=-1, descending=True, stable=True)
    assert ids.tolist() == expected.indices[:, :count].tolist()
    assert largest.tolist() == expected.values[:, :count].tolist()

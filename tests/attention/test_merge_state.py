from __future__ import annotations

import math

import pytest
import torch

from cascade_llm.attention.merge_state import merge_state, merge_state_in_place

LOG2_E = math.log2(math.e)


def state_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q [rows, heads, dim], k and v [keys, heads, dim]."""
    scores = torch.einsum("rhd,khd->rhk", q, k)
    return torch.einsum("rhk,khd->rhd", scores.softmax(-1), v), scores.logsumexp(-1) * LOG2_E


def tensors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cut", [1, 5, 16])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_two_halves_make_the_whole(cut: int, scale: float) -> None:
    q, k, v = tensors(4, 3, 8) * scale, tensors(17, 3, 8, seed=1), tensors(17, 3, 8, seed=2)
    out, lse = merge_state(*state_of(q, k[:cut], v[:cut]), *state_of(q, k[cut:], v[cut:]))
    expected_out, expected_lse = state_of(q, k, v)
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_no_keys_are_neutral() -> None:
    v, s = tensors(4, 3, 8), tensors(4, 3)
    nothing = torch.zeros_like(v), torch.full_like(s, -torch.inf)
    for merged in (merge_state(v, s, *nothing), merge_state(*nothing, v, s)):
        torch.testing.assert_close(merged, (v, s))


def test_nothing_and_nothing_is_nothing() -> None:
    nothing = torch.zeros(4, 3, 8), torch.full((4, 3), -torch.inf)
    v, s = merge_state(*nothing, *nothing)
    assert torch.equal(v, nothing[0])
    assert torch.equal(s, nothing[1])


def test_scores_beyond_the_range_of_exp2() -> None:
    v_a, v_b = torch.ones(1, 1, 2), torch.zeros(1, 1, 2)
    v, s = merge_state(v_a, torch.tensor([[5000.0]]), v_b, torch.tensor([[5000.0]]))
    assert v.tolist() == [[[0.5, 0.5]]]
    assert s.item() == 5001.0


def test_arguments_stay_as_they_are_and_bfloat16_is_merged_in_float32() -> None:
    v_a, v_b = tensors(64, 3, 8).bfloat16(), tensors(64, 3, 8, seed=1).bfloat16()
    s_a, s_b = tensors(64, 3, seed=2), tensors(64, 3, seed=3)
    before = [x.clone() for x in (v_a, s_a, v_b, s_b)]
    v, s = merge_state(v_a, s_a, v_b, s_b)
    assert all(torch.equal(x, y) for x, y in zip((v_a, s_a, v_b, s_b), before, strict=True))
    expected, expected_s = merge_state(v_a.float(), s_a, v_b.float(), s_b)
    assert v.dtype == torch.bfloat16
    assert torch.equal(v, expected.bfloat16())
    assert torch.equal(s, expected_s)


def test_in_place_is_the_same() -> None:
    v, s, v_b, s_b = tensors(4, 3, 8), tensors(4, 3, seed=1), tensors(4, 3, 8, seed=2), tensors(4, 3, seed=3)
    expected = merge_state(v, s, v_b, s_b)
    merge_state_in_place(v, s, v_b, s_b)
    assert torch.equal(v, expected[0])
    assert torch.equal(s, expected[1])


def test_a_failed_row_stays_visible() -> None:
    v, s = tensors(2, 3, 8), tensors(2, 3)
    v[0, 0, 0] = s[0, 0] = torch.nan
    for merged, _ in (merge_state(v, s, v, s), merge_state(torch.zeros_like(v), torch.zeros_like(s), v, s)):
        assert merged[0, 0, 0].isnan()
        assert not merged[1].isnan().any()

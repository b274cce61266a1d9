"""Joining attention over two sets of keys into attention over both.

A state is (v, s): `v` is the attention output over some keys, `s` the logarithm, base 2, of its softmax denominator
(the log-sum-exp of the scores). Merging is associative and commutative up to rounding; the state of no keys at all,
(0, -inf), is neutral. Semantics as FlashInfer's `merge_state`; the identity is that of the online softmax
(Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867).
"""

from __future__ import annotations

import math

import torch

__all__ = ["merge_state", "merge_state_in_place"]

LN_2 = math.log(2.0)


def merge_state(
    v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state over the keys of a and of b together, computed in float32.

    Args:
        v_a, v_b: [rows, num_heads, head_dim]
        s_a, s_b: [rows, num_heads], float32, base 2; -inf where there are no keys, and there v must be 0

    Returns:
        v like v_a, s like s_a; (0, -inf) where both are empty, never NaN
    """
    v, s = v_a.to(torch.float32, copy=True), s_a.clone()
    merge_state_in_place(v, s, v_b, s_b)
    return v.to(v_a.dtype), s


def merge_state_in_place(v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor) -> None:
    """Merge another state into (v, s): v [rows, num_heads, head_dim] float32, s [rows, num_heads] base 2."""
    # how much of the whole the other is: sigmoid of the difference; -inf less -inf is NaN, any weight will do there
    weight = torch.sub(s_other, s).nan_to_num_(nan=0.0).mul_(LN_2).sigmoid_()
    v.lerp_(v_other.float(), weight.unsqueeze(-1))
    torch.logaddexp2(s, s_other, out=s)

from __future__ import annotations

import math

import pytest
import torch

from cascade_llm.attention.dense import Workspace, dense_attention


def tensors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spread", [1.0, 40.0, 2000.0])
def test_equals_float64_where_scores_are_large_too(spread: float) -> None:
    q, k, v = tensors(6, 5, 8) * spread, tensors(6, 70, 8, seed=1), tensors(6, 70, 8, seed=2)
    out, lse = dense_attention(q, k, v, 0.35, None, Workspace(torch.device("cpu")))
    scores = q.double() @ k.double().transpose(1, 2) * 0.35
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ v.double(), rtol=1e-5, atol=1e-5 * spread)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1) / math.log(2), rtol=1e-6, atol=1e-5)


def test_bias_falls_on_the_last_keys() -> None:
    """Two segments of three heads, two rows of a group of two: every row loses other keys."""
    q, k, v = tensors(6, 4, 8), tensors(6, 9, 8, seed=1), tensors(6, 9, 8, seed=2)
    bias = torch.zeros(2, 1, 2, 1, 4)
    bias[0, 0, 0, 0, 1:] = bias[0, 0, 1, 0, 3:] = bias[1, 0, 0, 0, :] = -torch.inf
    out, lse = dense_attention(q, k, v, 0.35, bias, Workspace(torch.device("cpu")))
    for segment, row, kv_len in ((0, 0, 6), (0, 1, 8), (1, 0, 5), (1, 1, 9)):
        heads, queries = slice(3 * segment, 3 * segment + 3), slice(2 * row, 2 * row + 2)
        scores = q[heads, queries] @ k[heads, :kv_len].transpose(1, 2) * 0.35
        torch.testing.assert_close(out[heads, queries], scores.softmax(-1) @ v[heads, :kv_len])
        torch.testing.assert_close(lse[heads, queries], scores.logsumexp(-1) / math.log(2))


def test_lse_of_bfloat16_is_that_of_its_rounded_scores_in_float32() -> None:
    q, k, v = (tensors(2, 40, 8, seed=seed).bfloat16() for seed in range(3))
    _, lse = dense_attention(q, k, v, 1.0, None, Workspace(torch.device("cpu")))
    scores = torch.bmm(q, k.transpose(1, 2)).double()
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1) / math.log(2), rtol=0, atol=2e-6)


def test_buffers_grow_and_are_used_again() -> None:
    workspace = Workspace(torch.device("cpu"))
    small = workspace.take("scores", (2, 3), torch.float32)
    large = workspace.take("scores", (4, 5), torch.float32)
    assert large.shape == (4, 5)
    assert workspace.take("scores", (3, 3), torch.float32).data_ptr() == large.data_ptr()
    assert workspace.take("weights", (3, 3), torch.float32).data_ptr() != large.data_ptr()
    assert workspace.take("scores", (3, 3), torch.bfloat16).dtype == torch.bfloat16
    assert small.shape == (2, 3)

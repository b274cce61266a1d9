"""What pages can store K and V in, and how a number becomes one of a page's.

A vector is the head_dim numbers of one token and KV head, of K or of V.
"""

from __future__ import annotations

import torch

__all__ = ["bytes_per_number", "has_vector_scales", "int8_vectors", "rounded_to_float"]

LARGEST_INT8 = 127


def has_vector_scales(dtype: torch.dtype) -> bool:
    """Whether every vector in pages of that dtype has a scale of its own, a float32 beside it."""
    return dtype == torch.int8


def bytes_per_number(dtype: torch.dtype, head_dim: int) -> float:
    """Bytes of a number in a page, its share of the vector's scale included."""
    return dtype.itemsize + (torch.float32.itemsize / head_dim if has_vector_scales(dtype) else 0)


def rounded_to_float(x: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """x, of any shape [...], in a floating-point dtype. Numbers for 8 bits are divided by `scale` in float32 first.

    What lies beyond the largest number becomes that number in 8 bits, and NaN in float16: whoever reads it is told.
    """
    if x.dtype == dtype:
        return x
    limit = torch.finfo(dtype).max
    if dtype == torch.float16:
        x = x.float()
        return x.masked_fill(x.abs() > limit, torch.nan).to(dtype)
    if dtype.itemsize > 1:
        return x.to(dtype)
    return (x.float() / scale if scale != 1.0 else x).clamp(-limit, limit).to(dtype)


def int8_vectors(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors as int8 with a scale each: the largest magnitude becomes 127.

    Args:
        x: [..., head_dim]

    Returns:
        int8 like x; float32 scales [...], NaN for a vector that holds NaN or infinity, so that it is read as NaN
    """
    numbers = x.float()
    most = numbers.abs().amax(-1)
    scales = torch.where(most.isfinite(), most / LARGEST_INT8, torch.nan)
    quotients = torch.where(scales.unsqueeze(-1) > 0, numbers / scales.unsqueeze(-1), 0.0)
    return quotients.round().clamp(-LARGEST_INT8, LARGEST_INT8).to(torch.int8), scales

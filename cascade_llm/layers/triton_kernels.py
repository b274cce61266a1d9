"""Triton kernels; the one place that imports Triton, and imported only to launch one: CPU builds of torch lack it.

Bodies are Triton's language, not Python's, and arguments without `constexpr` have no annotations in it.
"""

import triton
import triton.language as tl

__all__ = ["norm_rotate_kernel"]


@triton.jit
def norm_rotate_kernel(
    qkv,
    cos_sin,
    q_weight,
    k_weight,
    eps,
    row_stride,
    NUM_QO_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_NORMS: tl.constexpr,
):
    """Normalise and rotate one head of one row in place; programs are (row, query or key head).

    qkv: [rows, all heads * HEAD_DIM]; cos_sin: [rows, HEAD_DIM] float32, cos then sin; weights: [HEAD_DIM] each.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = HEAD_DIM // 2
    place = tl.arange(0, half)
    # rows * stride may pass 2**31 in a prefill of many rows
    start = qkv + row.to(tl.int64) * row_stride + head * HEAD_DIM
    low, high = tl.load(start + place).to(tl.float32), tl.load(start + half + place).to(tl.float32)
    if HAS_NORMS:
        weight = k_weight
        if head < NUM_QO_HEADS:
            weight = q_weight
        scale = tl.rsqrt((tl.sum(low * low) + tl.sum(high * high)) / HEAD_DIM + eps)
        low = low * scale * tl.load(weight + place).to(tl.float32)
        high = high * scale * tl.load(weight + half + place).to(tl.float32)
    turn = cos_sin + row * HEAD_DIM + place
    cos, sin = tl.load(turn), tl.load(turn + half)
    tl.store(start + place, (low * cos - high * sin).to(qkv.dtype.element_ty))
    tl.store(start + half + place, (high * cos + low * sin).to(qkv.dtype.element_ty))

"""What the device can do: memory and matrix rates, which floors are made of."""

from __future__ import annotations

from typing import Any

import torch

from scripts.gpu_suite.machine import Machine
from scripts.gpu_suite.shapes import ModelShape, Sizes

__all__ = ["decode_floor_s", "measure_rates"]


def measure_rates(machine: Machine, sizes: Sizes) -> dict[str, Any]:
    """Bytes per second of a large copy (read and written) and flops per second of a large product."""
    source = torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    copy_s = machine.seconds(lambda: target.copy_(source))
    size = sizes.matrix_size
    a = torch.randn(size, size, device=machine.device).to(machine.dtype)
    b, c = a.clone(), torch.empty_like(a)
    product_s = machine.seconds(lambda: torch.mm(a, b, out=c))
    return {
        "copy_bytes_per_s": 2 * sizes.copy_bytes / copy_s,
        "matrix_flops_per_s": 2 * size**3 / product_s,
        "dtype": str(machine.dtype),
    }


def decode_floor_s(
    shape: ModelShape, batch: int, prefix: int, own_len: int, bytes_per_s: float, flops_per_s: float
) -> float:
    """The floor of one decode step: linear layers, shared attention, suffix attention and head run one after another,
    each as fast as memory or arithmetic allows, in 16 bits."""
    heads = shape.num_qo_heads + 2 * shape.num_kv_heads
    linear = shape.hidden * (heads + shape.num_qo_heads) * shape.head_dim + 3 * shape.hidden * shape.ffn
    kv_bytes = 2 * 2 * shape.num_kv_heads * shape.head_dim
    kv_flops = 4 * shape.num_qo_heads * shape.head_dim

    def part(num_bytes: float, flops: float) -> float:
        return max(num_bytes / bytes_per_s, flops / flops_per_s)

    layer = (
        part(2 * linear, 2 * linear * batch)
        + part(prefix * kv_bytes, prefix * batch * kv_flops)
        + part(batch * own_len * kv_bytes, batch * own_len * kv_flops)
    )
    head = shape.hidden * shape.vocab
    return shape.num_layers * layer + part(2 * head, 2 * head * batch)

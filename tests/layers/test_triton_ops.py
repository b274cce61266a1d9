"""Triton's kernels by its interpreter, which needs no GPU, against the torch twin."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cascade_llm.layers import triton_ops

COMPARE = """
import torch
from cascade_llm.layers.fused_ops import HeadLayout, RMSNorm
from cascade_llm.layers.rope import Rotation
from cascade_llm.layers.torch_ops import TorchOps
from cascade_llm.layers.triton_ops import norm_rotate_

torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
    for layout in (HeadLayout(4, 2, 64), HeadLayout(3, 1, 128)):
        num_heads = layout.num_rotated + layout.num_kv_heads
        norms = tuple(RMSNorm(torch.rand(layout.head_dim).add(0.5).to(dtype), 1e-5) for _ in range(2))
        for rows in (1, 5):
            wide = torch.randn(rows, (num_heads + 1) * layout.head_dim).to(dtype)
            angles = torch.rand(rows, layout.head_dim // 2) * 7
            rotation = Rotation(torch.cat((angles.cos(), angles.sin()), dim=1))
            for chosen in (None, norms):
                qkv = wide[:, : num_heads * layout.head_dim].clone() if rows == 1 else wide.clone()
                own = qkv[:, : num_heads * layout.head_dim]
                q, k, v = TorchOps().rotate(own.clone(), layout, rotation, chosen)
                norm_rotate_(own, layout, rotation.cos_sin, chosen)
                for ours, theirs in zip(layout.split(own.contiguous()), (q, k, v), strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
                assert qkv[:, own.shape[1] :].equal(wide[:, own.shape[1] : qkv.shape[1]]), "nothing beyond is written"
                print("compared")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed here")
def test_norms_and_rotation_in_one_kernel_equal_the_twin() -> None:
    """In a process of its own: Triton asks once, when it is imported, whether it is to interpret."""
    done = subprocess.run(
        [sys.executable, "-c", COMPARE],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(triton_ops.__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compared") == 16

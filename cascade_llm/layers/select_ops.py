"""Which implementation of the elementwise operations serves."""

from __future__ import annotations

import torch

from cascade_llm.errors import BackendError
from cascade_llm.layers.fused_ops import FusedOps
from cascade_llm.layers.native_ops import NativeOps
from cascade_llm.layers.torch_ops import TorchOps

__all__ = ["select_fused_ops"]


def select_fused_ops(dtype: torch.dtype, device: torch.device) -> FusedOps:
    """The fastest that works here; a `TorchOps` that was not the first choice holds the reason."""
    if device.type != "cpu":
        return TorchOps(f"native operations are for the CPU, not {device.type}")
    try:
        return NativeOps(dtype)
    except BackendError as error:
        return TorchOps(str(error))

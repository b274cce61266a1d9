"""The int columns of a plan as tensors."""

from __future__ import annotations

from array import array

import torch

from cascade_llm.plan import IntColumn

__all__ = ["column_tensor"]


def column_tensor(column: IntColumn) -> torch.Tensor:
    """A column as an int32 CPU tensor: the column's own memory where it covers its array, so never write to it."""
    owner = column.obj
    if len(column) == 0:  # torch.frombuffer refuses empty buffers
        return torch.empty(0, dtype=torch.int32)
    if isinstance(owner, array) and owner.typecode == "i" and len(owner) == len(column) and column.c_contiguous:
        return torch.frombuffer(owner, dtype=torch.int32)
    return torch.tensor(column.tolist(), dtype=torch.int32)

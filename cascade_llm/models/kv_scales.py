"""Scales of an 8-bit KV cache, as checkpoints carry them beside their weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

import torch

from cascade_llm.errors import CheckpointError
from cascade_llm.kv_cache.paged_kv_cache import KVScale

__all__ = ["KVScaleReader"]

SCALE_NAME = re.compile(r"model\.layers\.(\d+)\.self_attn\.(?:attn\.|[kv]_proj\.)?([kv])_scale")


class KVScaleReader:
    """Takes `model.layers.N.self_attn.k_scale` and `v_scale` out of a checkpoint's tensors, one number each."""

    def __init__(self, num_layers: int) -> None:
        self._found: list[dict[str, float]] = [{} for _ in range(num_layers)]

    def without_scales(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The other tensors; read to its end before `scales`. Raises `CheckpointError` for a scale that is none."""
        for name, tensor in tensors:
            match = SCALE_NAME.fullmatch(name)
            if match is None or int(match[1]) >= len(self._found):
                yield name, tensor
            else:
                self._found[int(match[1])][match[2]] = _number(name, tensor)

    def scales(self) -> list[KVScale]:
        """Of each layer; 1 where the checkpoint says nothing."""
        return [KVScale(**found) for found in self._found]


def _number(name: str, tensor: torch.Tensor) -> float:
    value = float(tensor) if tensor.numel() == 1 else math.nan
    if not 0 < value < math.inf:
        raise CheckpointError(f"{name} must be one positive number, not {tensor.tolist()}: remove it, or mend the file")
    return value

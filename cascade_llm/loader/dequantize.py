"""GGUF tensors as torch tensors: plain types as views of the file, block types computed by the `gguf` package."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from cascade_llm.errors import UnsupportedModelError

__all__ = ["dequantize"]

CHUNK_LEN = 65536
"""Values that are computed at a time: their float32 temporaries stay in a core's cache, three times as fast as the
package's own groups of 16 rows at 576 columns, and the peak is the tensor itself instead of twice that."""


def dequantize(data: npt.NDArray[np.uint8], tensor_type: GGMLQuantizationType, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of `shape` from its bytes [num_bytes]: F32, F16, BF16 as views of them, block types as new float32.

    Raises `UnsupportedModelError` for a type that the `gguf` package cannot dequantize.
    """
    if tensor_type == GGMLQuantizationType.F32:
        return torch.from_numpy(data.view(np.float32)).view(shape)
    if tensor_type == GGMLQuantizationType.F16:
        return torch.from_numpy(data.view(np.float16)).view(shape)
    if tensor_type == GGMLQuantizationType.BF16:
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16).view(shape)
    return _dequantize_blocks(data, tensor_type).view(shape)


def _dequantize_blocks(data: npt.NDArray[np.uint8], tensor_type: GGMLQuantizationType) -> torch.Tensor:
    block_len, block_bytes = GGML_QUANT_SIZES[tensor_type]
    blocks_per_chunk = max(1, CHUNK_LEN // block_len)
    out = torch.empty(data.size // block_bytes * block_len, dtype=torch.float32)
    values = out.numpy()
    try:
        for block in range(0, data.size // block_bytes, blocks_per_chunk):
            chunk = data[block * block_bytes : (block + blocks_per_chunk) * block_bytes]
            start = block * block_len
            values[start : start + chunk.size // block_bytes * block_len] = gguf.dequantize(chunk[None], tensor_type)[0]
    except NotImplementedError as error:
        raise UnsupportedModelError(f"block type {tensor_type.name} cannot be dequantized: {error}") from error
    return out

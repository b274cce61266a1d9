"""Codes of GGUF's block types against the values that the `gguf` package computes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from cascade_llm.loader.gguf_codes import CODED_TYPES, codes_of

FLOAT16_AT = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,)} | {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "MXFP4": (),
}
"""Bytes of a block that hold its float16 numbers."""


@pytest.mark.parametrize("block_type", CODED_TYPES, ids=lambda kind: kind.name)
def test_codes_stand_for_the_values_of_the_package_to_the_bit(block_type: GGMLQuantizationType) -> None:
    block_bytes = GGML_QUANT_SIZES[block_type][1]
    generator = np.random.default_rng(block_type.value)
    data = generator.integers(0, 256, (7, 3, block_bytes), dtype=np.uint8)
    for at in FLOAT16_AT[block_type.name]:
        data[..., at : at + 2] = generator.normal(size=(7, 3, 1)).astype(np.float16).view(np.uint8)
    if block_type.name == "MXFP4":
        data[..., 0] = generator.integers(100, 150, (7, 3))
    data = data.reshape(7, -1)
    codes = codes_of(block_type, torch.from_numpy(data))
    assert np.array_equal(codes.dequantized().numpy(), gguf.dequantize(data, block_type))
    assert int(codes.codes.max()) < 2**codes.layout.bits

#!/usr/bin/env python
"""Quantize a model with bitsandbytes, as transformers saves it, and compare what we read with what it dequantizes.

    python -m venv /some/venv && /some/venv/bin/pip install bitsandbytes==0.50.2
    PYTHONPATH=. /some/venv/bin/python scripts/bitsandbytes_twin.py MODEL_FOLDER OUT_FOLDER

Each scheme becomes a folder of its own. Values are compared in the package's dtype, bit by bit; the exit status is 1
where one differs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

from scripts.quantized_twins import Scheme, Stored, compare_schemes

METHOD = "bitsandbytes"
FOUR_BITS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_type": "nf4"},
    "nf4-nested": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4"},
    "nf4-across-rows": {"quant_type": "nf4", "blocksize": 512},
}


def four_bits(weight: torch.Tensor, options: dict[str, Any]) -> Stored:
    """`Params4bit`, without a module around it."""
    codes, state = functional.quantize_4bit(weight.contiguous(), **options)
    tensors = {f"weight.{suffix}": tensor for suffix, tensor in state.as_dict(packed=True).items()}
    if weight.shape[1] % state.blocksize == 0:
        return {"weight": codes, **tensors}, functional.dequantize_4bit(codes, state)
    # the compiled code for CPUs takes other scales for blocks that end within a row; the generic code does not
    values = _dequantize_4bit_compute(
        codes.flatten(), state.absmax, state.code, state.blocksize, weight.shape, weight.dtype
    )
    return {"weight": codes, **tensors}, values


def eight_bits(weight: torch.Tensor) -> Stored:
    """`Int8Params`, without a module around it."""
    codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
    values = functional.int8_vectorwise_dequant(codes, largest).to(weight.dtype)
    return {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}, values


def schemes() -> dict[str, Scheme]:
    """By name; the configuration and the rounding of each."""

    def in_four_bits(options: dict[str, Any]) -> Scheme:
        config = {"quant_method": METHOD, "load_in_4bit": True, "bnb_4bit_quant_type": options["quant_type"]}
        return Scheme(config, lambda weight: four_bits(weight, options))

    in_eight_bits = Scheme({"quant_method": METHOD, "load_in_8bit": True}, eight_bits)
    return {**{name: in_four_bits(options) for name, options in FOUR_BITS.items()}, "int8": in_eight_bits}


if __name__ == "__main__":
    sys.exit(compare_schemes(schemes(), Path(sys.argv[1]), Path(sys.argv[2])))

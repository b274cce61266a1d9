#!/usr/bin/env python
"""Quantize a model with compressed-tensors, and compare what we read of it with what that package decompresses.

    python -m venv /some/venv && /some/venv/bin/pip install compressed-tensors==0.20.0
    PYTHONPATH=. /some/venv/bin/python scripts/compressed_tensors_twin.py MODEL_FOLDER OUT_FOLDER

Each scheme becomes a folder of its own, rounded to the nearest between the smallest and the largest weight of a group.
Values are compared in the package's dtype, bit by bit; the exit status is 1 where one differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from scripts.quantized_twins import Scheme, Stored, compare_schemes

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float"}
FP4 = {"num_bits": 4, "type": "float"}
NVFP4 = {**FP4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}
MXFP4 = {**FP4, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
NVFP4_NAME = "nvfp4-pack-quantized"
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "w4a16": ("pack-quantized", INT4),
    "w4a16-asymmetric": ("pack-quantized", {**INT4, "symmetric": False}),
    "w8a16": ("pack-quantized", INT8),
    "w8a16-asymmetric": ("pack-quantized", {**INT8, "symmetric": False}),
    "w8a8": ("int-quantized", INT8),
    "w8a8-asymmetric": ("int-quantized", {**INT8, "symmetric": False}),
    "fp8": ("float-quantized", {**FP8, "strategy": "tensor"}),
    "fp8-dynamic": ("float-quantized", {**FP8, "strategy": "channel"}),
    "nvfp4": (NVFP4_NAME, NVFP4),
    "mxfp4": ("mxfp4-pack-quantized", MXFP4),
    "fp8-block": ("float-quantized", {**FP8, "strategy": "block", "block_structure": [128, 128]}),
}


def ends(weight: torch.Tensor, arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and largest weight of whatever shares a scale, in the shape of the scales."""
    rows, inputs = weight.shape
    if arguments["strategy"] == "block":
        high, wide = arguments["block_structure"]
        padded = torch.zeros(-(-rows // high) * high, -(-inputs // wide) * wide, dtype=weight.dtype)
        padded[:rows, :inputs] = weight
        blocks = padded.view(-(-rows // high), high, -(-inputs // wide), wide)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    if arguments["strategy"] == "tensor":
        return weight.amin().view(1), weight.amax().view(1)
    groups = weight.view(rows, -1, arguments.get("group_size", inputs))
    return groups.amin(-1), groups.amax(-1)


def scheme_of(stored_as: str, arguments: dict[str, Any]) -> Scheme:
    """The configuration and the rounding of one format."""
    weights = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=stored_as)
    compressor = BaseCompressor.get_value_from_registry(stored_as)

    def store(weight: torch.Tensor) -> Stored:
        of_all = generate_gparam(*weight.aminmax()) if stored_as == NVFP4_NAME else None
        scales, zeros = calculate_qparams(*ends(weight, arguments), weights, of_all)
        parts = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros, "weight_global_scale": of_all}
        state = compressor.compress({name: part for name, part in parts.items() if part is not None}, scheme)
        return state, compressor.decompress(dict(state), scheme)["weight"]

    config = {
        "quant_method": "compressed-tensors",
        "format": stored_as,
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        "ignore": ["lm_head"],
    }
    return Scheme(config, store)


if __name__ == "__main__":
    schemes = {name: scheme_of(*described) for name, described in SCHEMES.items()}
    sys.exit(compare_schemes(schemes, Path(sys.argv[1]), Path(sys.argv[2])))

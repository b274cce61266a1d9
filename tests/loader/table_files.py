"""Small matrices in formats of tables and of floats of 4 bits, written from the published layouts by loops.

As in `quantized_files`, nothing of the readers is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from tests.loader.quantized_files import Written

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4 = tuple(value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3))


def _codes(seed: int, out: int, num_inputs: int) -> tuple[torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (out, num_inputs), generator=generator), generator


def _pairs(codes: torch.Tensor, *, upper_first: bool = False) -> torch.Tensor:
    stored = torch.zeros(len(codes), codes.shape[1] // 2, dtype=torch.uint8)
    for row, column in np.ndindex(*codes.shape):
        upper = (column % 2 == 0) == upper_first
        stored[row, column // 2] |= int(codes[row, column]) << (4 if upper else 0)
    return stored


def _e2m1(codes: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    """Values [out, in] by float32 scales [out, groups]."""
    values = torch.empty(codes.shape)
    for row, column in np.ndindex(*codes.shape):
        code = int(codes[row, column])
        values[row, column] = scales[row, column // group] * (E2M1[code & 7] * (-1 if code & 8 else 1))
    return values


def _compressed(stored_as: str, weights: dict[str, Any], input_bits: int | None) -> dict[str, Any]:
    inputs = None if input_bits is None else {"num_bits": input_bits, "type": "float", "dynamic": "local"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": stored_as}
    return {
        "quant_method": "compressed-tensors",
        "format": stored_as,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _e4m3_scales(generator: torch.Generator, out: int, groups: int) -> torch.Tensor:
    return (torch.rand(out, groups, generator=generator) * 400 + 1).to(torch.float8_e4m3fn)


def nvfp4(seed: int = 0, out: int = 16, num_inputs: int = 64, *, input_bits: int | None = 4) -> Written:
    """compressed-tensors, with what activations would be rounded by."""
    codes, generator = _codes(seed, out, num_inputs)
    scales = _e4m3_scales(generator, out, num_inputs // 16)
    divisor = torch.rand(1, generator=generator) * 1e5 + 1e4
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    tensors = {"weight_packed": _pairs(codes), "weight_scale": scales, "weight_global_scale": divisor}
    if input_bits is not None:
        tensors["input_global_scale"] = torch.ones(1)
    values = _e2m1(codes, scales.float() / divisor, 16)
    return Written(_compressed("nvfp4-pack-quantized", weights, input_bits), tensors, values)


def mxfp4(seed: int = 0, out: int = 16, num_inputs: int = 64) -> Written:
    """compressed-tensors, weights alone."""
    codes, generator = _codes(seed, out, num_inputs)
    exponents = torch.randint(118, 124, (out, num_inputs // 32), generator=generator)
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    tensors = {"weight_packed": _pairs(codes), "weight_scale": exponents.byte()}
    values = _e2m1(codes, 2.0 ** (exponents.float() - 127), 32)
    return Written(_compressed("mxfp4-pack-quantized", weights, None), tensors, values)


def modelopt_nvfp4(seed: int = 0, out: int = 16, num_inputs: int = 64) -> Written:
    """As NVIDIA's tools write config.json."""
    codes, generator = _codes(seed, out, num_inputs)
    scales = _e4m3_scales(generator, out, num_inputs // 16)
    factor = torch.rand((), generator=generator) * 1e-4
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*.router*"]}
    config["config_groups"] = {"group_0": {"weights": {"num_bits": 4, "group_size": 16}, "targets": ["Linear"]}}  # type: ignore[assignment]
    tensors = {
        "weight": _pairs(codes),
        "weight_scale": scales,
        "weight_scale_2": factor,
        "input_scale": torch.tensor(0.01),
    }
    return Written(config, tensors, _e2m1(codes, scales.float() * factor, 16))


def modelopt_fp8(seed: int = 0, out: int = 16, num_inputs: int = 64) -> Written:
    """One scale for the matrix; the fields as in hf_quant_config.json."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(out, num_inputs, generator=generator) * 50).to(torch.float8_e4m3fn)
    scale = torch.rand((), generator=generator) * 1e-3 + 1e-4
    fields = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    config = {"quant_method": "modelopt", "producer": {"name": "modelopt"}, "quantization": fields}
    tensors = {"weight": weight, "weight_scale": scale, "input_scale": torch.tensor(0.01)}
    return Written(config, tensors, weight.float() * scale)


def bnb4(
    seed: int = 0,
    out: int = 16,
    num_inputs: int = 64,
    *,
    kind: str = "nf4",
    block: int = 64,
    nested: bool = False,
    container: torch.dtype = torch.uint8,
) -> Written:
    """bitsandbytes of 4 bits; blocks run across rows."""
    codes, generator = _codes(seed, out, num_inputs)
    table = torch.tensor({"nf4": NF4, "fp4": FP4}[kind])
    blocks = -(-out * num_inputs // block)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "float16", "shape": [out, num_inputs]}
    tensors = {"weight.quant_map": table}
    if nested:
        places = torch.randint(0, 256, (blocks,), generator=generator)
        nested_table = torch.linspace(-1, 1, 256)
        scales = torch.rand(-(-blocks // 256), generator=generator) * 0.01
        tensors |= {
            "weight.absmax": places.byte(),
            "weight.nested_absmax": scales,
            "weight.nested_quant_map": nested_table,
        }
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.02}
        largest = torch.tensor([nested_table[place] * scales[i // 256] for i, place in enumerate(places)]) + 0.02
    else:
        largest = torch.rand(blocks, generator=generator) * 0.05
        tensors["weight.absmax"] = largest
    tensors["weight"] = _pairs(codes.view(1, -1), upper_first=True).view(container).view(-1, 1)
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(json.dumps(state).encode())).byte()
    values = torch.empty(out, num_inputs)
    for row, column in np.ndindex(out, num_inputs):
        values[row, column] = table[codes[row, column]] * largest[(row * num_inputs + column) // block]
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "llm_int8_skip_modules": ["lm_head"],
    }
    return Written(config, tensors, values)


def llm_int8(seed: int = 0, out: int = 16, num_inputs: int = 64) -> Written:
    """bitsandbytes of 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (out, num_inputs), generator=generator)
    largest = torch.rand(out, generator=generator)
    tensors = {"weight": weight.char(), "SCB": largest, "weight_format": torch.tensor(0).byte()}
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    return Written(config, tensors, weight.float() * (largest.unsqueeze(1) * (1 / 127)))


TABLE_WRITERS: Mapping[str, Callable[..., Written]] = {
    "nvfp4": nvfp4,
    "mxfp4": mxfp4,
    "modelopt-nvfp4": modelopt_nvfp4,
    "modelopt-fp8": modelopt_fp8,
    "bnb4": bnb4,
    "llm-int8": llm_int8,
}

"""Small quantized matrices, written from the published layouts by loops, and what they stand for.

Nothing of the readers is used: words are packed code by code, and values follow from integers, scales and zeros.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
LAYER = "model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Written:
    """One matrix in a format."""

    config: dict[str, Any]
    """quantization_config"""
    tensors: dict[str, torch.Tensor]
    """By suffix."""
    values: torch.Tensor
    """[out, in] float32"""


def save_folder(folder: Path, written: Written, layer: str = LAYER, **more: torch.Tensor) -> Path:
    """A folder with that matrix alone, beside `more` tensors."""
    folder.mkdir(exist_ok=True)
    tensors = {f"{layer}.{suffix}": tensor.contiguous() for suffix, tensor in written.tensors.items()}
    save_file({**tensors, **more}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": written.config}))
    return folder


def packed(codes: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """int32 words of codes [rows, n] along n: the code `order[i]` of each word's lies at bit `bits * i`."""
    per_word = 32 // bits
    width = -(-codes.shape[1] // per_word)
    words = np.zeros((len(codes), width), dtype=np.uint32)
    for row, column in np.ndindex(len(codes), width):
        for place, index in enumerate(order or range(per_word)):
            if column * per_word + index < codes.shape[1]:
                words[row, column] |= int(codes[row, column * per_word + index]) << (bits * place)
    return torch.from_numpy(words.view(np.int32).copy())


def _numbers(seed: int, out: int, num_inputs: int, groups: int, bits: int, dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (out, num_inputs), generator=generator)
    scales = (torch.rand(out, groups, generator=generator) * 0.02 + 0.001).to(dtype)
    zeros = torch.randint(1, 1 << bits, (out, groups), generator=generator)
    return codes, scales, zeros, generator


def gptq(
    seed: int = 0,
    out: int = 16,
    num_inputs: int = 64,
    *,
    bits: int = 4,
    group_size: int = 32,
    act_order: bool = False,
    version: str = "gptq",
    symmetric: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Written:
    """W[o, i] = scale[g_idx[i], o] * (code - zero)."""
    length = num_inputs if group_size == -1 else group_size
    groups = -(-num_inputs // length)
    codes, scales, zeros, generator = _numbers(seed, out, num_inputs, groups, bits, dtype)
    if symmetric:
        zeros[:] = 1 << (bits - 1)
    g_idx = torch.arange(num_inputs) // length
    if act_order:
        g_idx = g_idx[torch.randperm(num_inputs, generator=generator)]
    values = scales.double()[:, g_idx] * (codes - zeros[:, g_idx])
    config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": act_order, "sym": symmetric}
    tensors = {
        "qweight": packed(codes, bits).T,
        "qzeros": packed((zeros - int(version == "gptq")).T, bits),
        "scales": scales.T,
        "g_idx": g_idx.int(),
    }
    return Written({**config, "checkpoint_format": version}, tensors, values.float())


def awq(seed: int = 0, out: int = 16, num_inputs: int = 64, *, group_size: int = 32) -> Written:
    """W[o, i] = scale[g, o] * (code - zero); eight outputs in a word."""
    length = num_inputs if group_size == -1 else group_size
    codes, scales, zeros, _ = _numbers(seed, out, num_inputs, -(-num_inputs // length), 4, torch.float16)
    group = torch.arange(num_inputs) // length
    values = scales.double()[:, group] * (codes - zeros[:, group])
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    tensors = {
        "qweight": packed(codes.T, 4, AWQ_ORDER),
        "qzeros": packed(zeros.T, 4, AWQ_ORDER),
        "scales": scales.T,
    }
    return Written(config, tensors, values.float())


def _compressed(stored_as: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": dict(weights), "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": stored_as,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def pack_quantized(
    seed: int = 0,
    out: int = 16,
    num_inputs: int = 64,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Written:
    """Signed codes and zeros, stored with half the range added; -1 is a scale for each channel."""
    length, middle = num_inputs if group_size == -1 else group_size, 1 << (bits - 1)
    groups = num_inputs // length
    codes, scales, zeros, generator = _numbers(seed, out, num_inputs, groups, bits, dtype)
    if symmetric:
        zeros[:] = middle
    g_idx = torch.arange(num_inputs) // length
    if act_order:
        g_idx = g_idx[torch.randperm(num_inputs, generator=generator)]
    signed, signed_zeros = codes - middle, zeros - middle
    values = scales.double()[:, g_idx] * (signed - signed_zeros[:, g_idx])
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}
    tensors = {
        "weight_packed": packed(signed + middle, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([out, num_inputs]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = packed((signed_zeros + middle).T, bits).T
    if act_order:
        tensors["weight_g_idx"] = g_idx.int()
    return Written(_compressed("pack-quantized", weights), tensors, values.float())


def int_quantized(seed: int = 0, out: int = 16, num_inputs: int = 64, *, symmetric: bool = True) -> Written:
    """Eight bits and a scale for each channel."""
    codes, scales, zeros, _ = _numbers(seed, out, num_inputs, 1, 8, torch.bfloat16)
    zeros = torch.full_like(zeros, 128) if symmetric else zeros
    weights = {"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": "channel"}
    tensors = {"weight": (codes - 128).to(torch.int8), "weight_scale": scales}
    if not symmetric:
        tensors["weight_zero_point"] = (zeros - 128).to(torch.int8)
    return Written(_compressed("int-quantized", weights), tensors, (scales.double() * (codes - zeros)).float())


def float_quantized(seed: int = 0, out: int = 16, num_inputs: int = 64, *, strategy: str = "channel") -> Written:
    """FP8 of compressed-tensors, with activations that would be rounded at each step."""
    block = {"channel": (1, num_inputs), "tensor": (out, num_inputs), "block": (128, 128)}[strategy]
    weight, scales, values = _fp8_blocks(seed, out, num_inputs, block, torch.bfloat16)
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    if strategy == "block":
        weights["block_structure"] = list(block)
    config = _compressed("float-quantized", weights)
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "float", "dynamic": True}
    return Written(config, {"weight": weight, "weight_scale": scales[0] if strategy == "tensor" else scales}, values)


def fp8(seed: int = 0, out: int = 16, num_inputs: int = 64, *, block: tuple[int, int] | None = (128, 128)) -> Written:
    """As Qwen3 and DeepSeek ship it; None is one scale for the matrix."""
    weight, scales, values = _fp8_blocks(seed, out, num_inputs, block or (out, num_inputs), torch.float32)
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    if block is None:
        return Written(config, {"weight": weight, "weight_scale": scales.reshape(())}, values)
    config["weight_block_size"] = list(block)  # type: ignore[assignment]
    return Written(config, {"weight": weight, "weight_scale_inv": scales}, values)


def _fp8_blocks(seed: int, out: int, num_inputs: int, block: tuple[int, int], dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(out, num_inputs, generator=generator) * 50).to(torch.float8_e4m3fn)
    counts = -(-out // block[0]), -(-num_inputs // block[1])
    scales = (torch.rand(*counts, generator=generator) * 1e-3 + 1e-4).to(dtype)
    values = torch.empty(out, num_inputs)
    for row, column in np.ndindex(out, num_inputs):
        values[row, column] = weight[row, column].float() * scales[row // block[0], column // block[1]].float()
    return weight, scales, values


WRITERS: Mapping[str, Callable[..., Written]] = {
    "gptq": gptq,
    "awq": awq,
    "pack-quantized": pack_quantized,
    "int-quantized": int_quantized,
    "float-quantized": float_quantized,
    "fp8": fp8,
}

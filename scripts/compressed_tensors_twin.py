#!/usr/bin/env python
"""Quantize a model with compressed-tensors, and compare what we read of it with what that package decompresses.

    python -m venv /some/venv && /some/venv/bin/pip install compressed-tensors==0.20.0
    PYTHONPATH=. /some/venv/bin/python scripts/compressed_tensors_twin.py MODEL_FOLDER OUT_FOLDER

Each scheme becomes a folder of its own, rounded to the nearest between the smallest and the largest weight of a group.
Values are compared in the package's dtype, bit by bit; the exit status is 1 where one differs.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file

from cascade_llm.loader.hf_folder import HuggingFaceCheckpoint

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


def quantize(source: Path, target: Path, stored_as: str, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Write the folder; returns what the package decompresses, by layer."""
    weights = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=stored_as)
    compressor = BaseCompressor.get_value_from_registry(stored_as)
    tensors, values = {}, {}
    for name, tensor in HuggingFaceCheckpoint(source).tensors():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor.clone()
            continue
        of_all = generate_gparam(*tensor.aminmax()) if stored_as == NVFP4_NAME else None
        scales, zeros = calculate_qparams(*ends(tensor, arguments), weights, of_all)
        parts = {"weight": tensor, "weight_scale": scales, "weight_zero_point": zeros, "weight_global_scale": of_all}
        state = compressor.compress({name: part for name, part in parts.items() if part is not None}, scheme)
        layer = name.removesuffix(".weight")
        tensors.update({f"{layer}.{suffix}": part.contiguous() for suffix, part in state.items()})
        values[name] = compressor.decompress(dict(state), scheme)["weight"]
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, target)
    save_file(tensors, target / "model.safetensors")
    fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
    fields["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": stored_as,
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        "ignore": ["lm_head"],
    }
    (target / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return values


def main(source: Path, target: Path, tell: Callable[[str], object] = print) -> int:
    """One line for each scheme."""
    num_wrong = 0
    for name, (stored_as, arguments) in SCHEMES.items():
        theirs = quantize(source, target / name, stored_as, arguments)
        ours = {layer: values for layer, values in HuggingFaceCheckpoint(target / name).tensors() if layer in theirs}
        wrong = [layer for layer, values in theirs.items() if not torch.equal(ours[layer].to(values.dtype), values)]
        num_bytes = (target / name / "model.safetensors").stat().st_size
        tell(f"{name}: {len(theirs)} matrices, {len(wrong)} differ, {num_bytes / 1e6:.1f} MB")
        num_wrong += len(wrong)
    return int(num_wrong > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))

#!/usr/bin/env python
"""Quantize a model with bitsandbytes, as transformers saves it, and compare what we read with what it dequantizes.

    python -m venv /some/venv && /some/venv/bin/pip install bitsandbytes==0.50.2
    PYTHONPATH=. /some/venv/bin/python scripts/bitsandbytes_twin.py MODEL_FOLDER OUT_FOLDER

Each scheme becomes a folder of its own. Values are compared in the package's dtype, bit by bit; the exit status is 1
where one differs.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from safetensors.torch import save_file

from cascade_llm.loader.hf_folder import HuggingFaceCheckpoint

Stored = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Tensors by suffix, and the values that the package makes of them."""
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


def quantize(
    source: Path, target: Path, config: dict[str, Any], rounded: Callable[[torch.Tensor], Stored]
) -> dict[str, torch.Tensor]:
    """Write the folder; returns what the package dequantizes, by the name of the tensor."""
    tensors, values = {}, {}
    for name, tensor in HuggingFaceCheckpoint(source).tensors():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor.clone()
            continue
        parts, values[name] = rounded(tensor)
        layer = name.removesuffix(".weight")
        tensors.update({f"{layer}.{suffix}": part.clone().contiguous() for suffix, part in parts.items()})
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, target)
    save_file(tensors, target / "model.safetensors")
    fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
    fields["quantization_config"] = {"quant_method": "bitsandbytes", **config}
    (target / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return values


def schemes() -> dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Stored]]]:
    """The configuration and the rounding of each."""
    found: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Stored]]] = {
        name: (
            {"load_in_4bit": True, "bnb_4bit_quant_type": options["quant_type"]},
            lambda weight, options=options: four_bits(weight, options),  # type: ignore[misc]
        )
        for name, options in FOUR_BITS.items()
    }
    return {**found, "int8": ({"load_in_8bit": True}, eight_bits)}


def main(source: Path, target: Path, tell: Callable[[str], object] = print) -> int:
    """One line for each scheme."""
    num_wrong = 0
    for name, (config, rounded) in schemes().items():
        theirs = quantize(source, target / name, config, rounded)
        ours = {key: values for key, values in HuggingFaceCheckpoint(target / name).tensors() if key in theirs}
        wrong = [key for key, values in theirs.items() if not torch.equal(ours[key].to(values.dtype), values)]
        num_bytes = (target / name / "model.safetensors").stat().st_size
        tell(f"{name}: {len(theirs)} matrices, {len(wrong)} differ, {num_bytes / 1e6:.1f} MB")
        num_wrong += len(wrong)
    return int(num_wrong > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))

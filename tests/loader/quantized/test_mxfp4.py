"""Experts in MXFP4 beside what transformers makes of the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from cascade_llm.errors import CheckpointError
from cascade_llm.loader.hf_folder import HuggingFaceCheckpoint

LAYER, EXPERTS, HIDDEN, INNER = "model.layers.0.mlp.experts", 3, 96, 64


def random_tensors() -> dict[str, torch.Tensor]:
    """By name below the layer's."""
    generator = torch.Generator().manual_seed(0)

    def numbers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)

    return {
        "gate_up_proj_blocks": numbers(0, 256, EXPERTS, 2 * INNER, HIDDEN // 32, 16),
        "gate_up_proj_scales": numbers(118, 126, EXPERTS, 2 * INNER, HIDDEN // 32),
        "gate_up_proj_bias": torch.randn(EXPERTS, 2 * INNER, generator=generator),
        "down_proj_blocks": numbers(0, 256, EXPERTS, HIDDEN, INNER // 32, 16),
        "down_proj_scales": numbers(118, 126, EXPERTS, HIDDEN, INNER // 32),
        "down_proj_bias": torch.randn(EXPERTS, HIDDEN, generator=generator),
    }


def folder_of(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({f"{LAYER}.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    return folder


def test_the_values_are_those_of_transformers(tmp_path: Path) -> None:
    tensors = random_tensors()
    checkpoint = HuggingFaceCheckpoint(folder_of(tmp_path, tensors))
    stored = dict(checkpoint.stored_tensors())
    assert dict(checkpoint.shapes()) == {name: tensor.shape for name, tensor in stored.items()}
    gate_up = convert_moe_packed_tensors(
        tensors["gate_up_proj_blocks"], tensors["gate_up_proj_scales"], dtype=torch.float32
    )
    down = convert_moe_packed_tensors(tensors["down_proj_blocks"], tensors["down_proj_scales"], dtype=torch.float32)
    assert len(stored) == 3 * EXPERTS + 2
    for expert in range(EXPERTS):
        parts = {part: stored[f"{LAYER}.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down")}
        assert torch.equal(parts["gate"].values(), gate_up[expert].t()[::2])
        assert torch.equal(parts["up"].values(), gate_up[expert].t()[1::2])
        assert torch.equal(parts["down"].values(), down[expert].t())
        codes = parts["up"].codes
        assert codes is not None
        assert torch.equal(codes(parts["up"].data[1:4]).dequantized(), gate_up[expert].t()[3:9:2])


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("down_proj_scales", None, "down_proj_scales is missing"),
        ("down_proj_scales", torch.zeros(EXPERTS, HIDDEN, 3, dtype=torch.uint8), "down_proj_scales has shape"),
        ("gate_up_proj_blocks", torch.zeros(EXPERTS, 2 * INNER, 3, 8, dtype=torch.uint8), "blocks has shape"),
        ("gate_up_proj_blocks", torch.zeros(EXPERTS, 2 * INNER, 3, 16), "has dtype F32"),
        ("down_proj_scales", torch.full((EXPERTS, HIDDEN, 2), 255, dtype=torch.uint8), "scales that are no numbers"),
    ],
)
def test_bytes_that_make_no_matrix_are_named(
    name: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    tensors = random_tensors()
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    with pytest.raises(CheckpointError, match=message):
        HuggingFaceCheckpoint(folder_of(tmp_path, tensors))

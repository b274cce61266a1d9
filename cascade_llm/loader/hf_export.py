"""A checkpoint written as a Hugging Face folder, for engines that read nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from cascade_llm.loader.checkpoint import Checkpoint

__all__ = ["write_hf_folder"]

SHARD_BYTES = 2 << 30


def write_hf_folder(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write config.json, generation_config.json and all weights in `dtype`; the tokenizer is left to others.

    Weights go to shards, so that memory never holds more than one of them. The folder must exist.
    """
    config = {**checkpoint.hf_config(), "dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if generation := checkpoint.generation_config():
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    num_shards = size = total = 0
    for name, tensor in checkpoint.tensors():
        shard[name] = tensor.to(dtype).contiguous().clone()
        size += shard[name].nbytes
        if size >= shard_bytes:
            num_shards, total, size = num_shards + 1, total + size, 0
            _write_shard(folder, num_shards, shard, weight_map)
    if shard:
        num_shards, total = num_shards + 1, total + size
        _write_shard(folder, num_shards, shard, weight_map)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _write_shard(folder: Path, number: int, shard: dict[str, torch.Tensor], weight_map: dict[str, str]) -> None:
    file = f"model-{number:05d}.safetensors"
    save_file(shard, folder / file, metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(shard, file))
    shard.clear()

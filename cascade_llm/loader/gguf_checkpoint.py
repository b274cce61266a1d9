"""A GGUF file as a checkpoint: Hugging Face names, shapes and orders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cascade_llm.errors import CheckpointError, UnsupportedModelError
from cascade_llm.loader.checkpoint import Checkpoint
from cascade_llm.loader.dequantize import dequantize
from cascade_llm.loader.gguf_config import ending_token_ids, hf_config_of
from cascade_llm.loader.gguf_file import GGUFFile, GGUFTensor

__all__ = ["GGUFCheckpoint"]

MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

TENSOR_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")

ROPE_DIVISORS = "rope_freqs.weight"
"""Read by `gguf_config` into rope_scaling; not a weight of the model."""


class GGUFCheckpoint(Checkpoint):
    """One .gguf file of the llama, qwen2 or qwen3 architecture, in any block type that `gguf` dequantizes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = GGUFFile(path)
        if self._file.metadata.get("split.count", 1) > 1:
            raise CheckpointError(
                f"{path} is one of {self._file.metadata['split.count']} parts: join them with "
                "llama-gguf-split --merge and give the whole file"
            )
        self._config = hf_config_of(self._file)
        self._hf_names = {name: _hf_name(self._file.path, name) for name in self._file.tensors if name != ROPE_DIVISORS}

    @property
    def name(self) -> str:
        """The file's name without ending."""
        return self._file.path.stem

    @property
    def tokenizer_source(self) -> Path | None:
        """The file itself, where it has a vocabulary."""
        return self._file.path if self._file.metadata.get("tokenizer.ggml.tokens") else None

    def hf_config(self) -> dict[str, Any]:
        """The metadata under Hugging Face's names."""
        return dict(self._config)

    def generation_config(self) -> dict[str, Any]:
        """The ids that end a text (eos, eot and eom) as `eos_token_id`, where the file names any."""
        ids = ending_token_ids(self._file.metadata)
        return {"eos_token_id": ids} if ids else {}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights in the order of the file; block types dequantized to float32."""
        for name, hf_name in self._hf_names.items():
            tensor = self._file.tensors[name]
            yield hf_name, self._in_hf_order(tensor, dequantize(self._file.data(tensor), tensor.type, tensor.shape))

    def _in_hf_order(self, tensor: GGUFTensor, values: torch.Tensor) -> torch.Tensor:
        """Undo what the conversion to llama's GGUF does to queries and keys.

        llama.cpp rotates neighbouring pairs (0, 1), (2, 3), Hugging Face the halves (0, d/2), (1, d/2 + 1), so the
        rows of each head were interleaved; other architectures keep Hugging Face's order.
        """
        part = tensor.name.split(".")[-2]
        if self._config["model_type"] != "llama" or part not in ("attn_q", "attn_k"):
            return values
        num_heads = self._config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        if values.shape[0] % (2 * num_heads):
            raise CheckpointError(f"{self._file.path}: {tensor.name} has {values.shape[0]} rows for {num_heads} heads")
        pairs = values.view(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
        return pairs.transpose(1, 2).reshape(values.shape)


def _hf_name(path: Path, name: str) -> str:
    match = TENSOR_NAME.fullmatch(name)
    layer, part, kind = match.group("layer", "part", "kind") if match else (None, "", "")
    if layer is None and part in MODEL_NAMES:
        return f"{MODEL_NAMES[part]}.{kind}"
    if layer is not None and part in LAYER_NAMES:
        return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"
    raise UnsupportedModelError(
        f"{path}: tensor {name} belongs to no part of the implemented architectures, so its model would be computed "
        "wrongly without it"
    )

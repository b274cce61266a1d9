"""GGUF files as llama.cpp's conversion writes them, made from transformers' models with the `gguf` package."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants
from transformers import PreTrainedModel

PERMUTED = ("llama", "mistral", "mixtral", "smollm3", "granite")
"""Architectures whose conversion is llama's, or derived from it."""
NAMES = {
    "mistral": "llama",
    "mixtral": "llama",
    "gemma3_text": "gemma3",
    "gpt_oss": "gpt-oss",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
"""What GGUF calls an architecture, where it is another name than Hugging Face's."""


def convert(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """A model's weights under GGUF names, queries and keys of some permuted; tied heads left out."""
    config = model.config
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture_name(model))
    name_map = get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = parameter.float()
        if config.model_type in PERMUTED and (".q_proj." in name or ".k_proj." in name):
            values = permute(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if name.endswith("shared_expert_gate.weight"):
            values = values.squeeze()
        if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        name = f"{name}.weight" if name.endswith("sinks") else name
        own_parts = parts_of_gpt_oss(name, values) if config.model_type == "gpt_oss" else parts_of(name, values)
        for part, own in own_parts.items():
            tensors[name_map.get_name(part, try_suffixes=(".weight", ".bias"))] = own.numpy()
    for name, field in (("rope_factors_long", "long_factor"), ("rope_factors_short", "short_factor")):
        if field in config.rope_parameters:
            tensors[f"{name}.weight"] = np.array(config.rope_parameters[field], np.float32)
    return tensors


def parts_of(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that a conversion makes of one: gate and up of all experts lie apart."""
    if name.endswith("experts.gate_up_proj"):
        gate, up = values.chunk(2, dim=1)
        return {name.replace("gate_up_proj", f"{part}_proj.weight"): own for part, own in (("gate", gate), ("up", up))}
    return {f"{name}.weight" if name.endswith("experts.down_proj") else name: values}


def parts_of_gpt_oss(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same, of matrices that have their inputs first, and outputs of gate and up in turns."""
    block, _, part = name.rpartition("experts.")
    if not block:
        return {name: values}
    kind = "bias" if part.endswith("_bias") else "weight"
    values = values if kind == "bias" else values.transpose(1, 2)
    if part.startswith("down"):
        return {f"{block}experts.down_proj.{kind}": values.contiguous()}
    return {f"{block}experts.{own}_proj.{kind}": values[:, i::2].contiguous() for i, own in enumerate(("gate", "up"))}


def architecture_name(model: PreTrainedModel) -> str:
    """GGUF's, of a model."""
    return NAMES.get(model.config.model_type, model.config.model_type)


def permute(values: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Interleave the two halves of each head's rows, row by row."""
    head_dim = values.shape[0] // num_heads
    rows = [
        head * head_dim + half * head_dim // 2 + i
        for head in range(num_heads)
        for i in range(head_dim // 2)
        for half in (0, 1)
    ]
    return values[rows].contiguous()


def metadata_of(model: PreTrainedModel) -> dict[str, Any]:
    """The keys that a conversion writes."""
    config, rope = model.config, model.config.rope_parameters
    rope = rope.get("full_attention", rope)
    return {
        **OWN_KEYS.get(config.model_type, lambda config: {})(config),
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": getattr(config, "head_dim", None),
        "attention.value_length": getattr(config, "head_dim", None),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
    }


def _granite_keys(config: Any) -> dict[str, Any]:
    return {
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


def _phi3_keys(config: Any) -> dict[str, Any]:
    head_dim, rope = config.hidden_size // config.num_attention_heads, config.rope_parameters
    original = config.original_max_position_embeddings
    keys = {
        "rope.dimension_count": int(head_dim * rope["partial_rotary_factor"]),
        "rope.scaling.original_context_length": original,
        "attention.sliding_window": config.sliding_window or 0,
    }
    if rope["rope_type"] == "longrope":
        stretch = config.max_position_embeddings / original
        keys["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(stretch) / math.log(original))
    return keys


def _glm4_keys(config: Any) -> dict[str, Any]:
    return {"rope.dimension_count": int(config.head_dim * config.rope_parameters["partial_rotary_factor"])}


def _experts_keys(config: Any) -> dict[str, Any]:
    return {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_weights_norm": config.norm_topk_prob,
        "expert_shared_feed_forward_length": getattr(config, "shared_expert_intermediate_size", None),
    }


def _mixtral_keys(config: Any) -> dict[str, Any]:
    return {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}


def _gemma_keys(config: Any) -> dict[str, Any]:
    windowed = [kind == "sliding_attention" for kind in config.layer_types]
    usual = [(layer + 1) % (2 if config.model_type == "gemma2" else 6) != 0 for layer in range(len(windowed))]
    keys: dict[str, Any] = {"attention.sliding_window": config.sliding_window if any(windowed) else None}
    if any(windowed) and windowed != usual:
        keys["attention.sliding_window_pattern"] = windowed
    for key, cap in (("attn", config.attn_logit_softcapping), ("final", config.final_logit_softcapping)):
        if cap is not None or config.model_type == "gemma2":
            keys[f"{key}_logit_softcapping"] = float(cap or 0)
    if config.model_type == "gemma3_text":
        ropes = config.rope_parameters
        keys["rope.freq_base_swa"] = float(ropes["sliding_attention"]["rope_theta"])
        if ropes["full_attention"]["rope_type"] == "linear":
            keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": ropes["full_attention"]["factor"]}
    return keys


def _gpt_oss_keys(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    keys = {
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.intermediate_size,
        "attention.sliding_window": config.sliding_window,
    }
    if rope["rope_type"] == "yarn":
        keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"])}
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return keys


OWN_KEYS: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "gemma2": _gemma_keys,
    "gemma3_text": _gemma_keys,
    "granite": _granite_keys,
    "gpt_oss": _gpt_oss_keys,
    "mixtral": _mixtral_keys,
    "phi3": _phi3_keys,
    "glm4": _glm4_keys,
    "qwen2_moe": _experts_keys,
    "qwen3_moe": _experts_keys,
}
"""By Hugging Face's name of the architecture: the keys beside those of all."""


TensorType = GGMLQuantizationType | Callable[[str, tuple[int, ...]], GGMLQuantizationType]
"""Of all matrices, or of each by its name and shape."""
K_SCALES: Mapping[GGMLQuantizationType, Mapping[int, float]] = {
    GGMLQuantizationType.Q4_K: {0: 2e-4, 2: 1.5e-3},
    GGMLQuantizationType.Q6_K: {208: 1e-4},
}
"""Where in a block its float16 scales lie, and how large they are for values of about 0.1."""


def random_blocks(shape: tuple[int, ...], kind: GGMLQuantizationType) -> np.ndarray:
    """Bytes [*shape[:-1], bytes of a row] of a type of `K_SCALES`: any codes."""
    block_len, block_bytes = GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(math.prod(shape))
    blocks = generator.integers(0, 256, (math.prod(shape) // block_len, block_bytes), np.uint8)
    for place, scale in K_SCALES[kind].items():
        scales = (scale * generator.uniform(0.7, 1.4, len(blocks))).astype(np.float16)
        blocks[:, place : place + 2] = scales[:, None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def write_gguf(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    *,
    tensor_type: TensorType = GGMLQuantizationType.F32,
    other_keys: Mapping[str, Any] | None = None,
) -> Path:
    """A file of `architecture`.`keys`, whole names `other_keys`, and tensors.

    Matrices are stored as `tensor_type`, or as it says of each; of types that the `gguf` package cannot write, with
    other values of its own.
    """
    writer = GGUFWriter(path, architecture)
    named = {f"{architecture}.{name}": value for name, value in (keys or {}).items()}
    for name, value in {**named, **(other_keys or {})}.items():
        if value is not None:
            _add_key(writer, name, value)
    for name, values in (tensors or {}).items():
        asked = tensor_type(name, values.shape) if callable(tensor_type) else tensor_type
        stored = asked if values.ndim > 1 else GGMLQuantizationType.F32
        data = random_blocks(values.shape, stored) if stored in K_SCALES else quants.quantize(values, stored)
        plain = stored in (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
        writer.add_tensor(name, data, raw_dtype=None if plain else stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path: Path, model: PreTrainedModel, changes: Mapping[str, Any] | None = None, **options: Any) -> Path:
    """A model as a GGUF file, with some keys changed (None: left out)."""
    keys = {**metadata_of(model), **(changes or {})}
    return write_gguf(path, architecture_name(model), keys, convert(model), **options)


def _add_key(writer: GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, list(value))

"""What GGUF files of Gemma 2 and 3 say beside the common keys, and what they leave to llama.cpp's knowledge of them."""

from __future__ import annotations

from typing import Any

from cascade_llm.loader.gguf_keys import GGUFKeys

__all__ = ["gemma2_fields", "gemma3_fields", "layer_types_of"]


def layer_types_of(keys: GGUFKeys, period: int) -> list[str]:
    """Of each layer. Every `period`-th reads all, unless the file has another number, or names the windowed ones."""
    num_layers, pattern = keys.integer("block_count"), keys.get("attention.sliding_window_pattern", period)
    if isinstance(pattern, list):
        windowed = [bool(is_windowed) for is_windowed in pattern]
    else:
        stated = keys.integer("attention.sliding_window_pattern", period)
        windowed = [(layer + 1) % stated != 0 for layer in range(num_layers)]
    return ["sliding_attention" if is_windowed else "full_attention" for is_windowed in windowed]


def _gemma_fields(keys: GGUFKeys, head_dim: int, large_model_layers: int) -> dict[str, Any]:
    """What both have. No key tells what scores are scaled by: llama.cpp knows the largest model by its layers."""
    scalar, num_layers = head_dim, keys.integer("block_count")
    if num_layers == large_model_layers:
        scalar = keys.integer("embedding_length") // keys.integer("attention.head_count")
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        **{cap: keys.number(cap) or None for cap in caps if keys.get(cap) is not None},
    }


def gemma2_fields(keys: GGUFKeys, head_dim: int) -> dict[str, Any]:
    """Of Gemma 2."""
    window_len = keys.integer("attention.sliding_window", 4096)
    fields = _gemma_fields(keys, head_dim, large_model_layers=46)
    return {**fields, "sliding_window": window_len, "layer_types": layer_types_of(keys, 2)}


def gemma3_fields(keys: GGUFKeys, head_dim: int) -> dict[str, Any]:
    """Of Gemma 3. A file without a window is of a model without."""
    fields = _gemma_fields(keys, head_dim, large_model_layers=62)
    fields["rope_local_base_freq"] = keys.number("rope.freq_base_swa", 10_000.0)
    if not keys.get("attention.sliding_window"):
        return {**fields, "layer_types": ["full_attention"] * keys.integer("block_count")}
    window_len = keys.integer("attention.sliding_window")
    return {**fields, "sliding_window": window_len, "layer_types": layer_types_of(keys, 6)}

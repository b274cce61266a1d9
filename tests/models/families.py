"""Every architecture as a tiny model of transformers, with the variants of its configuration that matter.

An architecture adds an entry here, and with it is compared with transformers in `test_decoder` (logits),
`tests/engine/test_families.py` (the engine), and `tests/loader/test_gguf_checkpoint.py` (GGUF files).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3 import Qwen3ForCausalLM

__all__ = ["CASES", "FAMILIES", "Family"]

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 16,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Family:
    """One architecture of transformers."""

    config_class: type
    model_class: type
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of every tiny model, beside `checkpoints.TINY`."""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Changes to the fields, by what they are called."""
    norm_offset: float = 0.0
    """Added to the weight of every norm."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        LlamaConfig,
        LlamaForCausalLM,
        variants={
            "tied": {"tie_word_embeddings": True},
            "all biases": {"attention_bias": True, "mlp_bias": True},
            "multi-head": {"num_key_value_heads": 6},
            "multi-query": {"num_key_value_heads": 1},
            "wide heads": {"head_dim": 32},
            "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "llama3": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
            "yarn": {"rope_parameters": YARN},
        },
    ),
    "qwen2": Family(
        Qwen2Config,
        Qwen2ForCausalLM,
        variants={
            "tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-5},
            "yarn": {"rope_parameters": YARN},
            "windows": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        },
    ),
    "qwen3": Family(
        Qwen3Config,
        Qwen3ForCausalLM,
        {"head_dim": 16},
        {
            "tied": {"tie_word_embeddings": True},
            "biases": {"head_dim": 8, "attention_bias": True},
            "yarn": {"rope_parameters": YARN},
            "windows": {
                "use_sliding_window": True,
                "sliding_window": 6,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
        },
    ),
    "qwen2_moe": Family(
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        EXPERTS | {"shared_expert_intermediate_size": 40},
        {
            "few": {"mlp_only_layers": [2], "decoder_sparse_step": 2, "qkv_bias": False},
            "windows": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
        },
    ),
    "qwen3_moe": Family(
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        EXPERTS | {"head_dim": 16},
        {
            "all": {"norm_topk_prob": True, "num_experts_per_tok": 5},
            "windows": {"use_sliding_window": True, "sliding_window": 24},
        },
    ),
    "mistral": Family(
        MistralConfig,
        MistralForCausalLM,
        {"sliding_window": 24},
        {"no window": {"sliding_window": None, "head_dim": 16}, "a short window": {"sliding_window": 15}},
    ),
    "mixtral": Family(
        MixtralConfig,
        MixtralForCausalLM,
        {"num_local_experts": 5, "num_experts_per_tok": 2},
        {"window, all": {"sliding_window": 24, "num_experts_per_tok": 5}},
    ),
    "phi3": Family(
        Phi3Config,
        Phi3ForCausalLM,
        variants={
            "window": {"sliding_window": 19},
            "longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
            "partial longrope, tied": {
                "rope_parameters": {
                    **LONGROPE,
                    "partial_rotary_factor": 0.75,
                    "short_factor": [1.0, 1.1, 1.2],
                    "long_factor": [1.5, 2.0, 3.0],
                },
                "original_max_position_embeddings": 16,
                "tie_word_embeddings": True,
            },
        },
    ),
    "glm4": Family(
        Glm4Config,
        Glm4ForCausalLM,
        {"head_dim": 8},
        {"whole heads": {"partial_rotary_factor": 1.0}, "no biases": {"attention_bias": False, "head_dim": 16}},
    ),
    "olmo2": Family(Olmo2Config, Olmo2ForCausalLM, variants={"biases": {"attention_bias": True}}),
    "smollm3": Family(
        SmolLM3Config,
        SmolLM3ForCausalLM,
        {"num_hidden_layers": 4},
        {
            "listed layers, untied": {"no_rope_layers": [1, 0, 0, 1], "tie_word_embeddings": False},
            "biases, no rotation": {"no_rope_layer_interval": 1, "attention_bias": True, "mlp_bias": True},
            "windows": {"use_sliding_window": True, "sliding_window": 6, "no_rope_layer_interval": 2},
        },
    ),
    "gemma2": Family(
        Gemma2Config,
        Gemma2ForCausalLM,
        {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16},
        {
            "no caps, untied": {
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "tie_word_embeddings": False,
                "attention_bias": True,
            },
            "low caps": {
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 3.0,
                "query_pre_attn_scalar": 24,
            },
            "windows alone": {"layer_types": ["sliding_attention"] * 3, "sliding_window": 15},
        },
        norm_offset=1.0,
    ),
    "gemma3_text": Family(
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16, "num_hidden_layers": 7},
        {
            "alternating, scaled": {
                "sliding_window_pattern": 2,
                "num_hidden_layers": 4,
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                },
            },
            "no windows, capped": {
                "layer_types": ["full_attention"] * 3,
                "num_hidden_layers": 3,
                "final_logit_softcapping": 5.0,
                "attention_bias": True,
                "query_pre_attn_scalar": 24,
            },
        },
        norm_offset=1.0,
    ),
    "gpt_oss": Family(
        GptOssConfig,
        GptOssForCausalLM,
        {
            "head_dim": 16,
            "sliding_window": 6,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "rope_parameters": {**YARN, "rope_theta": 1.5e5, "truncate": False},
        },
        {
            "no biases, plain rotation": {
                "attention_bias": False,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "swiglu_limit": 0.5,
                "swiglu_alpha": 1.1,
            },
            "all layers read all": {"layer_types": ["full_attention"] * 3, "num_experts_per_tok": 5},
        },
    ),
    "granite": Family(
        GraniteConfig,
        GraniteForCausalLM,
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.25,
            "logits_scaling": 8.0,
        },
        {
            "biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
            "attention alone": {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0},
        },
    ),
    "ernie4_5": Family(
        Ernie4_5Config,
        Ernie4_5ForCausalLM,
        {"head_dim": 16},
        {"biases, untied": {"use_bias": True, "tie_word_embeddings": False}},
    ),
}
"""By `model_type`."""

CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    name if variant is None else f"{name}, {variant}": (name, {} if variant is None else family.variants[variant])
    for name, family in FAMILIES.items()
    for variant in (None, *family.variants)
}
"""Architecture and changes, of every family and every variant."""

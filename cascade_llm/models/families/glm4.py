"""GLM-4 0414 (Zhipu): norms before and after each block, and neighbouring dimensions of half a head are rotated."""

from __future__ import annotations

from dataclasses import replace

from cascade_llm.config import ModelConfig
from cascade_llm.models.architecture import Architecture
from cascade_llm.models.blocks import AttentionBlock, BlockOptions, DecoderLayer, GatedMLP, NormNames
from cascade_llm.models.config_fields import ConfigFields

__all__ = ["GLM4"]

NORMS = NormNames(
    before_attention="input_layernorm",
    after_attention="post_self_attn_layernorm",
    before_mlp="post_attention_layernorm",
    after_mlp="post_mlp_layernorm",
)


def _layer(options: BlockOptions, index: int) -> DecoderLayer:
    attention = AttentionBlock(options, qkv_bias=options.config.own["attention_bias"])
    return DecoderLayer(options, index, attention, GatedMLP(options, fused_name="gate_up_proj"), NORMS)


def _refine(config: ModelConfig, fields: ConfigFields) -> ModelConfig:
    """`attention_bias` is of q, k and v alone."""
    own = {"attention_bias": fields.flag("attention_bias")}
    return replace(config, own=own, rope=replace(config.rope, is_interleaved=True))


GLM4 = Architecture(
    hf_class="Glm4ForCausalLM",
    layer=_layer,
    refine=_refine,
    defaults={
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1.5625e-7,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "eos_token_id": [151329, 151336, 151338],
    },
    implements=frozenset({"partial_rotary_factor"}),
)

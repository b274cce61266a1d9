"""gpt-oss (OpenAI): attention sinks, a window in every other layer, experts with biases and a clamped SwiGLU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from cascade_llm.config import ModelConfig
from cascade_llm.models.architecture import Architecture
from cascade_llm.models.blocks import AttentionBlock, BlockOptions, DecoderLayer
from cascade_llm.models.config_fields import ConfigFields
from cascade_llm.models.experts import Experts
from cascade_llm.models.layer_types import alternating, read_layer_types, with_windows
from cascade_llm.models.routing_fields import read_routing

__all__ = ["GPT_OSS"]

ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _layer(options: BlockOptions, index: int) -> DecoderLayer:
    own = options.config.own
    attention = AttentionBlock(options, qkv_bias=own["attention_bias"], out_bias=own["attention_bias"], sinks=True)
    experts = Experts(
        options,
        own["routing"],
        options.config.intermediate_size,
        router_name="router",
        router_bias=True,
        bias=True,
        activation=partial(options.ops.clamped_swiglu, limit=own["limit"], alpha=own["alpha"]),
        order="inputs_first",
    )
    return DecoderLayer(options, index, attention, experts)


def _refine(config: ModelConfig, fields: ConfigFields) -> ModelConfig:
    """The softmax over the chosen experts alone is their share of the softmax over all, divided by its sum."""
    routing = read_routing(fields, divides_by_sum=True)
    own = {
        "attention_bias": fields.flag("attention_bias"),
        "routing": routing,
        "limit": fields.number("swiglu_limit", least=0.0),
        "alpha": fields.number("swiglu_alpha"),
    }
    sizes = (routing.num_experts * config.intermediate_size,) * config.num_layers
    layer_types = read_layer_types(fields, config.num_layers, alternating(2))
    return with_windows(replace(config, own=own, gate_sizes=sizes), fields, layer_types)


GPT_OSS = Architecture(
    hf_class="GptOssForCausalLM",
    layer=_layer,
    refine=_refine,
    defaults={
        "head_dim": 64,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "rms_norm_eps": 1e-5,
        "sliding_window": 128,
        "attention_bias": True,
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
        "rope_theta": 150_000.0,
        "rope_parameters": ROPE,
    },
    implements=frozenset({"sliding_window", "layer_types", "num_experts", "num_local_experts"}),
)

"""Llama (Touvron et al. 2023)."""

from __future__ import annotations

from dataclasses import replace

from cascade_llm.config import ModelConfig
from cascade_llm.models.architecture import Architecture
from cascade_llm.models.blocks import AttentionBlock, BlockOptions, DecoderLayer, GatedMLP
from cascade_llm.models.config_fields import ConfigFields

__all__ = ["LLAMA", "llama_layer", "with_biases"]


def llama_layer(options: BlockOptions, index: int) -> DecoderLayer:
    """Of a configuration with `with_biases`."""
    bias, mlp_bias = options.config.own["attention_bias"], options.config.own["mlp_bias"]
    attention = AttentionBlock(options, qkv_bias=bias, out_bias=bias)
    return DecoderLayer(options, index, attention, GatedMLP(options, bias=mlp_bias))


def with_biases(config: ModelConfig, fields: ConfigFields) -> ModelConfig:
    """Reads `attention_bias`, of all four projections, and `mlp_bias`."""
    biases = {name: fields.flag(name) for name in ("attention_bias", "mlp_bias")}
    return replace(config, own={**config.own, **biases})


LLAMA = Architecture(hf_class="LlamaForCausalLM", layer=llama_layer, refine=with_biases)

"""Mistral (Jiang et al. 2023): as Llama without biases; the first checkpoints with a window in every layer."""

from __future__ import annotations

from dataclasses import replace

from cascade_llm.config import ModelConfig
from cascade_llm.models.architecture import Architecture
from cascade_llm.models.blocks import AttentionBlock, BlockOptions, DecoderLayer, GatedMLP
from cascade_llm.models.config_fields import ConfigFields

__all__ = ["MISTRAL"]


def _layer(options: BlockOptions, index: int) -> DecoderLayer:
    return DecoderLayer(options, index, AttentionBlock(options), GatedMLP(options))


def _refine(config: ModelConfig, fields: ConfigFields) -> ModelConfig:
    if "sliding_window" not in fields:  # null; where nothing is said, transformers reads 4,096 tokens
        return config
    return replace(config, attention_kinds=(fields.count("sliding_window"),))


MISTRAL = Architecture(
    hf_class="MistralForCausalLM",
    layer=_layer,
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    implements=frozenset({"sliding_window"}),
    refine=_refine,
)

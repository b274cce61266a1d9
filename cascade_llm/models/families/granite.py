"""Granite 3 (IBM): as Llama, with four multipliers."""

from __future__ import annotations

from dataclasses import replace

from cascade_llm.config import ModelConfig
from cascade_llm.models.architecture import Architecture
from cascade_llm.models.config_fields import ConfigFields
from cascade_llm.models.families.llama import llama_layer, with_biases

__all__ = ["GRANITE"]


def _refine(config: ModelConfig, fields: ConfigFields) -> ModelConfig:
    return replace(
        with_biases(config, fields),
        embedding_multiplier=fields.number("embedding_multiplier", 1.0),
        residual_multiplier=fields.number("residual_multiplier", 1.0),
        attention_multiplier=fields.number("attention_multiplier", 1.0, least=0.0),
        logits_divisor=fields.number("logits_scaling", 1.0, least=0.0),
    )


GRANITE = Architecture(
    hf_class="GraniteForCausalLM",
    layer=llama_layer,
    refine=_refine,
    implements=frozenset({"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"}),
)

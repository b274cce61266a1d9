"""ERNIE 4.5 (Baidu), without experts: as Llama, but neighbouring dimensions are rotated; biases are all or none."""

from __future__ import annotations

from dataclasses import replace

from cascade_llm.config import ModelConfig
from cascade_llm.models.architecture import Architecture
from cascade_llm.models.config_fields import ConfigFields
from cascade_llm.models.families.llama import llama_layer

__all__ = ["ERNIE4_5"]


def _refine(config: ModelConfig, fields: ConfigFields) -> ModelConfig:
    """`use_bias` is of attention and MLP."""
    biases = dict.fromkeys(("attention_bias", "mlp_bias"), fields.flag("use_bias"))
    return replace(config, own=biases, rope=replace(config.rope, is_interleaved=True))


ERNIE4_5 = Architecture(
    hf_class="Ernie4_5ForCausalLM",
    layer=llama_layer,
    refine=_refine,
    defaults={
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
    },
    implements=frozenset({"use_bias"}),
)

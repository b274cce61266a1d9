"""SmolLM3 (Hugging Face): as Llama, but some layers rotate nothing; these have the windows, where there are any."""

from __future__ import annotations

from dataclasses import replace

from cascade_llm.config import ModelConfig, RopeConfig
from cascade_llm.models.architecture import Architecture
from cascade_llm.models.config_fields import ConfigFields
from cascade_llm.models.families.llama import llama_layer, with_biases
from cascade_llm.models.layer_types import FULL, SLIDING, WINDOW_SWITCH, with_switched_windows

__all__ = ["SMOLLM3"]


def _layer_ropes(config: ModelConfig, fields: ConfigFields) -> tuple[RopeConfig | None, ...]:
    """By `no_rope_layers`, 1 for each layer that rotates, else 0; without it one of so many rotates nothing."""
    if "no_rope_layers" in fields:
        rotates = fields.value("no_rope_layers")
        if not isinstance(rotates, list) or any(flag not in (0, 1) for flag in rotates):
            raise fields.wrong("no_rope_layers", "a list of 0 and 1")
        if len(rotates) != config.num_layers:
            raise fields.wrong("no_rope_layers", f"as long as num_hidden_layers, {config.num_layers}")
    else:
        interval = fields.count("no_rope_layer_interval")
        rotates = [(layer + 1) % interval != 0 for layer in range(config.num_layers)]
    return tuple(config.rope if flag else None for flag in rotates)


def _refine(config: ModelConfig, fields: ConfigFields) -> ModelConfig:
    ropes = _layer_ropes(config, fields)
    config = replace(with_biases(config, fields), layer_ropes=ropes)
    return with_switched_windows(config, fields, lambda layer: SLIDING if ropes[layer] is None else FULL)


SMOLLM3 = Architecture(
    hf_class="SmolLM3ForCausalLM",
    layer=llama_layer,
    refine=_refine,
    defaults={
        "num_key_value_heads": 4,
        "rope_theta": 2e6,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
    implements=WINDOW_SWITCH | {"no_rope_layers", "no_rope_layer_interval"},
)

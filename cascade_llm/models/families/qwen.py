"""Qwen 2 and 3 (Alibaba): as Llama, with a bias of q, k and v, or with norms of the heads.

Windows are off unless `use_sliding_window` is set; then the first `max_window_layers` layers have none.
"""

from __future__ import annotations

from dataclasses import replace

from cascade_llm.config import ModelConfig
from cascade_llm.models.architecture import Architecture
from cascade_llm.models.blocks import AttentionBlock, BlockOptions, DecoderLayer, GatedMLP
from cascade_llm.models.config_fields import ConfigFields
from cascade_llm.models.layer_types import FULL, SLIDING, WINDOW_SWITCH, with_switched_windows

__all__ = ["QWEN2", "QWEN3", "WINDOW_DEFAULTS", "qwen2_attention", "qwen3_attention", "with_attention_bias"]


def qwen2_attention(options: BlockOptions) -> AttentionBlock:
    """A bias of q, k and v, none of the projection back."""
    return AttentionBlock(options, qkv_bias=True)


def qwen3_attention(options: BlockOptions) -> AttentionBlock:
    """Norms of the heads; of a configuration with `with_attention_bias`."""
    bias = options.config.own["attention_bias"]
    return AttentionBlock(options, qkv_bias=bias, out_bias=bias, head_norms=True)


def with_attention_bias(config: ModelConfig, fields: ConfigFields) -> ModelConfig:
    """Reads `attention_bias`, of all four projections."""
    return replace(config, own={**config.own, "attention_bias": fields.flag("attention_bias")})


def _qwen2_layer(options: BlockOptions, index: int) -> DecoderLayer:
    return DecoderLayer(options, index, qwen2_attention(options), GatedMLP(options))


def _qwen3_layer(options: BlockOptions, index: int) -> DecoderLayer:
    return DecoderLayer(options, index, qwen3_attention(options), GatedMLP(options))


def _with_windows_above(config: ModelConfig, fields: ConfigFields) -> ModelConfig:
    """Without windows in the first `max_window_layers` layers, whose name says the contrary."""
    first = fields.number("max_window_layers")
    return with_switched_windows(config, fields, lambda layer: SLIDING if layer >= first else FULL)


def _qwen3_fields(config: ModelConfig, fields: ConfigFields) -> ModelConfig:
    return _with_windows_above(with_attention_bias(config, fields), fields)


WINDOW_DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28}

QWEN2 = Architecture(
    hf_class="Qwen2ForCausalLM",
    layer=_qwen2_layer,
    refine=_with_windows_above,
    defaults=WINDOW_DEFAULTS,
    implements=WINDOW_SWITCH,
)
QWEN3 = Architecture(
    hf_class="Qwen3ForCausalLM",
    layer=_qwen3_layer,
    refine=_qwen3_fields,
    defaults={"head_dim": 128, **WINDOW_DEFAULTS},
    implements=WINDOW_SWITCH,
)

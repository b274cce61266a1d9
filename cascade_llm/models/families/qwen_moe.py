"""Qwen 2 and 3 with experts (Alibaba): the attention of each, and a mixture of experts in all layers or some."""

from __future__ import annotations

from dataclasses import replace

from cascade_llm.config import ModelConfig
from cascade_llm.models.architecture import Architecture
from cascade_llm.models.blocks import MLP, AttentionBlock, BlockOptions, DecoderLayer, GatedMLP
from cascade_llm.models.config_fields import ConfigFields
from cascade_llm.models.experts import Experts
from cascade_llm.models.families.qwen import WINDOW_DEFAULTS, qwen3_attention, with_attention_bias
from cascade_llm.models.layer_types import FULL, SLIDING, WINDOW_SWITCH, with_switched_windows
from cascade_llm.models.routing_fields import read_routing

__all__ = ["QWEN2_MOE", "QWEN3_MOE"]


def _mlp(options: BlockOptions, index: int) -> MLP:
    """Experts, or where the configuration says so a gated product of `intermediate_size`."""
    own = options.config.own
    if index in own["dense_layers"]:
        return GatedMLP(options)
    return Experts(options, own["routing"], own["expert_size"], shared_size=own["shared_size"])


def _qwen2_layer(options: BlockOptions, index: int) -> DecoderLayer:
    attention = AttentionBlock(options, qkv_bias=options.config.own["qkv_bias"])
    return DecoderLayer(options, index, attention, _mlp(options, index))


def _qwen3_layer(options: BlockOptions, index: int) -> DecoderLayer:
    return DecoderLayer(options, index, qwen3_attention(options), _mlp(options, index))


def _with_experts(config: ModelConfig, fields: ConfigFields, shared_size: int | None) -> ModelConfig:
    """Reads how experts are chosen, how large they are, and which layers have none."""
    step, listed = fields.count("decoder_sparse_step", 1), fields.indices("mlp_only_layers", config.num_layers)
    routing = read_routing(fields, divides_by_sum=fields.flag("norm_topk_prob"))
    expert_size = fields.count("moe_intermediate_size")
    dense = frozenset(index for index in range(config.num_layers) if index in listed or (index + 1) % step)
    together = routing.num_experts * expert_size + (shared_size or 0)
    sizes = tuple(config.intermediate_size if index in dense else together for index in range(config.num_layers))
    own = {"routing": routing, "expert_size": expert_size, "shared_size": shared_size, "dense_layers": dense}
    return replace(config, gate_sizes=sizes, own={**config.own, **own})


def _qwen2_fields(config: ModelConfig, fields: ConfigFields) -> ModelConfig:
    """Windows are in every other of the first `max_window_layers` layers."""
    config = _with_experts(config, fields, fields.count("shared_expert_intermediate_size"))
    config = replace(config, own={**config.own, "qkv_bias": fields.flag("qkv_bias", True)})
    end = fields.number("max_window_layers")
    return with_switched_windows(config, fields, lambda layer: FULL if layer % 2 or layer >= end else SLIDING)


def _qwen3_fields(config: ModelConfig, fields: ConfigFields) -> ModelConfig:
    """Windows are in every layer."""
    config = with_attention_bias(_with_experts(config, fields, None), fields)
    return with_switched_windows(config, fields, lambda layer: SLIDING)


QWEN2_MOE = Architecture(
    hf_class="Qwen2MoeForCausalLM",
    layer=_qwen2_layer,
    refine=_qwen2_fields,
    defaults=WINDOW_DEFAULTS,
    implements=WINDOW_SWITCH | {"num_experts", "num_local_experts"},
)
QWEN3_MOE = Architecture(
    hf_class="Qwen3MoeForCausalLM",
    layer=_qwen3_layer,
    refine=_qwen3_fields,
    defaults=WINDOW_DEFAULTS,
    implements=(WINDOW_SWITCH - {"layer_types"}) | {"num_experts", "num_local_experts"},
)

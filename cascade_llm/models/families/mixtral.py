"""Mixtral (Jiang et al. 2024): Mistral's attention, and experts, of which the chosen ones' weights sum to 1."""

from __future__ import annotations

from dataclasses import replace

from cascade_llm.config import ModelConfig
from cascade_llm.models.architecture import Architecture
from cascade_llm.models.blocks import AttentionBlock, BlockOptions, DecoderLayer
from cascade_llm.models.config_fields import ConfigFields
from cascade_llm.models.experts import Experts
from cascade_llm.models.layer_types import with_windows_if_stated
from cascade_llm.models.routing_fields import read_routing

__all__ = ["MIXTRAL"]

OWN_NAMES = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
"""Parts of names in its checkpoints, and those of the blocks."""


def _layer(options: BlockOptions, index: int) -> DecoderLayer:
    experts = Experts(options, options.config.own["routing"], options.config.intermediate_size)
    return DecoderLayer(options, index, AttentionBlock(options), experts)


def _refine(config: ModelConfig, fields: ConfigFields) -> ModelConfig:
    routing = read_routing(fields, divides_by_sum=True)
    sizes = (routing.num_experts * config.intermediate_size,) * config.num_layers
    return with_windows_if_stated(replace(config, own={"routing": routing}, gate_sizes=sizes), fields)


def _tensor_name(name: str) -> str:
    for theirs, ours in OWN_NAMES.items():
        name = name.replace(theirs, ours)
    return name


MIXTRAL = Architecture(
    hf_class="MixtralForCausalLM",
    layer=_layer,
    refine=_refine,
    defaults={
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    },
    implements=frozenset({"sliding_window", "num_experts", "num_local_experts"}),
    tensor_name=_tensor_name,
)

"""Gemma 2 and 3, text (Google): norms before and after each block, GeGLU, scaled embeddings, windows in most layers.

Gemma 2 caps scores and logits. Gemma 3 normalises heads in its place, and rotates layers with windows by a theta of
their own. Gemma 3 from 4B on is a language model beside one of images, which is left out.
"""

from __future__ import annotations

import math
from dataclasses import replace

from cascade_llm.config import ModelConfig, RopeConfig
from cascade_llm.errors import UnsupportedModelError
from cascade_llm.models.architecture import Architecture
from cascade_llm.models.blocks import AttentionBlock, BlockOptions, DecoderLayer, GatedMLP, NormNames
from cascade_llm.models.config_fields import ConfigFields
from cascade_llm.models.layer_types import FULL, SLIDING, alternating, read_layer_types, with_windows
from cascade_llm.models.rope_fields import read_layer_type_ropes

__all__ = ["GEMMA2", "GEMMA3"]

NORMS = NormNames(
    before_attention="input_layernorm",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
ACTIVATIONS = ("gelu_pytorch_tanh", "gelu_tanh")
"""Names of gelu by its approximation with tanh."""
LOCAL_THETA = 10_000.0
"""Of Gemma 3's layers with windows, where config.json says nothing."""

IMPLEMENTS = frozenset(
    {
        "hidden_activation",
        "hidden_act",  # written beside `hidden_activation`, and read by nobody
        "sliding_window",
        "layer_types",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    }
)
SIZES = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}
"""That config.json leaves out where they are these, beside a model of images."""
DEFAULTS = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "eos_token_id": 1,
}


PARTS_LEFT_OUT = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
LANGUAGE_MODEL = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.",
    "model.language_model.": "model.",
}
"""What names of the language model's tensors begin with beside one of images, in older files and newer, and alone."""


def _name_alone(name: str) -> str | None:
    if name.startswith(PARTS_LEFT_OUT):
        return None
    for theirs, ours in LANGUAGE_MODEL.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _layer(options: BlockOptions, index: int) -> DecoderLayer:
    bias, head_norms = options.config.own["attention_bias"], options.config.own["head_norms"]
    attention = AttentionBlock(options, qkv_bias=bias, out_bias=bias, head_norms=head_norms)
    return DecoderLayer(options, index, attention, GatedMLP(options, activation=options.ops.gelu_tanh_and_mul), NORMS)


def _refine_gemma2(config: ModelConfig, fields: ConfigFields) -> ModelConfig:
    layer_types = read_layer_types(fields, config.num_layers, alternating(2))
    return with_windows(_refine(config, fields, head_norms=False), fields, layer_types)


def _refine_gemma3(config: ModelConfig, fields: ConfigFields) -> ModelConfig:
    period = fields.count("sliding_window_pattern", 6)
    layer_types = read_layer_types(fields, config.num_layers, alternating(period))
    config = with_windows(_refine(config, fields, head_norms=True), fields, layer_types)
    ropes = {FULL: config.rope, SLIDING: _local_rope(config, fields)}
    return replace(config, layer_ropes=tuple(ropes[kind] for kind in layer_types))


def _local_rope(config: ModelConfig, fields: ConfigFields) -> RopeConfig:
    """Of layers with windows: from `rope_parameters` that name them, or a plain one by `rope_local_base_freq`."""
    theta = fields.number("rope_local_base_freq", LOCAL_THETA, least=1.0)
    by_type = fields.object("rope_parameters").objects()
    if SLIDING not in by_type:
        return RopeConfig(theta=theta)
    stated = read_layer_type_ropes(fields, config.head_dim, IMPLEMENTS)[SLIDING]
    return stated if "rope_theta" in by_type[SLIDING] else replace(stated, theta=theta)


def _refine(config: ModelConfig, fields: ConfigFields, *, head_norms: bool) -> ModelConfig:
    if fields.value("hidden_activation") not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"config.json: hidden_activation is {fields.value('hidden_activation')!r}, implemented is {ACTIVATIONS[0]}"
        )
    return replace(
        config,
        norm_offset=1.0,
        embedding_multiplier=math.sqrt(config.hidden_size),
        attention_multiplier=fields.number("query_pre_attn_scalar", least=0.0) ** -0.5,
        attention_soft_cap=_soft_cap(fields, "attn_logit_softcapping"),
        final_soft_cap=_soft_cap(fields, "final_logit_softcapping"),
        own={"attention_bias": fields.flag("attention_bias"), "head_norms": head_norms},
    )


def _soft_cap(fields: ConfigFields, name: str) -> float | None:
    return fields.number(name, least=0.0) if name in fields else None


GEMMA2 = Architecture(
    hf_class="Gemma2ForCausalLM",
    layer=_layer,
    refine=_refine_gemma2,
    defaults={**DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    implements=IMPLEMENTS,
)
GEMMA3 = Architecture(
    hf_class="Gemma3ForCausalLM",
    layer=_layer,
    refine=_refine_gemma3,
    defaults={**DEFAULTS, **SIZES, "max_position_embeddings": 131_072, "rope_theta": 1e6},
    implements=IMPLEMENTS | {"layer_type_ropes"},
    tensor_name=_name_alone,
    wrapper="Gemma3ForConditionalGeneration",
)

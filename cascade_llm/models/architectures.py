"""Which architectures are served, and how a config.json is read.

A field that would change the mathematics and is not implemented is refused by name: a model is served right or not at
all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cascade_llm.config import ModelConfig
from cascade_llm.errors import CheckpointError, UnsupportedModelError
from cascade_llm.models.architecture import Architecture
from cascade_llm.models.config_fields import ConfigFields
from cascade_llm.models.families.ernie4_5 import ERNIE4_5
from cascade_llm.models.families.gemma import GEMMA2, GEMMA3
from cascade_llm.models.families.glm4 import GLM4
from cascade_llm.models.families.gpt_oss import GPT_OSS
from cascade_llm.models.families.granite import GRANITE
from cascade_llm.models.families.llama import LLAMA
from cascade_llm.models.families.mistral import MISTRAL
from cascade_llm.models.families.mixtral import MIXTRAL
from cascade_llm.models.families.olmo2 import OLMO2
from cascade_llm.models.families.phi3 import PHI3
from cascade_llm.models.families.qwen import QWEN2, QWEN3
from cascade_llm.models.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from cascade_llm.models.families.smollm3 import SMOLLM3
from cascade_llm.models.rope_fields import read_rope

__all__ = ["ARCHITECTURES", "Architecture", "model_config_from_hf"]

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "phi3": PHI3,
    "glm4": GLM4,
    "olmo2": OLMO2,
    "smollm3": SMOLLM3,
    "granite": GRANITE,
    "ernie4_5": ERNIE4_5,
    "gpt_oss": GPT_OSS,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
}
"""By `model_type` of config.json."""

NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "rotary_interleaved": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "attn_logit_softcap": (),
    "final_logit_softcap": (),
    "clip_qkv": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "use_qk_norm": (False,),
    "use_bias": (False,),
    "use_parallel_residual": (False,),
    "parallel_attn": (False,),
    "alibi": (False,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "use_sliding_window": (False,),
    "attention_chunk_size": (),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0, 1),
    "kv_lora_rank": (),
}
"""Fields that change the mathematics, with the values at which they do not; null and absence never do."""


def model_config_from_hf(
    hf_config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Read a config.json (of transformers 4 or 5) and, for the ending ids, a generation_config.json.

    Raises:
        UnsupportedModelError: the architecture, or a field that changes the mathematics, is not implemented
        CheckpointError: a field is missing or makes no sense
    """
    hf_config = _text_part(hf_config)
    name = _architecture_name(ConfigFields(hf_config))
    architecture = ARCHITECTURES[name]
    fields = ConfigFields(hf_config, defaults=architecture.defaults)
    _refuse_unimplemented(fields, architecture)
    _require(fields)
    _check_layer_types(fields)
    hidden_size, num_qo_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    head_dim = fields.count("head_dim", hidden_size // num_qo_heads)
    num_kv_heads = fields.count("num_key_value_heads", num_qo_heads)
    if num_qo_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {num_qo_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        )
    if head_dim % 2:
        raise CheckpointError(f"config.json: head_dim is {head_dim}: rotary embedding needs an even one")
    config = ModelConfig(
        architecture=name,
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        num_layers=fields.count("num_hidden_layers", most=MAX_LAYERS),
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fields.count("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, least=0.0),
        rope=read_rope(fields, head_dim, architecture.implements),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        dtype=_dtype(fields),
        ending_token_ids=_ending_ids(fields)
        | _ending_ids(ConfigFields(generation_config or {}, where="generation_config.json")),
    )
    return architecture.refine(config, fields)


MAX_LAYERS = 4096

REQUIRED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


OUTER_FIELDS = ("dtype", "torch_dtype", "eos_token_id", "tie_word_embeddings")
"""Of a model of several parts: those that are said of all, and count where the language model's own differ."""


def _text_part(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's fields, where it is one of several parts."""
    fields = ConfigFields(hf_config)
    classes = fields.texts("architectures")
    for architecture in ARCHITECTURES.values():
        if architecture.wrapper in classes:
            fields.object("text_config")
            if "text_config" not in fields:
                raise CheckpointError(f"config.json lacks text_config: {architecture.wrapper} has its model there")
            outer = {name: hf_config[name] for name in OUTER_FIELDS if name in fields}
            return {**hf_config["text_config"], **outer, "architectures": [architecture.hf_class]}
    return hf_config


def _require(fields: ConfigFields) -> None:
    if missing := [name for name in REQUIRED_FIELDS if name not in fields]:
        raise CheckpointError(f"config.json lacks {', '.join(missing)}: is it the model's own, and whole?")


def _architecture_name(fields: ConfigFields) -> str:
    """The key of `ARCHITECTURES`; the class name decides where both are there, as it says which head is on top."""
    classes, model_type = fields.texts("architectures"), fields.value("model_type")
    for name, architecture in ARCHITECTURES.items():
        if architecture.hf_class in classes or (not classes and name == model_type):
            return name
    found = ", ".join(classes) or f"model_type {model_type!r}"
    known = ", ".join(f"{architecture.hf_class} ({name})" for name, architecture in ARCHITECTURES.items())
    raise UnsupportedModelError(f"architecture {found} is not implemented; supported: {known}")


def _refuse_unimplemented(fields: ConfigFields, architecture: Architecture) -> None:
    refused = [
        f"{name}={fields.value(name)!r}"
        for name, neutral in NEUTRAL_VALUES.items()
        if name in fields and fields.value(name) not in neutral and name not in architecture.implements
    ]
    if "sliding_window" in fields and "sliding_window" not in architecture.implements:
        refused.append(f"sliding_window={fields.value('sliding_window')!r}")
    layer_types = set(fields.texts("layer_types")) - {"full_attention"}
    if layer_types and "layer_types" not in architecture.implements:
        refused.append(f"layer_types with {', '.join(sorted(layer_types))}")
    if refused:
        raise UnsupportedModelError(
            f"config.json asks for what is not implemented: {'; '.join(refused)}. Serving the model without it would "
            "give wrong text; choose a checkpoint without it"
        )


def _check_layer_types(fields: ConfigFields) -> None:
    """Also where an architecture reads nothing of them: a list that is longer or shorter is of another model."""
    num_layers = fields.count("num_hidden_layers", most=MAX_LAYERS)
    if "layer_types" in fields and len(fields.texts("layer_types")) != num_layers:
        raise fields.wrong("layer_types", f"a list of {num_layers}, as num_hidden_layers says")


def _dtype(fields: ConfigFields) -> str:
    """The checkpoint's dtype; what it does not say, or no plain float, is float32."""
    name = "dtype" if "dtype" in fields else "torch_dtype"
    stated = fields.value(name) if name in fields else "float32"
    if not isinstance(stated, str):
        raise fields.wrong(name, "a text, such as 'bfloat16'")
    stated = stated.removeprefix("torch.")
    return stated if stated in ("float32", "float16", "bfloat16") else "float32"


def _ending_ids(fields: ConfigFields) -> frozenset[int]:
    """`eos_token_id`: null, one id, or a list of them."""
    ids = fields.value("eos_token_id")
    if ids is None:
        return frozenset()
    listed = ids if isinstance(ids, list | tuple) else (ids,)
    if any(not isinstance(token_id, int) or isinstance(token_id, bool) for token_id in listed):
        raise fields.wrong("eos_token_id", "a token id or a list of them")
    return frozenset(listed)

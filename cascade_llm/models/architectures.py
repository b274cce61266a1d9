"""Which architectures are served, stated as compositions of blocks, and how their config.json is read.

A field that would change the mathematics and is not implemented is refused by name: a model is served right or not at
all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from reprlib import repr as short_repr
from typing import Any

from cascade_llm.config import ModelConfig, RopeConfig
from cascade_llm.errors import CheckpointError, UnsupportedModelError
from cascade_llm.layers.rope import ROPE_TYPES
from cascade_llm.models.blocks import AttentionBlock, BlockOptions, DecoderLayer, GatedMLP, PreNormLayer

__all__ = ["ARCHITECTURES", "Architecture", "model_config_from_hf"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What sets one architecture apart."""

    hf_class: str
    layer: Callable[[BlockOptions, int], DecoderLayer]
    """Composes the layer of an index from blocks."""
    own_fields: Mapping[str, bool] = field(default_factory=dict)
    """Fields of config.json that `layer` reads from `ModelConfig.own`, with their defaults."""
    default_head_dim: int | None = None
    """Where config.json has none; None is hidden_size / num_attention_heads."""
    has_window_switch: bool = False
    """`sliding_window` is in force only with `use_sliding_window`."""


def _llama_layer(options: BlockOptions, index: int) -> DecoderLayer:
    """Llama (Touvron et al. 2023)."""
    bias, mlp_bias = options.config.own["attention_bias"], options.config.own["mlp_bias"]
    attention = AttentionBlock(options, qkv_bias=bias, out_bias=bias)
    return PreNormLayer(options, index, attention, GatedMLP(options, bias=mlp_bias))


def _qwen2_layer(options: BlockOptions, index: int) -> DecoderLayer:
    """As Llama, with a bias of q, k and v."""
    return PreNormLayer(options, index, AttentionBlock(options, qkv_bias=True), GatedMLP(options))


def _qwen3_layer(options: BlockOptions, index: int) -> DecoderLayer:
    """As Llama, with norms of the heads."""
    bias = options.config.own["attention_bias"]
    attention = AttentionBlock(options, qkv_bias=bias, out_bias=bias, head_norms=True)
    return PreNormLayer(options, index, attention, GatedMLP(options))


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        hf_class="LlamaForCausalLM",
        layer=_llama_layer,
        own_fields={"attention_bias": False, "mlp_bias": False},
    ),
    "qwen2": Architecture(hf_class="Qwen2ForCausalLM", layer=_qwen2_layer, has_window_switch=True),
    "qwen3": Architecture(
        hf_class="Qwen3ForCausalLM",
        layer=_qwen3_layer,
        own_fields={"attention_bias": False},
        default_head_dim=128,
        has_window_switch=True,
    ),
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
    name = _architecture_name(hf_config)
    architecture = ARCHITECTURES[name]
    _refuse_unimplemented(hf_config, architecture)
    _require(hf_config)
    hidden_size, num_qo_heads = _count(hf_config, "hidden_size"), _count(hf_config, "num_attention_heads")
    head_dim = _count(hf_config, "head_dim", architecture.default_head_dim or hidden_size // num_qo_heads)
    num_kv_heads = _count(hf_config, "num_key_value_heads", num_qo_heads)
    if num_qo_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {num_qo_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        )
    if head_dim % 2:
        raise CheckpointError(f"config.json: head_dim is {head_dim}: rotary embedding needs an even one")
    rope = _rope_config(hf_config)
    if rope.rope_type == "dynamic" and head_dim == 2:
        raise CheckpointError("config.json: head_dim is 2: a dynamic rotary embedding needs 4 or more")

    return ModelConfig(
        architecture=name,
        vocab_size=_count(hf_config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_count(hf_config, "intermediate_size"),
        num_layers=_count(hf_config, "num_hidden_layers", most=MAX_LAYERS),
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=_count(hf_config, "max_position_embeddings"),
        rms_norm_eps=_number(hf_config, "rms_norm_eps", 1e-6, least=0.0),
        rope=rope,
        tie_word_embeddings=_flag(hf_config, "tie_word_embeddings", False),
        own={name: _flag(hf_config, name, default) for name, default in architecture.own_fields.items()},
        dtype=_dtype(hf_config),
        ending_token_ids=_ending_ids(hf_config) | _ending_ids(generation_config or {}, "generation_config.json"),
    )


MAX_LAYERS = 4096
MAX_COUNT = 2**31 - 1
"""Of any dimension: what an index of 32 bits reaches."""
LARGEST = 1e30
"""Of any number."""

REQUIRED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def _require(hf_config: Mapping[str, Any]) -> None:
    missing = [name for name in REQUIRED_FIELDS if hf_config.get(name) is None]
    if missing:
        raise CheckpointError(f"config.json lacks {', '.join(missing)}: is it the model's own, and whole?")


def _architecture_name(hf_config: Mapping[str, Any]) -> str:
    """The key of `ARCHITECTURES`; the class name decides where both are there, as it says which head is on top."""
    classes = _texts(hf_config, "architectures")
    model_type = hf_config.get("model_type")
    for name, architecture in ARCHITECTURES.items():
        if architecture.hf_class in classes or (not classes and name == model_type):
            return name
    found = ", ".join(classes) or f"model_type {model_type!r}"
    known = ", ".join(f"{architecture.hf_class} ({name})" for name, architecture in ARCHITECTURES.items())
    raise UnsupportedModelError(f"architecture {found} is not implemented; supported: {known}")


def _refuse_unimplemented(hf_config: Mapping[str, Any], architecture: Architecture) -> None:
    refused = [
        f"{name}={hf_config[name]!r}"
        for name, neutral in NEUTRAL_VALUES.items()
        if hf_config.get(name) is not None and hf_config[name] not in neutral
    ]
    if hf_config.get("sliding_window") is not None and not architecture.has_window_switch:
        refused.append(f"sliding_window={hf_config['sliding_window']!r}")
    layer_types = set(_texts(hf_config, "layer_types")) - {"full_attention"}
    if layer_types:
        refused.append(f"layer_types with {', '.join(sorted(layer_types))}")
    if refused:
        raise UnsupportedModelError(
            f"config.json asks for what is not implemented: {'; '.join(refused)}. Serving the model without it would "
            "give wrong text; choose a checkpoint without it"
        )


def _rope_config(hf_config: Mapping[str, Any]) -> RopeConfig:
    """From `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (before)."""
    newer = _mapping(hf_config, "rope_parameters")
    fields = _mapping(hf_config, "rope_scaling") or newer
    where = "rope_scaling" if hf_config.get("rope_scaling") else "rope_parameters"
    if any(isinstance(value, Mapping) for value in fields.values()):
        raise UnsupportedModelError(f"config.json: {where} differs between layer types, which is not implemented")
    rope_type = fields.get("rope_type") or fields.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"config.json: rope type {rope_type!r} is not implemented; supported: {', '.join(ROPE_TYPES)}"
        )
    if fields.get("partial_rotary_factor") not in (None, 1) or fields.get("mrope_section"):
        raise UnsupportedModelError(f"config.json: {where} rotates by partial_rotary_factor or mrope_section")
    holder = next((held for held in (fields, newer, hf_config) if held.get("rope_theta") is not None), fields)
    theta = _number(holder, "rope_theta", 10000.0, least=1.0)
    if rope_type == "default":
        return RopeConfig(theta=theta)
    return RopeConfig(theta=theta, rope_type=rope_type, **_rope_scaling(hf_config, fields, rope_type, where))


def _rope_scaling(
    hf_config: Mapping[str, Any], fields: Mapping[str, Any], rope_type: str, where: str
) -> dict[str, Any]:
    """The fields of `RopeConfig` that say how far, and how, positions are stretched."""
    max_len = _count(hf_config, "max_position_embeddings")
    if rope_type in ("llama3", "yarn"):
        inner = _count(fields, "original_max_position_embeddings", max_len)
        original_len = _count(hf_config, "original_max_position_embeddings", inner)
    else:
        original_len = max_len
    scaling: dict[str, Any] = {"original_max_position_embeddings": original_len}
    if fields.get("factor") is not None:
        scaling["factor"] = _number(fields, "factor", 1.0, least=0.0, where=where)
    elif rope_type == "yarn":
        scaling["factor"] = max_len / original_len
    given = {name: least for name, least in SCALING_NUMBERS.items() if fields.get(name) is not None}
    # 0 means "not given" for the two ends of yarn's ramp, as transformers reads them
    given = {name: least for name, least in given.items() if least is None or fields[name] != 0}
    scaling.update({name: _number(fields, name, 1.0, least=least, where=where) for name, least in given.items()})
    required = ("factor", "low_freq_factor", "high_freq_factor") if rope_type == "llama3" else ("factor",)
    if missing := [name for name in required if name not in scaling]:
        raise CheckpointError(f"config.json: {where} of type {rope_type} lacks {', '.join(missing)}")
    if rope_type == "llama3" and scaling["low_freq_factor"] == scaling["high_freq_factor"]:
        raise CheckpointError(f"config.json: {where} has equal low_freq_factor and high_freq_factor")
    return {**scaling, "truncate": _flag(fields, "truncate", True)}


SCALING_NUMBERS: Mapping[str, float | None] = {
    "low_freq_factor": None,
    "high_freq_factor": None,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "beta_fast": 0.0,
    "beta_slow": 0.0,
}
"""Each with what it must be larger than."""


def _wrong(name: str, value: object, wanted: str, where: str = "config.json") -> CheckpointError:
    return CheckpointError(f"{where}: {name} is {short_repr(value)}: it must be {wanted}")


def _count(fields: Mapping[str, Any], name: str, default: int | None = None, most: int = MAX_COUNT) -> int:
    """A field that must be a positive integer."""
    value = default if fields.get(name) is None else fields[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _wrong(name, value, "an integer, 1 or larger")
    if value > most:
        raise _wrong(name, value, f"at most {most:,}")
    return value


def _number(
    fields: Mapping[str, Any], name: str, default: float, *, least: float | None = None, where: str = ""
) -> float:
    """A field that must be a finite number, above `least`."""
    value = default if fields.get(name) is None else fields[name]
    where = f"config.json: {where}" if where else "config.json"
    if not isinstance(value, int | float) or isinstance(value, bool) or not -LARGEST <= value <= LARGEST:
        raise _wrong(name, value, "a number", where)
    if least is not None and value <= least:
        raise _wrong(name, value, f"larger than {least:g}", where)
    return float(value)


def _flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = default if fields.get(name) is None else fields[name]
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _mapping(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A field that must be an object; empty where it is null or not there."""
    value = fields.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise _wrong(name, value, "an object")
    return value or {}


def _texts(fields: Mapping[str, Any], name: str) -> list[str]:
    """A field that must be a list of texts; empty where it is null or not there."""
    value = fields.get(name)
    if value is None:
        return []
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise _wrong(name, value, "a list of texts")
    return list(value)


def _dtype(hf_config: Mapping[str, Any]) -> str:
    """The checkpoint's dtype; what it does not say, or no plain float, is float32."""
    name = "dtype" if hf_config.get("dtype") is not None else "torch_dtype"
    stated = "float32" if hf_config.get(name) is None else hf_config[name]
    if not isinstance(stated, str):
        raise _wrong(name, stated, "a text, such as 'bfloat16'")
    stated = stated.removeprefix("torch.")
    return stated if stated in ("float32", "float16", "bfloat16") else "float32"


def _ending_ids(config: Mapping[str, Any], where: str = "config.json") -> frozenset[int]:
    """`eos_token_id`: null, one id, or a list of them."""
    ids = config.get("eos_token_id")
    if ids is None:
        return frozenset()
    listed = ids if isinstance(ids, list | tuple) else (ids,)
    if any(not isinstance(token_id, int) or isinstance(token_id, bool) for token_id in listed):
        raise _wrong("eos_token_id", ids, "a token id or a list of them", where)
    return frozenset(listed)

"""Which architectures a GGUF file may hold, and what llama.cpp's conversion makes of each.

Names of keys and tensors are those of the `gguf` package; what a conversion changes beside them is stated here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from cascade_llm.errors import UnsupportedModelError
from cascade_llm.loader.gguf_file import GGUFFile
from cascade_llm.loader.gguf_gemma import gemma2_fields, gemma3_fields, layer_types_of
from cascade_llm.loader.gguf_keys import GGUFKeys
from cascade_llm.loader.gguf_yarn import yarn_scaling

__all__ = ["EXPERT_PARTS", "GGUF_ARCHITECTURES", "GGUFArchitecture", "architecture_of"]

LAYER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
"""Of most architectures: GGUF's name of a tensor in a layer, and Hugging Face's."""


EXPERTS = "mlp.experts"
EXPERT_PARTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ffn_gate_exps": ("gate_proj",),
        "ffn_up_exps": ("up_proj",),
        "ffn_gate_up_exps": ("gate_proj", "up_proj"),
        "ffn_down_exps": ("down_proj",),
    }
)
"""GGUF's name of a tensor [experts, outputs, inputs], and Hugging Face's names of the parts that its outputs are of."""
EXPERT_KEYS = frozenset({"expert_count", "expert_weights_norm"})


def _no_fields(keys: GGUFKeys, head_dim: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class GGUFArchitecture:
    """One value of general.architecture."""

    hf_class: str
    model_type: str
    """Hugging Face's name."""
    own_names: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors in a layer beside `LAYER_NAMES`, or in place of its own; with `.weight` where Hugging
    Face's does not end so."""
    interleaves_heads: bool = False
    """Whether the conversion interleaves the two halves of each query and key head, row by row: llama.cpp then rotates
    neighbours, Hugging Face halves."""
    implements: frozenset[str] = frozenset()
    """Keys of `gguf_config.NEUTRAL_VALUES`, and "rope.dimension_count", that `fields` or the common fields read."""
    fields: Callable[[GGUFKeys, int], dict[str, Any]] = _no_fields
    """Fields of config.json beyond those of all, from the keys and the dimensions of a head."""
    has_experts: bool = False
    """Whether its layers have tensors of all experts, as in `EXPERT_PARTS`."""
    norm_offset: float = 0.0
    """What a conversion adds to the weight of every norm."""
    also_holds: tuple[str, ...] = ()
    """Classes of Hugging Face whose models are converted to this architecture too."""
    with_experts: GGUFArchitecture | None = None
    """What it is where the file counts experts, if that is another architecture of Hugging Face."""

    @property
    def layer_names(self) -> Mapping[str, str]:
        """Of all tensors in a layer; of those of all experts, what their names begin with."""
        experts = {"ffn_gate_inp": "mlp.gate", **dict.fromkeys(EXPERT_PARTS, EXPERTS)} if self.has_experts else {}
        return {**LAYER_NAMES, **experts, **self.own_names}


def architecture_of(file: GGUFFile) -> GGUFArchitecture:
    """Raises `UnsupportedModelError`, with the names of those that are implemented."""
    name = str(file.metadata.get("general.architecture"))
    if name not in GGUF_ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path}: architecture {name!r} is not implemented: supported are {', '.join(GGUF_ARCHITECTURES)}"
        )
    held = GGUF_ARCHITECTURES[name]
    return held.with_experts if held.with_experts and file.metadata.get(f"{name}.expert_count") else held


def _granite_fields(keys: GGUFKeys, head_dim: int) -> dict[str, Any]:
    """A scale of 0 is one that is not given."""

    def scale(name: str, default: float) -> float:
        return keys.number(name, 0.0) or default

    return {
        "attention_multiplier": scale("attention.scale", head_dim**-0.5),
        "embedding_multiplier": scale("embedding_scale", 1.0),
        "residual_multiplier": scale("residual_scale", 1.0),
        "logits_scaling": scale("logit_scale", 1.0),
    }


def _smollm3_fields(keys: GGUFKeys, head_dim: int) -> dict[str, Any]:
    """No key tells which layers rotate: llama.cpp knows SmolLM3's."""
    return {"no_rope_layer_interval": 4}


def _expert_fields(keys: GGUFKeys, divides_by_sum: bool) -> dict[str, Any]:
    """`divides_by_sum`: what llama.cpp does with the weights of this architecture where no key tells."""
    num_chosen = keys.integer("expert_used_count")
    size = keys.integer("expert_feed_forward_length", max(1, keys.integer("feed_forward_length") // num_chosen))
    return {
        "num_experts": keys.integer("expert_count"),
        "num_experts_per_tok": num_chosen,
        "moe_intermediate_size": size,
        "norm_topk_prob": keys.get("expert_weights_norm", divides_by_sum),
    }


def _qwen2_moe_fields(keys: GGUFKeys, head_dim: int) -> dict[str, Any]:
    return {
        **_expert_fields(keys, divides_by_sum=False),
        "shared_expert_intermediate_size": keys.integer(
            "expert_shared_feed_forward_length", keys.integer("feed_forward_length")
        ),
        "qkv_bias": "blk.0.attn_q.bias" in keys.file.tensors,
    }


def _qwen3_moe_fields(keys: GGUFKeys, head_dim: int) -> dict[str, Any]:
    return _expert_fields(keys, divides_by_sum=True)


def _local_expert_fields(keys: GGUFKeys, head_dim: int) -> dict[str, Any]:
    return {
        "num_local_experts": keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
    }


def _ernie_fields(keys: GGUFKeys, head_dim: int) -> dict[str, Any]:
    return {"use_bias": "blk.0.attn_q.bias" in keys.file.tensors}


def _phi3_fields(keys: GGUFKeys, head_dim: int) -> dict[str, Any]:
    return {"sliding_window": keys.get("attention.sliding_window") or None}  # 0 is none


def _gpt_oss_fields(keys: GGUFKeys, head_dim: int) -> dict[str, Any]:
    """YaRN's ramp is not rounded to whole dimensions, which no key tells."""
    scaling: dict[str, Any] = {"rope_type": "default"}
    if keys.get("rope.scaling.type") == "yarn":
        scaling = {**yarn_scaling(keys, keys.number("rope.scaling.factor")), "truncate": False}
    return {
        **_local_expert_fields(keys, head_dim),
        "intermediate_size": keys.integer("expert_feed_forward_length"),
        "sliding_window": keys.integer("attention.sliding_window"),
        "layer_types": layer_types_of(keys, 2),
        "rope_scaling": scaling,
    }


GEMMA_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GEMMA_KEYS = frozenset({"attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window"})

MIXTRAL = GGUFArchitecture(
    hf_class="MixtralForCausalLM",
    model_type="mixtral",
    interleaves_heads=True,
    has_experts=True,
    implements=EXPERT_KEYS,
    fields=_local_expert_fields,
)

GGUF_ARCHITECTURES: Mapping[str, GGUFArchitecture] = {
    "llama": GGUFArchitecture(
        hf_class="LlamaForCausalLM",
        model_type="llama",
        interleaves_heads=True,
        also_holds=("MistralForCausalLM", "MixtralForCausalLM"),
        with_experts=MIXTRAL,
    ),
    "qwen2": GGUFArchitecture(hf_class="Qwen2ForCausalLM", model_type="qwen2"),
    "qwen3": GGUFArchitecture(hf_class="Qwen3ForCausalLM", model_type="qwen3"),
    "qwen2moe": GGUFArchitecture(
        hf_class="Qwen2MoeForCausalLM",
        model_type="qwen2_moe",
        own_names={
            "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
            "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
            "ffn_up_shexp": "mlp.shared_expert.up_proj",
            "ffn_down_shexp": "mlp.shared_expert.down_proj",
        },
        has_experts=True,
        implements=EXPERT_KEYS,
        fields=_qwen2_moe_fields,
    ),
    "qwen3moe": GGUFArchitecture(
        hf_class="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        has_experts=True,
        implements=EXPERT_KEYS,
        fields=_qwen3_moe_fields,
    ),
    "phi3": GGUFArchitecture(
        hf_class="Phi3ForCausalLM",
        model_type="phi3",
        own_names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        implements=frozenset({"rope.dimension_count", "attention.sliding_window"}),
        fields=_phi3_fields,
    ),
    "glm4": GGUFArchitecture(
        hf_class="Glm4ForCausalLM",
        model_type="glm4",
        own_names={
            "ffn_up": "mlp.gate_up_proj",
            "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        },
        implements=frozenset({"rope.dimension_count"}),
    ),
    "olmo2": GGUFArchitecture(
        hf_class="Olmo2ForCausalLM",
        model_type="olmo2",
        own_names={
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
    ),
    "smollm3": GGUFArchitecture(
        hf_class="SmolLM3ForCausalLM", model_type="smollm3", interleaves_heads=True, fields=_smollm3_fields
    ),
    "gpt-oss": GGUFArchitecture(
        hf_class="GptOssForCausalLM",
        model_type="gpt_oss",
        own_names={
            "attn_sinks.weight": "self_attn.sinks",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.router",
        },
        has_experts=True,
        implements=EXPERT_KEYS | {"attention.sliding_window"},
        fields=_gpt_oss_fields,
    ),
    "gemma2": GGUFArchitecture(
        hf_class="Gemma2ForCausalLM",
        model_type="gemma2",
        own_names=GEMMA_NAMES,
        implements=GEMMA_KEYS,
        fields=gemma2_fields,
        norm_offset=1.0,
    ),
    "gemma3": GGUFArchitecture(
        hf_class="Gemma3ForCausalLM",
        model_type="gemma3_text",
        own_names=GEMMA_NAMES,
        implements=GEMMA_KEYS,
        fields=gemma3_fields,
        norm_offset=1.0,
    ),
    "granite": GGUFArchitecture(
        hf_class="GraniteForCausalLM",
        model_type="granite",
        interleaves_heads=True,
        implements=frozenset({"attention.scale", "embedding_scale", "residual_scale", "logit_scale"}),
        fields=_granite_fields,
    ),
    "ernie4_5": GGUFArchitecture(hf_class="Ernie4_5ForCausalLM", model_type="ernie4_5", fields=_ernie_fields),
}
"""By general.architecture."""

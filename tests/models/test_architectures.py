from __future__ import annotations

from typing import Any

import pytest
import torch

from cascade_llm.config import ModelConfig, RopeConfig
from cascade_llm.errors import CheckpointError, UnsupportedModelError
from cascade_llm.models.architectures import ARCHITECTURES, REQUIRED_FIELDS, model_config_from_hf
from cascade_llm.models.decoder import Decoder
from cascade_llm.weights.format import WeightOptions
from tests.models.checkpoints import TINY
from tests.models.families import FAMILIES

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
QWEN3: dict[str, Any] = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
QWEN2: dict[str, Any] = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


def differences(config: ModelConfig) -> tuple[bool, bool, bool, bool]:
    """Biases of q, k and v, of attention's output, of the MLP; norms of heads: as the composed layers have them."""
    layers = Decoder(config, WeightOptions(dtype=torch.float32, device=torch.device("cpu"))).layers
    found = {
        (
            layer.attention.qkv.bias is not None,
            layer.attention.out.bias is not None,
            any(linear.bias is not None for linear in layer.mlp.linears),
            layer.attention.head_norms is not None,
        )
        for layer in layers
    }
    (only,) = found
    return only


def test_defaults_of_a_bare_llama() -> None:
    config = model_config_from_hf(LLAMA)
    assert (config.architecture, config.head_dim, config.num_kv_heads) == ("llama", 16, 4)
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.dtype) == (1e-6, False, "float32")
    assert config.rope == RopeConfig()
    assert differences(config) == (False,) * 4
    assert config.ending_token_ids == frozenset()


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({**LLAMA, "attention_bias": True, "mlp_bias": True}, (True, True, True, False)),
        (QWEN2, (True, False, False, False)),
        (QWEN3, (False, False, False, True)),
        ({**QWEN3, "attention_bias": True}, (True, True, False, True)),
    ],
)
def test_architectures_differ_by_facts(fields: dict[str, Any], facts: tuple[bool, ...]) -> None:
    assert differences(model_config_from_hf(fields)) == facts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    family, ours = FAMILIES[architecture], ARCHITECTURES[architecture]
    own = {name: value for name, value in family.fields.items() if name not in (*ours.defaults, "head_dim")}
    given = {**{name: TINY[name] for name in (*REQUIRED_FIELDS, "num_key_value_heads")}, **own}
    config = family.config_class(**given, pad_token_id=None, eos_token_id=2)
    whole = {**config.to_dict(), "architectures": [ours.hf_class]}
    bare = {"architectures": whole["architectures"], **given, "eos_token_id": 2}
    if "sliding_window" not in ours.implements:  # a window is refused; `sliding_window` has no default
        bare["sliding_window"] = whole["sliding_window"] = None
    assert model_config_from_hf(bare) == model_config_from_hf(whole)


def test_model_type_decides_where_no_class_is_named() -> None:
    assert model_config_from_hf({**QWEN2, "architectures": None}).architecture == "qwen2"


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": ["DeepseekV3ForCausalLM"]},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": None, "model_type": "gpt2"},
        {"architectures": None, "model_type": None},
    ],
)
def test_an_unknown_architecture_lists_the_supported(fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM.*Qwen2ForCausalLM.*Qwen3ForCausalLM"):
        model_config_from_hf({**LLAMA, **fields})


@pytest.mark.parametrize(
    ("base", "fields"),
    [
        (LLAMA, {"hidden_act": "gelu"}),
        (LLAMA, {"sliding_window": 4096}),
        (LLAMA, {"partial_rotary_factor": 0.5}),
        (LLAMA, {"attn_logit_softcapping": 50.0}),
        (LLAMA, {"final_logit_softcapping": 30.0}),
        (LLAMA, {"num_local_experts": 8}),
        (LLAMA, {"layer_types": ["full_attention", "sliding_attention"]}),
    ],
)
def test_a_field_that_changes_the_mathematics_is_refused_by_name(base: dict[str, Any], fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        model_config_from_hf({**base, **fields})
    assert next(iter(fields)) in str(caught.value)


@pytest.mark.parametrize(
    ("base", "fields"),
    [
        (LLAMA, {"pretraining_tp": 2, "attention_dropout": 0.1, "use_cache": False, "hidden_act": "silu"}),
        (LLAMA, {"sliding_window": None, "layer_types": ["full_attention"] * 2, "quantization_config": None}),
        (QWEN2, {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1}),
        (QWEN3, {"sliding_window": 4096}),
        (LLAMA, {"num_experts": 0, "partial_rotary_factor": 1.0}),
    ],
)
def test_a_field_without_effect_is_accepted(base: dict[str, Any], fields: dict[str, Any]) -> None:
    assert model_config_from_hf({**base, "head_dim": 16, **fields}) == model_config_from_hf({**base, "head_dim": 16})


def test_missing_fields_are_named_together() -> None:
    fields = {name: value for name, value in LLAMA.items() if name not in ("vocab_size", "hidden_size")}
    with pytest.raises(CheckpointError, match="lacks vocab_size, hidden_size"):
        model_config_from_hf(fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling of type linear lacks factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        ({"rope_theta": 0}, "rope_theta is 0: it must be larger than 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers is 2147483648: it must be at most 4,096"),
        ({"vocab_size": 10**4000}, r"vocab_size is 10000+\.\.\.0+: it must be at most 2,147,483,647"),
        ({"architectures": 7}, "architectures is 7: it must be a list of texts"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'"),
        ({"layer_types": [["full_attention"]]}, "layer_types is"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear': it must be an object"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling: factor is '4'"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling: factor is 0"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": -1}}, "rope_scaling: beta_fast is -1"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "truncate": "no"}}, "truncate is 'no'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}, "head_dim": 2}, "head_dim is 2"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "equal low_freq_factor and high_freq_factor",
        ),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false': it must be true or false"),
        ({"attention_bias": 1}, "attention_bias is 1"),
        ({"torch_dtype": 16}, "torch_dtype is 16"),
        ({"eos_token_id": [True]}, r"config\.json: eos_token_id is \[True\]"),
    ],
)
def test_a_field_that_makes_no_sense_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        model_config_from_hf({**LLAMA, **fields})


YARN = {"factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16}


@pytest.mark.parametrize("rope_key", ["type", "rope_type"])
def test_old_and_new_spellings_of_rope_agree(rope_key: str) -> None:
    old = model_config_from_hf({**LLAMA, "rope_theta": 1e6, "rope_scaling": {rope_key: "yarn", **YARN}})
    new = model_config_from_hf({**LLAMA, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}})
    assert old == new
    assert old.rope == RopeConfig(
        theta=1e6, rope_type="yarn", factor=4.0, original_max_position_embeddings=128, beta_fast=16.0
    )


def test_old_default_scaling_is_plain_rope() -> None:
    assert model_config_from_hf({**LLAMA, "rope_scaling": None, "rope_theta": 1e5}).rope == RopeConfig(theta=1e5)
    assert model_config_from_hf({**LLAMA, "rope_scaling": {"type": "default"}}).rope == RopeConfig()


def test_yarn_without_a_factor_takes_the_ratio_of_lengths() -> None:
    scaling = {"type": "yarn", "factor": None, "original_max_position_embeddings": 128}
    assert model_config_from_hf({**LLAMA, "rope_scaling": scaling}).rope.factor == 4.0


def test_the_original_length_defaults_to_the_stated_one_and_may_stand_outside() -> None:
    scaling = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert model_config_from_hf({**LLAMA, "rope_scaling": scaling}).rope.original_max_position_embeddings == 512
    outside = {**LLAMA, "rope_scaling": scaling, "original_max_position_embeddings": 100}
    assert model_config_from_hf(outside).rope.original_max_position_embeddings == 100


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {"rope_type": "ntk-by-parts", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "proportional"}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
    ],
)
def test_an_unknown_rope_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="rope"):
        model_config_from_hf({**LLAMA, **fields})


def test_ending_ids_are_the_set_of_both_files() -> None:
    config = model_config_from_hf({**LLAMA, "eos_token_id": 2}, {"eos_token_id": [7, 2, 9]})
    assert config.ending_token_ids == {2, 7, 9}


@pytest.mark.parametrize(
    ("stated", "read"), [("bfloat16", "bfloat16"), ("torch.float16", "float16"), (None, "float32")]
)
def test_the_checkpoints_dtype(stated: str | None, read: str) -> None:
    assert model_config_from_hf({**LLAMA, "torch_dtype": stated}).dtype == read
    assert model_config_from_hf({**LLAMA, "dtype": stated}).dtype == read


@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "Phi3ForCausalLM"])
def test_a_window_is_of_every_layer_and_makes_sense(architecture: str) -> None:
    fields = {**LLAMA, "num_key_value_heads": 2, "architectures": [architecture], "sliding_window": 4096}
    config = model_config_from_hf(fields)
    assert (config.attention_kinds, config.layer_kinds) == ((4096,), ())
    assert model_config_from_hf({**fields, "sliding_window": None}).attention_kinds == (None,)
    for value in (0, -1, True, 2.5, "4096"):
        with pytest.raises(CheckpointError, match="sliding_window is"):
            model_config_from_hf({**fields, "sliding_window": value})


HEADS = {"num_key_value_heads": 2}
BASES: dict[str, dict[str, Any]] = {
    name: {**LLAMA, "architectures": [ARCHITECTURES[name].hf_class], "model_type": name, "head_dim": 16, **HEADS}
    for name in ("phi3", "glm4", "smollm3", "granite", "olmo2", "ernie4_5", "mistral")
}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("phi3", {"rope_scaling": {**LONGROPE, "short_factor": [1.0] * 7}}, "short_factor is .*: .* list of 8 numbers"),
        ("phi3", {"rope_scaling": {**LONGROPE, "long_factor": [0.0] * 8}}, "long_factor is .*: .* larger than 0"),
        ("phi3", {"rope_scaling": {**LONGROPE, "long_factor": None}}, "long_factor is None"),
        ("phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ("phi3", {"partial_rotary_factor": 0.03}, "partial_rotary_factor is 0.03"),
        ("glm4", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ("glm4", {"partial_rotary_factor": 0.3125}, "partial_rotary_factor is 0.3125.*an even part of the 16"),
        ("glm4", {"attention_bias": "yes"}, "attention_bias is 'yes'"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers is .*as long as num_hidden_layers, 2"),
        ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers is .*a list of 0 and 1"),
        ("smollm3", {"no_rope_layers": 1}, "no_rope_layers is 1"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        ("granite", {"attention_multiplier": 0}, "attention_multiplier is 0"),
        ("granite", {"logits_scaling": 0}, "logits_scaling is 0"),
        ("granite", {"residual_multiplier": "much"}, "residual_multiplier is 'much'"),
        ("ernie4_5", {"use_bias": 1}, "use_bias is 1"),
    ],
)
def test_an_own_field_that_makes_no_sense_is_named(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        model_config_from_hf({**BASES[name], **fields})


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("granite", {"partial_rotary_factor": 0.5}),
        ("olmo2", {"clip_qkv": 8.0}),
        ("mistral", {"no_rope_layer_interval": 4}),
        ("mistral", {"use_bias": True}),
        ("phi3", {"embedding_multiplier": 2.0}),
    ],
)
def test_what_another_architecture_implements_is_refused(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        model_config_from_hf({**BASES[name], "sliding_window": None, **fields})
    assert next(iter(fields)) in str(caught.value)


def test_older_names_of_longrope() -> None:
    for rope_type in ("su", "yarn", "longrope"):
        config = model_config_from_hf(
            {**BASES["phi3"], "rope_scaling": {**LONGROPE, "type": rope_type, "rope_type": None}}
        )
        assert (config.rope.rope_type, config.rope.original_max_position_embeddings) == ("longrope", 4096)

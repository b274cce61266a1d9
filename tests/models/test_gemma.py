"""How Gemma's configurations are read: kinds of layers, rotations, caps, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from transformers import Gemma2Config, Gemma3TextConfig

from cascade_llm.config import ModelConfig, RopeConfig
from cascade_llm.errors import CheckpointError, UnsupportedModelError
from cascade_llm.models.architectures import model_config_from_hf

TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
CONFIGS = {"Gemma2ForCausalLM": Gemma2Config, "Gemma3ForCausalLM": Gemma3TextConfig}


def read(hf_class: str, **fields: Any) -> ModelConfig:
    """From the fields alone, as a file of the hub has them."""
    return model_config_from_hf({"architectures": [hf_class], **TINY, **fields})


@pytest.mark.parametrize("hf_class", CONFIGS)
def test_what_is_left_out_is_what_transformers_takes(hf_class: str) -> None:
    sparse = read(hf_class)
    whole = model_config_from_hf({**CONFIGS[hf_class](**TINY).to_dict(), "architectures": [hf_class]})
    assert sparse == whole


def test_gemma2_s_layers_alternate_and_the_first_has_a_window() -> None:
    config = read("Gemma2ForCausalLM", sliding_window=5)
    assert config.attention_kinds == (None, 5)
    assert config.layer_kinds == (1, 0, 1, 0, 1, 0, 1)
    assert (config.attention_soft_cap, config.final_soft_cap, config.norm_offset) == (50.0, 30.0, 1.0)
    assert config.embedding_multiplier == math.sqrt(48)
    assert config.sm_scale == 256**-0.5
    assert config.layer_ropes == ()


def test_gemma3_s_sixth_layer_reads_all_and_the_others_have_a_theta_of_their_own() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    config = read("Gemma3ForCausalLM", sliding_window=5, rope_scaling=scaling, rope_local_base_freq=5000.0)
    assert config.layer_kinds == (1, 1, 1, 1, 1, 0, 1)
    local, everywhere = config.layer_ropes[0], config.layer_ropes[5]
    assert local == RopeConfig(theta=5000.0)
    assert everywhere == config.rope
    assert everywhere is not None
    assert (everywhere.theta, everywhere.rope_type, everywhere.factor) == (1e6, "linear", 8.0)
    assert (config.attention_soft_cap, config.final_soft_cap) == (None, None)
    assert config.own["head_norms"]


def test_rotations_by_type_of_layer_are_read_from_either_form() -> None:
    newer = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    }
    older = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 5000.0}
    assert read("Gemma3ForCausalLM", rope_parameters=newer) == read("Gemma3ForCausalLM", **older)


@pytest.mark.parametrize("hf_class", CONFIGS)
@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"sliding_window": 0}, CheckpointError, "sliding_window is 0"),
        ({"sliding_window": -4}, CheckpointError, "sliding_window is -4"),
        ({"layer_types": ["full_attention"] * 6}, CheckpointError, "layer_types .* a list of 7, as num_hidden_layers"),
        ({"layer_types": ["chunked_attention"] * 7}, CheckpointError, "layer_types .* other types are not implemented"),
        ({"query_pre_attn_scalar": 0}, CheckpointError, "query_pre_attn_scalar is 0"),
        ({"attn_logit_softcapping": -50.0}, CheckpointError, r"attn_logit_softcapping is -50\.0"),
        ({"final_logit_softcapping": "30"}, CheckpointError, "final_logit_softcapping is '30'"),
        ({"hidden_activation": "silu"}, UnsupportedModelError, "hidden_activation is 'silu'"),
        ({"use_bidirectional_attention": True}, UnsupportedModelError, "use_bidirectional_attention=True"),
    ],
)
def test_what_makes_no_sense_or_is_not_implemented_is_refused_by_name(
    hf_class: str, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read(hf_class, **fields)


def test_a_window_that_no_layer_has_is_not_read() -> None:
    config = read("Gemma3ForCausalLM", layer_types=["full_attention"] * 7, sliding_window=0)
    assert (config.attention_kinds, config.layer_kinds) == ((None,), ())


def test_a_cap_of_null_is_none() -> None:
    config = read("Gemma2ForCausalLM", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (config.attention_soft_cap, config.final_soft_cap) == (None, None)

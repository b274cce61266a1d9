from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from cascade_llm.config import ModelConfig
from cascade_llm.layers.rope import RotaryTables, Rotation, max_context_len, rope_frequencies, rotate_heads
from cascade_llm.models.architectures import model_config_from_hf

CPU = torch.device("cpu")
MAX_LEN = 256

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, no truncation": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "truncate": False,
        "beta_fast": 16,
        "beta_slow": 2,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    },
    "yarn, attention factor": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.25,
    },
    "yarn, defaults": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
}


def hf_config(scaling: dict[str, Any], head_dim: int = 64) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        intermediate_size=8,
        num_hidden_layers=1,
        vocab_size=16,
        max_position_embeddings=MAX_LEN,
        rope_parameters=dict(scaling),
        architectures=["LlamaForCausalLM"],
    )


def own_config(scaling: dict[str, Any], head_dim: int = 64) -> ModelConfig:
    return model_config_from_hf(hf_config(scaling, head_dim).to_dict())


def table_of(config: ModelConfig, max_positions: int) -> torch.Tensor:
    (table,) = RotaryTables(config, max_positions).tables
    return table


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_transformers(name: str, head_dim: int) -> None:
    theirs, config = hf_config(SCALINGS[name], head_dim), own_config(SCALINGS[name], head_dim)
    rope_type = SCALINGS[name]["rope_type"]
    compute = ROPE_INIT_FUNCTIONS.get(rope_type, LlamaRotaryEmbedding.compute_default_rope_parameters)
    for context_len in (None, 100, 5000):
        expected, expected_scale = compute(theirs, device=CPU, seq_len=context_len)
        got, scale = rope_frequencies(config.rope, head_dim, MAX_LEN, context_len)
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=0)
        assert scale == pytest.approx(expected_scale, rel=1e-12)


@pytest.mark.parametrize("name", SCALINGS)
def test_table_equals_transformers_at_every_position(name: str) -> None:
    theirs, table = LlamaRotaryEmbedding(hf_config(SCALINGS[name])), table_of(own_config(SCALINGS[name]), MAX_LEN)
    cos, sin = theirs(torch.zeros(1), torch.arange(MAX_LEN)[None])
    assert table.shape == (MAX_LEN, 64)
    torch.testing.assert_close(table[:, :32], cos[0, :, :32], rtol=0, atol=5e-5)
    torch.testing.assert_close(table[:, 32:], sin[0, :, :32], rtol=0, atol=5e-5)


def test_dynamic_table_beyond_the_original_length_is_that_of_decoding_token_by_token() -> None:
    theirs, table = (
        LlamaRotaryEmbedding(hf_config(SCALINGS["dynamic"])),
        table_of(own_config(SCALINGS["dynamic"]), 900),
    )
    plain = table_of(own_config(SCALINGS["default"]), 900)
    for position in (MAX_LEN - 1, MAX_LEN, MAX_LEN + 1, 700, 899):
        cos, sin = theirs(torch.zeros(1), torch.tensor([[position]]))
        torch.testing.assert_close(table[position], torch.cat((cos[0, 0, :32], sin[0, 0, :32])), rtol=0, atol=2e-4)
    torch.testing.assert_close(table[:MAX_LEN], plain[:MAX_LEN])
    assert not torch.allclose(table[700], plain[700], atol=0.1)


@pytest.mark.parametrize("name", ["default", "yarn, mscale"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rotation_equals_transformers(name: str, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    table = table_of(own_config(SCALINGS[name]), MAX_LEN)
    positions = torch.tensor([0, 5, 1, 255, 17])
    heads = torch.randn(5, 6, 64)
    cos, sin = LlamaRotaryEmbedding(hf_config(SCALINGS[name]))(heads, positions[None])
    expected, _ = apply_rotary_pos_emb(heads[None], heads[None], cos, sin, unsqueeze_dim=2)
    before = heads.to(dtype)
    got = rotate_heads(before, Rotation(table[positions]))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(before, heads.to(dtype))


def test_rotation_keeps_scores_a_function_of_the_distance() -> None:
    torch.manual_seed(0)
    table = table_of(own_config(SCALINGS["default"]), MAX_LEN)
    q, k = torch.randn(1, 1, 64), torch.randn(1, 1, 64)

    def score(query_position: int, key_position: int) -> float:
        rotated_q = rotate_heads(q, Rotation(table[[query_position]]))
        rotated_k = rotate_heads(k, Rotation(table[[key_position]]))
        return float((rotated_q * rotated_k).sum())

    assert score(9, 2) == pytest.approx(score(200, 193), abs=1e-3)


def phi3_config(factor: float) -> Phi3Config:
    """Heads of 64, of which a part is rotated."""
    count = int(64 * factor) // 2
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": factor}
    rope |= {"short_factor": [1 + 0.1 * i for i in range(count)], "long_factor": [2 + 0.3 * i for i in range(count)]}
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 8, "num_hidden_layers": 1}
    lengths = {"max_position_embeddings": MAX_LEN, "original_max_position_embeddings": 64}
    return Phi3Config(**sizes, **lengths, vocab_size=16, pad_token_id=None, rope_parameters=rope)


@pytest.mark.parametrize("factor", [1.0, 0.75])
@pytest.mark.parametrize("length", [64, 65, MAX_LEN])
def test_longrope_s_factors_are_chosen_by_the_longest_sequence(factor: float, length: int) -> None:
    theirs = phi3_config(factor)
    config = model_config_from_hf({**theirs.to_dict(), "architectures": ["Phi3ForCausalLM"]})
    cos, sin = Phi3RotaryEmbedding(theirs)(torch.zeros(1), torch.arange(length)[None])
    half = int(64 * factor) // 2
    expected = torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)
    torch.testing.assert_close(table_of(config, length), expected, rtol=0, atol=5e-5)
    assert max_context_len(config) == MAX_LEN


def test_longest_context_follows_the_scaling() -> None:
    assert max_context_len(own_config(SCALINGS["default"])) == MAX_LEN
    assert max_context_len(own_config(SCALINGS["llama3"])) == MAX_LEN
    assert max_context_len(own_config(SCALINGS["yarn, mscale"])) == 64 * 40
    assert max_context_len(own_config(SCALINGS["yarn"])) == MAX_LEN
    assert max_context_len(own_config(SCALINGS["dynamic"])) == 2 * MAX_LEN

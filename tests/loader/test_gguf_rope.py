"""What a GGUF file says of RoPE: scalings by keys of their own, and Llama 3's by divisors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cascade_llm.errors import UnsupportedModelError
from cascade_llm.loader.gguf_checkpoint import GGUFCheckpoint
from cascade_llm.models.architectures import model_config_from_hf
from tests.loader.gguf_files import write_gguf, write_model
from tests.models.checkpoints import tiny_model

SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "none": ({"rope.scaling.type": "none"}, None),
    "linear": ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "linear by 1": ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
    "linear, old key": ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    "yarn": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "yarn, all keys": (
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_beta_fast": 16.0,
            "rope.scaling.yarn_beta_slow": 2.0,
            "rope.scaling.yarn_attn_factor": 1.0,
        },
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 0.1 * np.log(4.0) + 1.0,
        },
    ),
}


@pytest.mark.parametrize("case", SCALINGS)
def test_rope_scaling(tmp_path: Path, case: str) -> None:
    changes, expected = SCALINGS[case]
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "tiny.gguf", tiny_model("llama"), changes))
    scaling = checkpoint.hf_config()["rope_scaling"]
    assert scaling == (pytest.approx(expected) if expected and "attention_factor" in expected else expected)


def llama3_divisors(factor: float, original_len: int) -> np.ndarray:
    """What a conversion writes: the unscaled frequencies over those of transformers."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": original_len}
    model = tiny_model("llama", head_dim=64, rope_parameters=rope, max_position_embeddings=131072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = 1.0 / 5e5 ** (torch.arange(0, 64, 2).float() / 64)
    return (plain / scaled).numpy()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_found_again_from_its_divisors(tmp_path: Path, factor: float) -> None:
    checkpoint = GGUFCheckpoint(rope_freqs_file(tmp_path, llama3_divisors(factor, 8192)))
    assert checkpoint.hf_config()["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert model_config_from_hf(checkpoint.hf_config()).rope.factor == factor
    assert all("rope" not in name for name, _ in checkpoint.tensors())


@pytest.mark.parametrize("divisors", [llama3_divisors(8.0, 2048), np.ones(16, np.float32)], ids=["other", "short"])
def test_other_divisors_are_refused(tmp_path: Path, divisors: np.ndarray) -> None:
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight"):
        GGUFCheckpoint(rope_freqs_file(tmp_path, divisors))


def rope_freqs_file(folder: Path, divisors: np.ndarray) -> Path:
    keys = {
        "context_length": 131072,
        "embedding_length": 64,
        "block_count": 1,
        "feed_forward_length": 64,
        "attention.head_count": 1,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 5e5,
    }
    tensors = {"token_embd.weight": np.zeros((8, 64), np.float32), "rope_freqs.weight": divisors.astype(np.float32)}
    return write_gguf(folder / "tiny.gguf", "llama", keys, tensors)

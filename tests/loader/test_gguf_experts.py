"""Bad GGUF files of mixtures of experts and of windows: each is refused by name before weights are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cascade_llm.errors import CheckpointError
from cascade_llm.loader.gguf_checkpoint import GGUFCheckpoint
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.models.decoder import Decoder
from cascade_llm.models.loading import check_shapes
from cascade_llm.weights.format import WeightOptions
from tests.loader.gguf_files import architecture_name, convert, metadata_of, write_gguf
from tests.models.checkpoints import tiny_model

Tensors = dict[str, np.ndarray]
WITH_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
UP = "blk.1.ffn_up_exps.weight"


def check(folder: Path, architecture: str, tensors: Callable[[Tensors], Tensors], **keys: Any) -> None:
    """What a start does before it reads weights."""
    model = tiny_model(architecture)
    whole = {**metadata_of(model), **{name.replace("__", "."): value for name, value in keys.items()}}
    path = write_gguf(folder / "tiny.gguf", architecture_name(model), whole, tensors(convert(model)))
    checkpoint = GGUFCheckpoint(path)
    weights = WeightOptions(dtype=torch.float32, device=torch.device("cpu"))
    decoder = Decoder(model_config_from_hf(checkpoint.hf_config()), weights)
    check_shapes(decoder, checkpoint.shapes(), checkpoint.stored_name)


def as_it_is(tensors: Tensors) -> Tensors:
    return tensors


@pytest.mark.parametrize("architecture", WITH_EXPERTS)
def test_a_whole_file_is_taken(tmp_path: Path, architecture: str) -> None:
    check(tmp_path, architecture, as_it_is)


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: values for key, values in tensors.items() if key != name}


def cut(name: str) -> Callable[[Tensors], Tensors]:
    """Without the last expert's part of one tensor."""
    return lambda tensors: {**tensors, name: tensors[name][:-1]}


@pytest.mark.parametrize("architecture", WITH_EXPERTS)
@pytest.mark.parametrize(
    ("tensors", "keys", "message"),
    [
        (without(UP), {}, r"  blk\.1\.ffn_up_exps\.weight is missing"),
        (cut(UP), {}, r"blk\.1\.ffn_up_exps\.weight lacks its part \S+\.experts\.4\.up_proj\.weight"),
        (as_it_is, {"expert_count": 6}, r"blk\.0\.ffn_up_exps\.weight lacks its part \S+experts\.5\.up_proj\.weight"),
        (
            as_it_is,
            {"expert_count": 4},
            r"ffn_\w+_exps\.weight, its part \S+experts\.4\.\S+, is not a tensor of",
        ),
        (
            cut("blk.1.ffn_gate_inp.weight"),
            {},
            r"  blk\.1\.ffn_gate_inp\.weight has shape \[4, 48\], .* \[5, 48\]",
        ),
        (without("blk.1.ffn_gate_inp.weight"), {}, r"  blk\.1\.ffn_gate_inp\.weight is missing"),
        (as_it_is, {"expert_used_count": 6}, "num_experts_per_tok is 6"),
        (as_it_is, {"block_count": 4}, r"block_count is 4, its tensors are of 3 blocks"),
    ],
    ids=["no up", "an expert less", "one too few", "one too many", "router", "no router", "chosen", "blocks"],
)
def test_what_is_missing_or_of_another_shape_is_named(
    tmp_path: Path, architecture: str, tensors: Callable[[Tensors], Tensors], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        check(tmp_path, architecture, tensors, **keys)


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        ("gpt_oss", {"attention__sliding_window": 0}, r"attention\.sliding_window is 0, it must be an integer from 1"),
        ("gemma2", {"attention__sliding_window": 0}, r"attention\.sliding_window is 0, it must be an integer from 1"),
        ("gemma2", {"attention__sliding_window_pattern": 0}, r"attention\.sliding_window_pattern is 0"),
        ("gemma2", {"attention__sliding_window_pattern": [True]}, "a list of 3, as num_hidden_layers says"),
        ("gpt_oss", {"attention__sliding_window_pattern": [True] * 4}, "a list of 3, as num_hidden_layers says"),
    ],
)
def test_a_window_or_a_list_of_them_that_makes_no_sense_is_named(
    tmp_path: Path, architecture: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        check(tmp_path, architecture, as_it_is, **keys)

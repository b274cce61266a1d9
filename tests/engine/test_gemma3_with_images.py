"""Gemma 3 from 4B on: the language model of a checkpoint that has one of images beside it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from cascade_llm import SamplingParams
from cascade_llm.errors import CheckpointError
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.models.families.gemma import GEMMA3
from tests.engine.test_families import assert_as_transformers
from tests.engine.tiny_llm import CONTEXT, random_forest, tiny_llm
from tests.models.checkpoints import TINY
from tests.models.families import FAMILIES

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)


def save_model(folder: Path) -> Gemma3ForConditionalGeneration:
    """With random weights."""
    text = {**TINY, **FAMILIES["gemma3_text"].fields, "max_position_embeddings": CONTEXT}
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, eos_token_id=[2, 7])
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(-0.5, 0.5) if "norm" in name else parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


def test_its_text_is_served_as_transformers_reads_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, prompts = save_model(tmp_path), random_forest(1, 3, TINY["vocab_size"], 20)
    with caplog.at_level(logging.WARNING, "cascade_llm"), tiny_llm(tmp_path) as llm:
        outputs = llm.generate(prompts, GREEDY)
        assert llm.facts.model.architecture == "gemma3_text"
        assert llm.facts.model.ending_token_ids == {2, 7}
    assert_as_transformers(model, prompts, outputs)
    assert "tensors of parts beside the language model are left out: text alone is read" in caplog.text


@pytest.mark.parametrize(
    ("stored", "own"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("vision_tower.vision_model.head.weight", None),
        ("model.multi_modal_projector.mm_input_projection_weight", None),
    ],
)
def test_names_of_older_files_and_newer(stored: str, own: str | None) -> None:
    assert GEMMA3.tensor_name(stored) == own


def test_sizes_that_config_json_leaves_out_are_transformers_own(tmp_path: Path) -> None:
    """As the files of Gemma 3 4B do."""
    fields = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    scaling = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    bare = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {**fields, **scaling}}
    whole = json.loads(Gemma3Config(text_config={**fields, **scaling}).to_json_string(use_diff=False))
    whole["architectures"] = bare["architectures"]
    assert model_config_from_hf({**bare, "eos_token_id": 1}) == model_config_from_hf({**whole, "eos_token_id": 1})
    with pytest.raises(CheckpointError, match="lacks text_config: Gemma3ForConditionalGeneration has its model there"):
        model_config_from_hf({"architectures": bare["architectures"]})

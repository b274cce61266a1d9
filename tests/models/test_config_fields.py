"""Every field that transformers' configuration of a family has is read, refused, or known to change no logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from cascade_llm.errors import CascadeError
from cascade_llm.models.architectures import ARCHITECTURES, model_config_from_hf
from tests.models.checkpoints import TINY, hf_config_of, tiny_model
from tests.models.families import FAMILIES

WITHOUT_EFFECT: Mapping[str, Any] = {
    "attention_dropout": 0.5,
    "embd_pdrop": 0.5,
    "resid_pdrop": 0.5,
    "router_jitter_noise": 0.5,
    "router_aux_loss_coef": 0.5,
    "output_router_logits": True,
    "pretraining_tp": 2,
    "initializer_range": 0.5,
    "chunk_size_feed_forward": 2,
    "use_cache": False,
    "return_dict": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "bos_token_id": 3,
    "pad_token_id": 4,
    "problem_type": "regression",
}
"""Fields of training, of transformers' own answers, and of its tokenizers: with another value than the usual one."""
NAMES = frozenset({"_name_or_path", "id2label", "label2id", "model_type", "transformers_version"})
"""Fields that say what a checkpoint is called, or count labels; the class decides which architecture it is."""
DERIVED = {"layer_types", "no_rope_layers"}
"""Lists that transformers writes of other fields, and that decide where they are there."""
SUPERSEDED = frozenset({"_sliding_window_pattern"})
"""Of which transformers always writes such a list."""


def configurations(architecture: str) -> Iterator[dict[str, Any]]:
    """Of each variant of a family what config.json would hold; and the same without what it derives."""
    family = FAMILIES[architecture]
    for changes in ({}, *family.variants.values()):
        config = family.config_class(**{**TINY, **family.fields, **changes})
        whole = {**config.to_dict(), "architectures": [ARCHITECTURES[architecture].hf_class]}
        yield whole
        if DERIVED & whole.keys():
            yield {name: value for name, value in whole.items() if name not in DERIVED}


def other_values(value: object) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value * 2 + 1, value + 0.5, -1]
    if isinstance(value, str):
        return ["odd"]
    if isinstance(value, list | tuple):
        return [[], ["odd"], value[::-1]]
    return [{"rope_type": "odd"}] if isinstance(value, dict) else [7, True, 0.5, "odd", {"a": 1}, ["a"]]


def outcome(fields: Mapping[str, Any]) -> object:
    """What is read, or the error's words."""
    try:
        return model_config_from_hf(fields)
    except CascadeError as error:
        return str(error)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_field_is_read_or_refused_or_has_no_effect(architecture: str) -> None:
    known = list(configurations(architecture))
    outcomes = [outcome(fields) for fields in known]
    changed = {
        name
        for fields, before in zip(known, outcomes, strict=True)
        for name, value in fields.items()
        if any(outcome({**fields, name: other}) != before for other in other_values(value))
    }
    unread = set().union(*known) - changed
    assert unread <= WITHOUT_EFFECT.keys() | NAMES | SUPERSEDED
    assert not changed & (WITHOUT_EFFECT.keys() | NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_is_not_read_changes_no_logits_of_transformers(architecture: str) -> None:
    model, token_ids = tiny_model(architecture), torch.arange(1, 40)[None]
    with torch.inference_mode():
        expected = model(token_ids).logits
        for name, value in WITHOUT_EFFECT.items():
            if name not in hf_config_of(model):
                continue
            other = tiny_model(architecture, **{name: value})
            other.load_state_dict(model.state_dict())
            assert torch.equal(other(token_ids, use_cache=False).logits, expected), name

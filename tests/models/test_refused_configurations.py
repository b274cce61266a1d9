"""What every architecture refuses by name: windows of no tokens, lists of layers that fit no count, unknown kinds."""

from __future__ import annotations

from typing import Any

import pytest

from cascade_llm.errors import CheckpointError, UnsupportedModelError
from cascade_llm.models.architectures import ARCHITECTURES, model_config_from_hf
from cascade_llm.models.layer_types import FULL, SLIDING
from tests.models.checkpoints import TINY
from tests.models.families import FAMILIES

WINDOWED = [name for name, architecture in ARCHITECTURES.items() if "sliding_window" in architecture.implements]


def config_json(architecture: str, **changes: Any) -> dict[str, Any]:
    family = FAMILIES[architecture]
    fields = family.config_class(**{**TINY, **family.fields}).to_dict()
    return {**fields, "architectures": [ARCHITECTURES[architecture].hf_class], **changes}


@pytest.mark.parametrize("window_len", [0, -1])
@pytest.mark.parametrize("architecture", WINDOWED)
def test_a_window_of_no_tokens_is_named(architecture: str, window_len: int) -> None:
    reads, num_layers = ARCHITECTURES[architecture].implements, config_json(architecture)["num_hidden_layers"]
    switch = {"use_sliding_window": True} if "use_sliding_window" in reads else {}
    kinds = {"layer_types": [SLIDING] * num_layers} if "layer_types" in reads else {}
    with pytest.raises(CheckpointError, match=f"sliding_window is {window_len}: it must be an integer, 1 or larger"):
        model_config_from_hf(config_json(architecture, sliding_window=window_len, **switch, **kinds))


@pytest.mark.parametrize("difference", [-1, 1])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_list_of_layers_is_as_long_as_their_count(architecture: str, difference: int) -> None:
    num_layers = config_json(architecture)["num_hidden_layers"]
    types = [FULL] * (num_layers + difference)
    with pytest.raises(CheckpointError, match=f"layer_types is .* a list of {num_layers}, as num_hidden_layers says"):
        model_config_from_hf(config_json(architecture, layer_types=types))


@pytest.mark.parametrize("kind", ["linear_attention", "chunked_attention", "mamba"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_kind_of_layer_that_is_not_known_is_named(architecture: str, kind: str) -> None:
    types = [kind] * config_json(architecture)["num_hidden_layers"]
    with pytest.raises((CheckpointError, UnsupportedModelError), match=f"layer_types .*{kind}"):
        model_config_from_hf(config_json(architecture, layer_types=types))

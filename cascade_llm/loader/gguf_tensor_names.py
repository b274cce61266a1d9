"""What GGUF and Hugging Face call the same tensor of a model."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from pathlib import Path

from cascade_llm.errors import UnsupportedModelError
from cascade_llm.loader.gguf_architectures import EXPERT_PARTS, GGUFArchitecture

__all__ = ["gguf_name_of", "hf_name_of", "names_of_experts"]

MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

TENSOR_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")
HF_NAME = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<part>.+)")
EXPERT_NAME = re.compile(r"mlp\.experts\.\d+\.(?P<part>\w+)\.(?P<kind>weight|bias)")


def names_of_experts(hf_name: str, num_experts: int, parts: tuple[str, ...]) -> Iterator[str]:
    """What a tensor of all experts is cut into, in its order."""
    experts, kind = hf_name.rsplit(".", 1)
    return (f"{experts}.{expert}.{part}.{kind}" for expert in range(num_experts) for part in parts)


def hf_name_of(path: Path, name: str, architecture: GGUFArchitecture) -> str:
    """Of a tensor that holds all experts, what their names begin with, and its kind."""
    layer_names = architecture.layer_names
    match = TENSOR_NAME.fullmatch(name)
    layer, part, kind = match.group("layer", "part", "kind") if match else (None, "", "")
    if layer is None and part in MODEL_NAMES:
        return f"{MODEL_NAMES[part]}.{kind}"
    if layer is not None and f"{part}.{kind}" in layer_names:
        return f"model.layers.{layer}.{layer_names[f'{part}.{kind}']}"
    if layer is not None and part in layer_names:
        return f"model.layers.{layer}.{layer_names[part]}.{kind}"
    raise UnsupportedModelError(
        f"{path}: tensor {name} belongs to no part of the implemented architectures, so its model would be computed "
        "wrongly without it"
    )


def gguf_name_of(hf_name: str, architecture: GGUFArchitecture, present: Container[str]) -> str:
    """The reverse, and of a part of an expert the tensor of all experts; the name itself where GGUF has none for it.

    `present`: the tensors of the file, of which one may hold two parts.
    """
    match = HF_NAME.fullmatch(hf_name)
    if match is None:
        owner, _, kind = hf_name.rpartition(".")
        return next((f"{name}.{kind}" for name, theirs in MODEL_NAMES.items() if theirs == owner), hf_name)
    own = _gguf_parts(match["part"], architecture)
    names = [f"blk.{match['layer']}.{part}" for part in own]
    return next((name for name in names if name in present), names[0] if names else hf_name)


def _gguf_parts(part: str, architecture: GGUFArchitecture) -> list[str]:
    """What may hold a part of a layer, with its kind; the architecture's own names come first."""
    if (expert := EXPERT_NAME.fullmatch(part)) and architecture.has_experts:
        return [f"{name}.{expert['kind']}" for name, parts in EXPERT_PARTS.items() if expert["part"] in parts]
    owner, _, kind = part.rpartition(".")
    named = [
        name if theirs == part else f"{name}.{kind}"
        for name, theirs in architecture.layer_names.items()
        if theirs in (part, owner)
    ]
    return named[::-1]

"""The same checkpoint in transformers: the one door through which validation sees it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cascade_llm.errors import UnsupportedModelError
from cascade_llm.loader.checkpoint import Checkpoint

__all__ = ["TransformersModel"]

TIED_HEAD = "lm_head.weight"
EXPERT = re.compile(r"(?P<block>.*\.experts)\.(?P<index>\d+)\.(?P<part>gate|up|down)_proj\.(?P<kind>weight|bias)")
INPUTS_FIRST = ("gpt_oss",)
"""Types of models whose experts' matrices have their inputs first, and outputs of gate and up in turns."""


class TransformersModel:
    """transformers' own implementation, filled with the tensors that ours is filled with."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        """Raises `UnsupportedModelError` where transformers does not know the model or its tensors."""
        fields = checkpoint.hf_config()
        fields.pop("quantization_config", None)  # the values are given, not the codes
        try:
            config = AutoConfig.for_model(**{**fields, "model_type": fields.get("model_type")})
            self._model, missing = _loaded(config, dict(checkpoint.tensors()), dtype)
        except (ValueError, KeyError, RuntimeError, AttributeError) as error:
            raise UnsupportedModelError(f"transformers cannot build {checkpoint.name}: {error}") from error
        if missing:
            raise UnsupportedModelError(f"transformers wants {missing[0]}, which {checkpoint.name} does not have")
        self._model.eval().to(device)
        self._device = device

    @torch.inference_mode()
    def logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of what follows each token: [tokens, vocab], float32, on the CPU."""
        logits = self._model(torch.tensor([list(token_ids)], device=self._device), use_cache=False).logits[0]
        return logits.float().log_softmax(-1).cpu()  # type: ignore[no-any-return]


def _loaded(config: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[Any, list[str]]:
    """A model with these tensors, and the names of those that it lacks."""
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config))
    stacked = _stacked(tensors, in_turns=config.model_type in INPUTS_FIRST)
    model, found = model_class.from_pretrained(
        None, config=config, state_dict=stacked, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    is_tied = config.get_text_config().tie_word_embeddings
    missing = [name for name in model.state_dict() if name in found["missing_keys"]]
    return model, [name for name in missing if not (name == TIED_HEAD and is_tied)]


def _stacked(tensors: dict[str, torch.Tensor], *, in_turns: bool) -> dict[str, torch.Tensor]:
    """Matrices and biases of all experts of a layer in one tensor, gate and up together, as transformers' models do.

    Args:
        tensors: as a checkpoint gives them
        in_turns: whether outputs of gate and up alternate, and matrices have their inputs first
    """
    whole: dict[str, torch.Tensor] = {}
    experts: dict[tuple[str, str], dict[int, dict[str, torch.Tensor]]] = {}
    for name, values in tensors.items():
        match = EXPERT.fullmatch(name)
        if match is None:
            whole[name] = values
        else:
            block = experts.setdefault((match["block"], match["kind"]), {})
            block.setdefault(int(match["index"]), {})[match["part"]] = values
    for (block_name, kind), parts in experts.items():
        ordered = [parts[index] for index in sorted(parts)]
        suffix, is_turned = "" if kind == "weight" else "_bias", in_turns and kind == "weight"
        for part, names in (("gate_up", ("gate", "up")), ("down", ("down",))):
            stack = torch.stack([_joined([own[name] for name in names], in_turns) for own in ordered])
            whole[f"{block_name}.{part}_proj{suffix}"] = stack.transpose(1, 2).contiguous() if is_turned else stack
    return whole


def _joined(parts: list[torch.Tensor], in_turns: bool) -> torch.Tensor:
    return torch.stack(parts, dim=1).flatten(0, 1) if in_turns else torch.cat(parts)

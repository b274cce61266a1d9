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
EXPERT = re.compile(r"(?P<block>.*\.experts)\.(?P<index>\d+)\.(?P<part>gate|up|down)_proj\.weight")


class TransformersModel:
    """transformers' own implementation, filled with the tensors that ours is filled with."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        """Raises `UnsupportedModelError` where transformers does not know the model or its tensors."""
        fields = checkpoint.hf_config()
        try:
            config = AutoConfig.for_model(**{**fields, "model_type": fields.get("model_type")})
            self._model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
            found = self._model.load_state_dict(_stacked(dict(checkpoint.tensors())), strict=False)
        except (ValueError, KeyError, RuntimeError, AttributeError) as error:
            raise UnsupportedModelError(f"transformers cannot build {checkpoint.name}: {error}") from error
        missing = [name for name in found.missing_keys if not (name == TIED_HEAD and config.tie_word_embeddings)]
        if missing:
            raise UnsupportedModelError(f"transformers wants {missing[0]}, which {checkpoint.name} does not have")
        self._model.tie_weights()
        self._model.eval().to(device)
        self._device = device

    @torch.inference_mode()
    def logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of what follows each token: [tokens, vocab], float32, on the CPU."""
        logits = self._model(torch.tensor([list(token_ids)], device=self._device), use_cache=False).logits[0]
        return logits.float().log_softmax(-1).cpu()  # type: ignore[no-any-return]


def _stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by the names within transformers' models: matrices of experts lie in one tensor, gate and up together."""
    whole: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, values in tensors.items():
        match = EXPERT.fullmatch(name)
        if match is None:
            whole[name] = values
        else:
            experts.setdefault(match["block"], {}).setdefault(int(match["index"]), {})[match["part"]] = values
    for block, parts in experts.items():
        ordered = [parts[index] for index in sorted(parts)]
        whole[f"{block}.gate_up_proj"] = torch.stack([torch.cat((own["gate"], own["up"])) for own in ordered])
        whole[f"{block}.down_proj"] = torch.stack([own["down"] for own in ordered])
    return whole

"""Tiny random checkpoints of transformers, and attention over dense K/V: what the decoder is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from cascade_llm.config import ModelConfig
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.models.decoder import Decoder
from cascade_llm.models.loading import load_weights
from cascade_llm.weights.format import StoredTensor, WeightOptions
from tests.models.families import FAMILIES

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def tiny_model(architecture: str, **changes: Any) -> PreTrainedModel:
    """A random float32 model whose every parameter matters: biases and norms are not left at 0 and 1."""
    family = FAMILIES[architecture]
    torch.manual_seed(0)
    model = family.model_class(family.config_class(**{**TINY, **family.fields, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5).sub_(family.norm_offset)
            else:
                parameter.normal_(std=0.3)
    return model


def hf_config_of(model: PreTrainedModel) -> dict[str, Any]:
    """What config.json would hold."""
    return {**model.config.to_dict(), "architectures": [type(model).__name__]}


def empty_decoder(model: PreTrainedModel, dtype: torch.dtype = torch.float32, **options: Any) -> Decoder:
    """Ours of the same configuration, without values."""
    weights = WeightOptions(dtype=dtype, device=torch.device("cpu"))
    return Decoder(model_config_from_hf(hf_config_of(model)), weights, **options)


def stored(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, StoredTensor]]:
    """Tensors as a checkpoint gives them."""
    return ((name, StoredTensor.plain(values)) for name, values in tensors.items())


def decoder_of(model: PreTrainedModel, **options: Any) -> Decoder:
    """The same model as ours, through its configuration and its state dict."""
    decoder = empty_decoder(model, **options)
    load_weights(decoder, stored(model.state_dict()))
    return decoder


class DenseAttention:
    """Causal attention of one step over contiguous K/V; rows of many sequences may be mixed in any order."""

    def __init__(self, config: ModelConfig) -> None:
        self._store: list[dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]] = []
        self._store += [{} for _ in range(config.num_layers)]
        self._sm_scale, self._soft_cap = config.sm_scale, config.attention_soft_cap
        self._windows = [config.attention_kinds[kind] for kind in config.layer_kinds or [0] * config.num_layers]
        self._rows: list[tuple[int, int]] = []

    def start_step(self, sequences: list[int], positions: list[int]) -> None:
        """Say which sequence and position each row of the coming step has."""
        self._rows = list(zip(sequences, positions, strict=True))

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        store, group_size = self._store[layer], q.shape[1] // k.shape[1]
        for row, key in enumerate(self._rows):
            store[key] = k[row].clone(), v[row].clone()
        out = torch.empty_like(q)
        for row, (sequence, position) in enumerate(self._rows):
            first = max(0, position + 1 - (self._windows[layer] or position + 1))
            keys, values = zip(*(store[sequence, earlier] for earlier in range(first, position + 1)), strict=True)
            keys, values = (torch.stack(part).repeat_interleave(group_size, dim=1) for part in (keys, values))
            scores = torch.einsum("hd,thd->ht", q[row], keys) * self._sm_scale
            if self._soft_cap is not None:
                scores = (scores / self._soft_cap).tanh() * self._soft_cap
            if sinks is not None:
                scores = torch.cat((scores, sinks[:, None]), dim=-1)
                values = torch.cat((values, torch.zeros_like(values[:1])))
            out[row] = torch.einsum("ht,thd->hd", scores.softmax(-1).to(values.dtype), values)
        return out


class Replay:
    """Runs token ids of several sequences through a decoder, in steps of any shape."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.attention = DenseAttention(decoder.config)

    @torch.inference_mode()
    def step(self, rows: list[tuple[int, int, int]]) -> torch.Tensor:
        """Logits [rows, vocab_size] of rows given as (sequence, position, token id)."""
        sequences, positions, token_ids = (list(column) for column in zip(*rows, strict=True))
        self.attention.start_step(sequences, positions)
        hidden = self.decoder.forward(torch.tensor(token_ids), torch.tensor(positions), self.attention)
        return self.decoder.logits(hidden)

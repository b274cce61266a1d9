"""A decoder-only transformer: an embedding, layers composed of blocks, a head.

Nothing here knows of sequences: rows are a flat list of query tokens, `positions` say where each stands, and
`attention` alone knows which of them belong together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from cascade_llm.attention.backend import Attention
from cascade_llm.config import ModelConfig
from cascade_llm.device.ranks import Ranks
from cascade_llm.errors import ConfigError
from cascade_llm.layers.fused_ops import FusedOps
from cascade_llm.layers.native_ops import select_fused_ops
from cascade_llm.layers.native_routing import select_router
from cascade_llm.layers.rope import RotaryTables
from cascade_llm.models.architectures import ARCHITECTURES
from cascade_llm.models.blocks import BlockOptions, Parameter, below, linear_parameters, norm_parameter
from cascade_llm.models.vocabulary import VocabularyShares
from cascade_llm.weights.format import StoredTensor, WeightOptions
from cascade_llm.weights.linear import Embedding, Linear
from cascade_llm.weights.stacked_linear import StackedLinear

__all__ = ["Decoder", "FirstNonFinite", "Observer", "head_options"]

Observer = Callable[[str, torch.Tensor], None]
"""Shown the name and the output of each stage of a forward pass, in order."""


HEAD_QUANTIZATION = "q8_0"
"""Of embedding and head, whatever the layers' is: in int4 the head cost SmolLM2 0.045 nats a token, all layers together
0.001."""
GPU_QUANTIZATIONS = ("q4_k", "int4", "fp8")
"""What has a kernel there."""


def head_options(weights: WeightOptions) -> WeightOptions:
    """Of embedding and head. On a GPU, which has no kernel for 8 bits, they are not rounded."""
    if weights.quantization is None:
        return weights
    return replace(weights, quantization=HEAD_QUANTIZATION if weights.arch is None else None)


class Decoder:
    """A decoder-only transformer without state: K and V live behind `attention`.

    Parameters have no values until `models.loading` fills them. Runs under the caller's `torch.inference_mode()`.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightOptions,
        *,
        max_positions: int | None = None,
        ops: FusedOps | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Allocate the parameters.

        Args:
            config: the model
            weights: their dtype and device, and what decides the formats of the matrices
            max_positions: the longest sequence, for the RoPE tables; default `config.max_position_embeddings`
            ops: the elementwise operations; default the fastest that works on this device
            ranks: that share the model, of which this holds one's part; default one rank holds all

        Raises:
            ConfigError: a quantization is asked for that has no kernel on the device
        """
        is_on_cpu = weights.device.type == "cpu" and not weights.on_stream
        if not is_on_cpu and weights.quantization not in (None, *GPU_QUANTIZATIONS):
            raise ConfigError(
                f"quantization={weights.quantization!r} has no kernel on a GPU: take {', '.join(GPU_QUANTIZATIONS)}, "
                "set device='cpu', or leave it out"
            )
        self.config, self.dtype, self.device = config, weights.dtype, weights.device
        self._ranks = ranks or Ranks()
        self.ops = ops or select_fused_ops(weights.dtype, weights.device)
        options = BlockOptions(
            config,
            weights,
            self.ops,
            select_router(weights.dtype, weights.device, on_stream=weights.on_stream),
            self._ranks,
        )
        make_layer = ARCHITECTURES[config.architecture].layer
        self.layers = [make_layer(options, index) for index in range(config.num_layers)]
        of_head = head_options(weights)
        hidden, vocab_size = config.hidden_size, config.vocab_size
        self._vocabulary = VocabularyShares(vocab_size, self._ranks)
        self.embedding = Embedding(self._vocabulary.matrix("embedding", "embed_tokens", hidden, of_head), self._ranks)
        # a number of the model's dtype: Gemma's square root is rounded so, other models' numbers need it not
        self._embedding_multiplier = torch.tensor(config.embedding_multiplier, dtype=weights.dtype).item()
        self.final_norm = options.norm(hidden)
        tied_to = self.embedding if config.tie_word_embeddings else None
        self.lm_head = Linear(self._vocabulary.matrix("head", "lm_head", hidden, of_head), tied_to=tied_to)
        self.rotary = RotaryTables(config, max_positions or config.max_position_embeddings, weights.device)

    @property
    def linears(self) -> tuple[Linear | StackedLinear, ...]:
        """Every linear layer, the head last."""
        return *(linear for layer in self.layers for linear in layer.linears), self.lm_head

    @property
    def reason_against_capture(self) -> str | None:
        """Why CUDA graphs cannot hold a forward pass; None where they can."""
        stacks = (linear.matrix for linear in self.linears if isinstance(linear, StackedLinear))
        return next((stack.reason_against_capture for stack in stacks if stack.reason_against_capture), None)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """The name of every tensor of a checkpoint, and where it goes."""
        shape = self.config.vocab_size, self.config.hidden_size
        yield "model.embed_tokens.weight", Parameter(shape, self._load_embedding)
        yield "model.norm.weight", norm_parameter(self.final_norm)
        for layer in self.layers:
            yield from below(f"model.layers.{layer.index}", layer.named_parameters())
        if not self.config.tie_word_embeddings:
            yield from linear_parameters(self.lm_head)

    def _load_embedding(self, stored: StoredTensor) -> None:
        """Also the head's, where it is tied.

        A dense embedding serves the lookup alone where the head's format is another: the head has then a copy of its
        own, one more matrix of vocabulary x hidden, for the largest product of a decode step.
        """
        self.embedding.load(stored)
        self.lm_head.tie()

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The residual stream [rows, hidden] before the first layer, of int64 `token_ids` [rows]."""
        rows, multiplier = self.embedding(token_ids), self._embedding_multiplier
        return rows if multiplier == 1 else rows.mul_(multiplier)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: Attention,
        observer: Observer | None = None,
    ) -> torch.Tensor:
        """Hidden states [rows, hidden] after the final norm.

        Args:
            token_ids: [rows] int64
            positions: [rows] int64, position of each token in its own sequence
            attention: writes and attends K/V of this step's rows
            observer: is shown the output of every stage
        """
        residual = self.embed(token_ids)
        rotations = self.rotary.by_layer(self.rotary.rows_at(positions))
        if observer is not None:
            observer("embedding", residual)
        delta: torch.Tensor | None = None
        for layer, rotation in zip(self.layers, rotations, strict=True):
            delta = layer(residual, delta, rotation, attention)
            if observer is not None:
                observer(f"layer {layer.index}", residual + delta)
        assert delta is not None, "a model has at least one layer"
        hidden = self.ops.add_rms_norm(residual, delta, self.final_norm)
        if observer is not None:
            observer("final norm", hidden)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, vocab_size], the model's dtype; for the sampled rows only.

        Every rank has to call it; on others than rank 0 the result is [n, this rank's part of the vocabulary].
        """
        return self._scaled(self._vocabulary.gathered(self.lm_head(hidden)))

    def write_logits(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """`logits` into memory that is there, [n, vocab_size]: a copy of them would be read and written once more."""
        if self._ranks.count == 1:
            self._scaled(self.lm_head(hidden, out))
        else:
            self._scaled(self._vocabulary.gathered(self.lm_head(hidden), out))

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        if self.config.logits_divisor != 1:
            logits.div_(self.config.logits_divisor)
        soft_cap = self.config.final_soft_cap
        return logits if soft_cap is None else logits.div_(soft_cap).tanh_().mul_(soft_cap)


class FirstNonFinite:
    """An observer of `Decoder.forward` that keeps the first stage whose output is not finite.

    Reads every output back to the host: for debugging only. One object serves one forward pass.
    """

    def __init__(self) -> None:
        self.stage: str | None = None
        """"embedding", "layer 3", "final norm", ...; None while all is finite."""
        self.rows: tuple[int, ...] = ()
        """The rows of that output that are not finite."""

    def __call__(self, stage: str, output: torch.Tensor) -> None:
        """Look at one stage's output, [rows, ...]."""
        if self.stage is not None:
            return
        broken = ~torch.isfinite(output).flatten(1).all(dim=1)
        if bool(broken.any()):
            self.stage = stage
            self.rows = tuple(int(row) for row in broken.nonzero().flatten())

"""One decoder for every supported architecture: what differs between them is a field of `ModelConfig`.

Nothing here knows of sequences: rows are a flat list of query tokens, `positions` say where each stands, and
`attention` alone knows which of them belong together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from cascade_llm.attention.backend import Attention
from cascade_llm.config import ModelConfig
from cascade_llm.layers.activation import silu_and_mul
from cascade_llm.layers.linear import Linear
from cascade_llm.layers.rmsnorm import RMSNorm
from cascade_llm.layers.rope import RotaryEmbedding, Rotation

__all__ = ["Decoder", "DecoderLayer", "Observer"]

Observer = Callable[[str, torch.Tensor], None]
"""Shown the name and the output of each stage of a forward pass, in order; see `models.finite_check`."""


class DecoderLayer:
    """Pre-norm attention and gated feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.index = index
        self._head_counts = (config.num_qo_heads, config.num_kv_heads, config.num_kv_heads)
        self._head_dim = config.head_dim
        hidden, eps = config.hidden_size, config.rms_norm_eps
        q_size, num_heads = config.num_qo_heads * config.head_dim, sum(self._head_counts)

        def linear(inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(inputs, outputs, bias=bias, dtype=dtype, device=device)

        def norm(size: int) -> RMSNorm:
            return RMSNorm(size, eps, dtype=dtype, device=device)

        self.input_norm = norm(hidden)
        self.qkv = linear(hidden, num_heads * config.head_dim, config.qkv_bias)
        self.qk_norms = (norm(config.head_dim), norm(config.head_dim)) if config.qk_norm else None
        self.attention_out = linear(q_size, hidden, config.attention_out_bias)
        self.feed_forward_norm = norm(hidden)
        self.gate_up = linear(hidden, 2 * config.intermediate_size, config.mlp_bias)
        self.down = linear(config.intermediate_size, hidden, config.mlp_bias)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The four products, in the order they run."""
        return self.qkv, self.attention_out, self.gate_up, self.down

    def __call__(self, hidden: torch.Tensor, rotation: Rotation, attention: Attention) -> torch.Tensor:
        """Add this layer's two parts to `hidden` [rows, hidden], in place; returns it."""
        q, k, v = self._heads(self.input_norm(hidden), rotation)
        hidden += self.attention_out(attention(self.index, q, k, v).flatten(1))
        hidden += self.down(silu_and_mul(self.gate_up(self.feed_forward_norm(hidden))))
        return hidden

    def _heads(self, x: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k (rotated) and v, each [rows, heads, head_dim]; q and k are views of one tensor."""
        num_q, num_k, num_v = self._head_counts
        heads = self.qkv(x).view(x.shape[0], -1, self._head_dim)
        qk, v = heads.split_with_sizes((num_q + num_k, num_v), dim=1)
        if self.qk_norms is not None:
            q_norm, k_norm = self.qk_norms
            qk = torch.cat((q_norm(qk[:, :num_q]), k_norm(qk[:, num_q:])), dim=1)
        q, k = RotaryEmbedding.apply(qk, rotation).split_with_sizes((num_q, num_k), dim=1)
        return q, k, v


class Decoder:
    """A decoder-only transformer without state: K and V live behind `attention`.

    Parameters are uninitialised until `models.weights` fills them; `pack()` then brings them into the processor's
    layout. Runs under the caller's `torch.inference_mode()`.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        max_positions: int | None = None,
    ) -> None:
        """`max_positions`: the longest sequence, for the RoPE table; default `config.max_position_embeddings`."""
        device = torch.device(device)
        self.config, self.dtype, self.device = config, dtype, device
        self.embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.layers = [DecoderLayer(config, i, dtype=dtype, device=device) for i in range(config.num_layers)]
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype, device=device)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embedding
        self.rope = RotaryEmbedding(config, max_positions or config.max_position_embeddings, dtype=dtype, device=device)

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
            positions: [rows] int64, place of each token in its own sequence
            attention: writes and attends K/V of this step's rows
            observer: is shown the output of every stage
        """
        hidden = F.embedding(token_ids, self.embedding)
        rotation = self.rope.at(positions)
        if observer is not None:
            observer("embedding", hidden)
        for layer in self.layers:
            hidden = layer(hidden, rotation, attention)
            if observer is not None:
                observer(f"layer {layer.index}", hidden)
        hidden = self.final_norm(hidden)
        if observer is not None:
            observer("final norm", hidden)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, vocab_size], the model's dtype; for the sampled rows only."""
        return self.lm_head(hidden)

    def pack(self) -> None:
        """Bring all weights into the processor's layout, one at a time, dropping the dense ones.

        A tied embedding stays dense for the lookup, and the head gets a packed copy beside it: one more matrix of
        vocabulary x hidden, for the largest product of a decode step.
        """
        for linear in self.linears():
            linear.pack()

    def linears(self) -> Iterator[Linear]:
        """Every linear layer, the head last."""
        for layer in self.layers:
            yield from layer.linears
        yield self.lm_head

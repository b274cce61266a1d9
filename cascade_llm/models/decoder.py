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
from cascade_llm.layers.fused_ops import FusedOps, HeadLayout, RMSNorm
from cascade_llm.layers.rope import Rotation, cos_sin_cache, rotation_at
from cascade_llm.layers.select_ops import select_fused_ops
from cascade_llm.weights.linear import Linear

__all__ = ["Decoder", "DecoderLayer", "Observer"]

Observer = Callable[[str, torch.Tensor], None]
"""Shown the name and the output of each stage of a forward pass, in order; see `models.finite_check`."""


class DecoderLayer:
    """Pre-norm attention and gated feed-forward, each added to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        ops: FusedOps,
        loading_dtype: torch.dtype | None = None,
    ) -> None:
        self.index = index
        self._ops = ops
        self._layout = HeadLayout(config.num_qo_heads, config.num_kv_heads, config.head_dim)
        hidden, eps, q_size = config.hidden_size, config.rms_norm_eps, config.num_qo_heads * config.head_dim
        qkv_size = q_size + 2 * config.num_kv_heads * config.head_dim

        def linear(inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(inputs, outputs, bias=bias, dtype=dtype, device=device, loading_dtype=loading_dtype)

        def norm(size: int) -> RMSNorm:
            return RMSNorm.ones(size, eps, dtype=dtype, device=device)

        self.input_norm = norm(hidden)
        self.qkv = linear(hidden, qkv_size, config.qkv_bias)
        self.qk_norms = (norm(config.head_dim), norm(config.head_dim)) if config.qk_norm else None
        self.attention_out = linear(q_size, hidden, config.attention_out_bias)
        self.feed_forward_norm = norm(hidden)
        self.gate_up = linear(hidden, 2 * config.intermediate_size, config.mlp_bias)
        self.down = linear(config.intermediate_size, hidden, config.mlp_bias)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The four products, in the order they run."""
        return self.qkv, self.attention_out, self.gate_up, self.down

    def __call__(
        self, residual: torch.Tensor, delta: torch.Tensor | None, rotation: Rotation, attention: Attention
    ) -> torch.Tensor:
        """What this layer's feed-forward adds to the residual stream; adding it is left to the next norm.

        Args:
            residual: [rows, hidden]; `delta` and the attention's output are added in place
            delta: [rows, hidden], what the layer before left to add; None for the first layer
            rotation: of these rows
            attention: over this step's rows
        """
        q, k, v = self.before_attention(residual, delta, rotation)
        return self.after_attention(residual, attention(self.index, q, k, v))

    def before_attention(
        self, residual: torch.Tensor, delta: torch.Tensor | None, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [rows, num_qo_heads, head_dim], k and v [rows, num_kv_heads, head_dim]; `delta` is added to `residual`."""
        if delta is None:
            x = self._ops.rms_norm(residual, self.input_norm)
        else:
            x = self._ops.add_rms_norm(residual, delta, self.input_norm)
        return self._ops.rotate(self.qkv(x), self._layout, rotation, self.qk_norms)

    def after_attention(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What is left to add, [rows, hidden], after attention's output [rows, num_qo_heads, head_dim]."""
        delta = self.attention_out(attended.flatten(1))
        x = self._ops.add_rms_norm(residual, delta, self.feed_forward_norm)
        return self.down(self._ops.silu_and_mul(self.gate_up(x)))


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
        ops: FusedOps | None = None,
        loading_dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the parameters.

        Args:
            config: the model
            dtype: of the parameters and of all that is computed from them
            device: where they lie
            max_positions: the longest sequence, for the RoPE table; default `config.max_position_embeddings`
            ops: the elementwise operations; default the fastest that works on this device
            loading_dtype: of the layers' matrices until `quantize()`, which must then be called; default `dtype`
        """
        device = torch.device(device)
        self.config, self.dtype, self.device = config, dtype, device
        self.ops = ops or select_fused_ops(dtype, device)
        self.embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.layers = [
            DecoderLayer(config, i, dtype=dtype, device=device, ops=self.ops, loading_dtype=loading_dtype)
            for i in range(config.num_layers)
        ]
        self.final_norm = RMSNorm.ones(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype, device=device)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embedding
        self.cos_sin_cache = cos_sin_cache(config, max_positions or config.max_position_embeddings, device)

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
        residual = F.embedding(token_ids, self.embedding)
        rotation = rotation_at(self.cos_sin_cache, positions)
        if observer is not None:
            observer("embedding", residual)
        delta: torch.Tensor | None = None
        for layer in self.layers:
            delta = layer(residual, delta, rotation, attention)
            if observer is not None:
                observer(f"layer {layer.index}", residual + delta)
        assert delta is not None, "a model has at least one layer"
        hidden = self.ops.add_rms_norm(residual, delta, self.final_norm)
        if observer is not None:
            observer("final norm", hidden)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, vocab_size], the model's dtype; for the sampled rows only."""
        return self.lm_head(hidden)

    def write_logits(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """`logits` into memory that is there, [n, vocab_size]: a copy of them would be read and written once more."""
        self.lm_head.write(hidden, out)

    def quantize(self) -> None:
        """Round the layers' weights to int4; call before `pack()`.

        The head stays dense: in int4 it cost SmolLM2 0.045 nats a token, all layers together 0.001 (their checkpoint
        is Q4_1), and it is a sixth of a step.
        """
        for layer in self.layers:
            for linear in layer.linears:
                linear.quantize()

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

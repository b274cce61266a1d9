"""Steps that mix prefill and decode, captured in pieces: all that lies between two attentions is one CUDA graph.

    embedding, norm, q k v │ attention │ out, norms, MLP, q k v │ attention │ ... │ out, norms, MLP, final norm
        graph 0               eager           graph 1               eager               graph of the last layer

Attention depends on how many rows each sequence has, so it stays eager; the rest depends on the number of rows alone.
There is a set of graphs for each of a few numbers of rows, and a step takes the smallest that holds it. Rows that
nobody asked for are computed by the graphs and never reach attention, so they write no K/V. What one piece leaves for
the next lies in memory of our own: graphs share a pool, in which another graph may write over what this one left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial

import torch

from cascade_llm.attention.backend import Attention, AttentionSpec
from cascade_llm.device.ranks import Ranks
from cascade_llm.device.start_errors import is_out_of_memory
from cascade_llm.device.stream import DeviceStream, Graph
from cascade_llm.models.decoder import Decoder

__all__ = ["PiecewiseGraphs", "piece_rows"]

log = logging.getLogger("cascade_llm")

ROWS = (32, 64, 128, 256, 384, 512)
"""Up to 256 the device reads weights as long as it computes, so rows that fill up cost little; beyond 512 a layer of a
model of 8B takes the device longer than its launches take the host."""


def piece_rows(max_rows: int) -> tuple[int, ...]:
    """The numbers of rows that are captured, where the largest step has `max_rows`."""
    return tuple(rows for rows in ROWS if rows < max_rows) + ((max_rows,) if max_rows <= ROWS[-1] else ())


class PiecewiseGraphs:
    """The pieces of one decoder, for several numbers of rows; owns the memory between them."""

    def __init__(
        self, decoder: Decoder, spec: AttentionSpec, stream: DeviceStream, max_rows: int, ranks: Ranks
    ) -> None:
        """Set memory aside; `capture` fills it. `max_rows`: of the largest step; `ranks`: that capture the same."""
        self._decoder, self._stream, self._ranks = decoder, stream, ranks
        self._row_counts = piece_rows(max_rows)
        most, config = self._row_counts[-1], decoder.config

        def zeros(*shape: int, dtype: torch.dtype = spec.dtype) -> torch.Tensor:
            return torch.zeros(most, *shape, dtype=dtype, device=spec.device)

        self._token_ids, self._positions = zeros(dtype=torch.int64), zeros(dtype=torch.int64)
        self._residual, self._hidden = zeros(config.hidden_size), zeros(config.hidden_size)
        self._cos_sins = [zeros(table.shape[1], dtype=torch.float32) for table in decoder.rotary.tables]
        self._q = zeros(spec.num_qo_heads, spec.head_dim)
        self._k, self._v = zeros(spec.num_kv_heads, spec.head_dim), zeros(spec.num_kv_heads, spec.head_dim)
        self._attended = zeros(spec.num_qo_heads, spec.head_dim)
        self._graphs: dict[int, list[Graph]] = {}

    @property
    def num_graphs(self) -> int:
        """Graphs that `capture` captures."""
        return len(self._row_counts) * (len(self._decoder.layers) + 1)

    def capture(self, on_graph: Callable[[bool], None]) -> None:
        """Capture all pieces, the largest first; a number of rows that memory has no room for is left out, said aloud.

        on_graph: told of each graph whether it is there
        """
        for rows in reversed(self._row_counts):
            pieces = list(self._pieces(rows))
            try:
                for piece in pieces:
                    piece()  # kernels are loaded by their first call, which no capture may hold
                self._graphs[rows] = [self._stream.capture(piece) for piece in pieces]
            except RuntimeError as error:
                if not is_out_of_memory(error) or self._ranks.count > 1:
                    raise
                log.warning("no memory for graphs of mixed steps of %d rows, such steps will run eagerly", rows)
            for _ in pieces:
                on_graph(rows in self._graphs)

    def capacity(self, num_rows: int) -> int | None:
        """The rows of the smallest set of graphs that holds so many; None where they are too many."""
        return min((rows for rows in self._graphs if rows >= num_rows), default=None)

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attention: Attention) -> torch.Tensor:
        """`Decoder.forward` by replays, queued: hidden states [rows, hidden], valid until the next call.

        Args:
            token_ids: [rows] int64, at most as many as `capacity` holds
            positions: [rows] int64
            attention: writes and attends K/V of this step's rows
        """
        count = len(token_ids)
        rows = self.capacity(count)
        assert rows is not None
        self._token_ids[:count], self._positions[:count] = token_ids, positions
        first, *others = self._graphs[rows]
        first.replay()
        for layer, graph in zip(self._decoder.layers, others, strict=True):
            self._attended[:count] = layer.attend(attention, self._q[:count], self._k[:count], self._v[:count])
            graph.replay()
        return self._hidden[:count]

    def _pieces(self, rows: int) -> Iterator[Callable[[], None]]:
        """What the graphs of so many rows hold."""
        yield partial(self._first, rows)
        for index in range(1, len(self._decoder.layers)):
            yield partial(self._between, rows, index)
        yield partial(self._last, rows)

    def _first(self, rows: int) -> None:
        decoder = self._decoder
        self._residual[:rows] = decoder.embed(self._token_ids[:rows])
        for kept, found in zip(self._cos_sins, decoder.rotary.rows_at(self._positions[:rows]), strict=True):
            kept[:rows] = found
        self._project(rows, 0, None)

    def _between(self, rows: int, index: int) -> None:
        """From the attention of the layer before to that of layer `index`."""
        self._project(rows, index, self._after(rows, index - 1))

    def _last(self, rows: int) -> None:
        decoder = self._decoder
        delta = self._after(rows, len(decoder.layers) - 1)
        self._hidden[:rows] = decoder.ops.add_rms_norm(self._residual[:rows], delta, decoder.final_norm)

    def _after(self, rows: int, index: int) -> torch.Tensor:
        return self._decoder.layers[index].after_attention(self._residual[:rows], self._attended[:rows])

    def _project(self, rows: int, index: int, delta: torch.Tensor | None) -> None:
        rotations = self._decoder.rotary.by_layer([kept[:rows] for kept in self._cos_sins])
        layer = self._decoder.layers[index]
        q, k, v = layer.before_attention(self._residual[:rows], delta, rotations[index])
        self._q[:rows], self._k[:rows], self._v[:rows] = q, k, v

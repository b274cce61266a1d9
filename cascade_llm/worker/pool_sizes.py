"""How memory is shared out between the pools of a model's attention kinds.

The first kind keeps all pages of a sequence, one with a window the last few. How many of each a load needs depends on
how long its sequences are, which nobody knows at start: sequences of a token less than the window need as many of both,
long ones hundreds of times more of the first. So memory is shared out for sequences of the length in the middle, the
geometric mean of the widest window and `max_model_len`; loads of other lengths leave some of one pool unused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cascade_llm.config import EngineOptions, ModelConfig, window_pages_needed

__all__ = ["PoolShape"]

SPARE_PAGES = 3
"""A sequence in a window's pool has, beside the window: a page that both ends cut, one behind, and one ahead."""
CHUNK_TOKENS = 2048
"""Of a prompt that is computed in one step, where there is room: these pages are held until the step after."""
LEAST_CHUNK_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class PoolShape:
    """What the pages of each pool take, and what they are for."""

    page_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    page_bytes: tuple[int, ...]
    """Of each pool, on this rank: the first kind's, and of those with windows that have pools of their own."""
    windows: tuple[int, ...] = ()
    """Of the kinds after the first."""

    @classmethod
    def of(cls, options: EngineOptions, model: ModelConfig, max_model_len: int, kv_number_bytes: float) -> PoolShape:
        """The pools of a model, or of a rank's part of it. Where the first kind has a window, all kinds have one pool.

        kv_number_bytes: of a number in a page, its share of a scale included
        """
        first, *others = model.attention_kinds
        windows = tuple(window for window in others if window is not None) if first is None else ()
        layers = model.layers_of_kinds if windows else (model.num_layers,)
        return cls(
            page_size=options.page_size,
            max_model_len=max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            page_bytes=tuple(model.kv_bytes_of_layers(n, kv_number_bytes) * options.page_size for n in layers),
            windows=windows,
        )

    @property
    def pages_per_sequence(self) -> int:
        """Of the longest one."""
        return -(-self.max_model_len // self.page_size)

    @property
    def bytes_per_sequence(self) -> int:
        """Of the longest one, in all pools, at the least."""
        return self.num_bytes(self.with_windows(self.pages_per_sequence, lean=True))

    @property
    def least_bytes(self) -> int:
        """What the tokens of the longest one take, whatever the size of a page."""
        pages = self.with_windows(self.pages_per_sequence, lean=True)
        tokens = [min(self.max_model_len, count * self.page_size) for count in pages]
        return sum(count * width // self.page_size for count, width in zip(tokens, self.page_bytes, strict=True))

    def num_bytes(self, pages: tuple[int, ...]) -> int:
        """What pools of so many pages take."""
        return sum(count * width for count, width in zip(pages, self.page_bytes, strict=True))

    def with_windows(self, total_pages: int, *, lean: bool = False) -> tuple[int, ...]:
        """The pages of all pools, where the first has `total_pages`.

        lean: whether the others have what a single sequence needs, and no more
        """
        return total_pages, *[min(total_pages, self._window_pages(w, total_pages, lean=lean)) for w in self.windows]

    def most(self, num_bytes: int, *, lean: bool = False) -> int:
        """The most pages of the first pool, so that all fit into so many bytes; up to what all sequences could need."""
        low, high = 0, self.max_num_seqs * self.pages_per_sequence
        while low < high:
            middle = (low + high + 1) // 2
            if self.num_bytes(self.with_windows(middle, lean=lean)) <= num_bytes:
                low = middle
            else:
                high = middle - 1
        return low

    def _window_pages(self, window_len: int, total_pages: int, *, lean: bool) -> int:
        chunk = min(self.max_num_batched_tokens, LEAST_CHUNK_TOKENS if lean else CHUNK_TOKENS)
        least = window_pages_needed(window_len, self.page_size, self.max_model_len, chunk)
        if lean:
            return least
        pages_each = min(-(-window_len // self.page_size) + SPARE_PAGES, self.pages_per_sequence)
        middle_len = math.sqrt(min(self.windows[0], self.max_model_len) * self.max_model_len)
        num_sequences = min(self.max_num_seqs, total_pages * self.page_size / middle_len)
        return max(least, math.ceil(num_sequences * pages_each) + -(-chunk // self.page_size))

"""The draws of `draw` and the argmax in C, for the CPU: each row of logits is read once, compiled when a runner starts.

Torch needs some twenty passes over float32 copies of the logits where thousands of tokens are kept, half as long as the
rest of a small model's step. Here a row stays in its thread's cache: maximum, weights and mass; for each filter a radix
search over float bits, exact down to ties; then the inverse CDF. The orders are those of `draw`, its twin; only the
rounding of weights differs, which are not normalized, and zero below 2^-125 of the largest.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from cascade_llm.device.c_compiler import compile_library
from cascade_llm.errors import BackendError
from cascade_llm.sampling.draw import Filters
from cascade_llm.sampling.workspace import Workspace

__all__ = ["NativeDraw", "reason_against_native_draw"]

SOURCE = Path(__file__).with_suffix(".c")
DTYPES = (torch.float32, torch.bfloat16)
NUM_FIELDS = 5
"""8 bytes each: the fields of C's Choice."""


class NativeDraw:
    """Compiled for the CPU; takes tensors of the CPU only."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._workspace = Workspace()

    @classmethod
    def for_device(cls, device: torch.device) -> NativeDraw | None:
        """None where torch has to do the work; see `reason_against_native_draw`."""
        return cls(_compiled()) if reason_against_native_draw(device) is None else None

    @staticmethod
    def reads(logits: torch.Tensor) -> bool:
        """Whether logits can be read where they lie: float32 or bfloat16, each row contiguous."""
        return logits.dtype in DTYPES and logits.stride(1) == 1

    def sample(
        self,
        logits: torch.Tensor,
        rows: Sequence[int],
        vocab_size: int,
        temperatures: torch.Tensor,
        filters: Filters,
        uniform: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose one token per sample.

        Args:
            logits: [any, vocab or more], which `reads` accepts
            rows: [n], the row of `logits` that each is chosen from
            vocab_size: the columns that count
            temperatures: [n], float64; 0 takes the first of the largest logits
            uniform: [n], float64, in [0, 1)

        Returns:
            token ids [n], int64; finite [n], bool, False where the row held NaN or +inf, or only -inf
        """
        return self._sample(logits, rows, vocab_size, _choices(temperatures, filters, uniform))

    def argmax(self, logits: torch.Tensor, rows: Sequence[int], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`sample` at temperature 0 for all."""
        return self._sample(logits, rows, vocab_size, torch.zeros(len(rows), NUM_FIELDS, dtype=torch.float64))

    def _sample(
        self, logits: torch.Tensor, rows: Sequence[int], vocab_size: int, choices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.reads(logits)
        assert vocab_size <= logits.shape[1]
        assert not rows or (min(rows) >= 0 and max(rows) < len(logits))
        token_ids = torch.empty(len(rows), dtype=torch.int64)
        finite = torch.empty(len(rows), dtype=torch.bool)
        row_index = torch.tensor(rows, dtype=torch.int64)
        self._library.sample_rows(
            logits.data_ptr(),
            logits.dtype == torch.bfloat16,
            logits.stride(0),
            vocab_size,
            row_index.data_ptr(),
            choices.data_ptr(),
            len(rows),
            token_ids.data_ptr(),
            finite.data_ptr(),
            self._scratch(vocab_size).data_ptr(),
            torch.get_num_threads(),
        )
        return token_ids, finite

    def draw(self, weights: torch.Tensor, uniform: torch.Tensor, filters: Filters) -> torch.Tensor:
        """Draw from what the filters keep of given weights.

        Args:
            weights: [n, vocab], float32, contiguous, from 0 to 1
            uniform: [n], float64, in [0, 1)

        Returns:
            [n], int64
        """
        assert weights.is_contiguous()
        assert weights.dtype == torch.float32
        num_rows, vocab_size = weights.shape
        token_ids = torch.empty(num_rows, dtype=torch.int64)
        choices = _choices(torch.ones_like(uniform), filters, uniform)
        self._library.draw_rows(
            weights.data_ptr(),
            vocab_size,
            choices.data_ptr(),
            num_rows,
            token_ids.data_ptr(),
            self._scratch(vocab_size).data_ptr(),
            torch.get_num_threads(),
        )
        return token_ids

    def _scratch(self, vocab_size: int) -> torch.Tensor:
        """Memory for each thread."""
        num_floats = torch.get_num_threads() * self._library.scratch_len(vocab_size)
        return self._workspace.take("scratch", (num_floats,), dtype=torch.float32)


def reason_against_native_draw(device: torch.device) -> str | None:
    """Why torch has to choose the tokens of a device; None where the compiled code can."""
    if device.type != "cpu":
        return f"compiled draws are for the CPU, not {device.type}"
    try:
        _compiled()
    except BackendError as error:
        return str(error)
    return None


def _choices(temperatures: torch.Tensor, filters: Filters, uniform: torch.Tensor) -> torch.Tensor:
    """C's array of Choice [n, 5], as float64; top_k is an int64 there."""
    top_k = filters.top_k.view(torch.float64)
    return torch.stack((temperatures, top_k, filters.top_p, filters.min_p, uniform), dim=1)


@functools.cache
def _compiled() -> ctypes.CDLL:
    """The library, compiled once per process; raises `BackendError` where that is not possible."""
    library = compile_library(SOURCE, ())
    pointer, long, integer = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    library.scratch_len.argtypes, library.scratch_len.restype = (long,), long
    library.sample_rows.argtypes = (
        *(pointer, integer, long, long, pointer, pointer, long, pointer, pointer, pointer, integer),
    )
    library.draw_rows.argtypes = (pointer, long, pointer, long, pointer, pointer, integer)
    library.sample_rows.restype = library.draw_rows.restype = None
    return library

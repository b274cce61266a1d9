"""The sampler in C, for the CPU: each row of logits is read once.

Torch sorts whole rows to filter them, which takes longer than the rest of a small model's step. Here a row stays in its
thread's cache: adjusted logits, maximum, weights and mass; for each filter a radix search over float bits, exact down
to ties; then the inverse CDF. The orders are those of `draw`, and the tables those of `lanes`; only the rounding of
weights differs from `sampler.choose`, its twin: they are not normalized, and zero below 2^-125 of the largest.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence

import torch

from cascade_llm.device.native_function import NativeFunction
from cascade_llm.device.native_library import native_functions
from cascade_llm.device.native_units import SAMPLER
from cascade_llm.errors import BackendError
from cascade_llm.sampling.draw import Filters
from cascade_llm.sampling.lanes import LaneState
from cascade_llm.sampling.masks import TokenMasks

__all__ = ["DTYPES", "NativeSampler", "reason_against_native_sampler"]

DTYPES = (torch.float32, torch.bfloat16)


class _Lanes(ctypes.Structure):
    """C's Lanes: where the tables of `LaneState` lie."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("draw_keys", "top_k", "shares", "penalties", "counts")),
        ("count_bytes", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in ("bias_ids", "bias", "ending_ids", "ends_from")),
        *((name, ctypes.c_long) for name in ("bias_len", "endings_len")),
    )

    @classmethod
    def of(cls, lanes: LaneState) -> _Lanes:
        """The tables as they are now; they move when they grow."""
        usage, lists = lanes.usage, lanes.lists
        return cls(
            lanes.draw_keys.data_ptr(),
            lanes.top_k.data_ptr(),
            lanes.shares.data_ptr(),
            usage.penalties.data_ptr(),
            0 if usage.counts is None else usage.counts.data_ptr(),
            0 if usage.counts is None else usage.counts.element_size(),
            lists.bias_ids.data_ptr(),
            lists.bias.data_ptr(),
            lists.ending_ids.data_ptr(),
            lists.ends_from.data_ptr(),
            lists.bias.shape[1],
            lists.ending_ids.shape[1],
        )


class NativeSampler:
    """Takes tensors of the CPU only."""

    def __init__(self, functions: Mapping[str, NativeFunction]) -> None:
        self._functions = functions
        self._scratch = torch.empty(0)

    @classmethod
    def for_device(cls, device: torch.device) -> NativeSampler | None:
        """None where torch has to do the work; see `reason_against_native_sampler`."""
        return cls(_compiled()) if reason_against_native_sampler(device) is None else None

    def sample(
        self,
        logits: torch.Tensor,
        rows: Sequence[int],
        lane_state: LaneState,
        lanes: Sequence[int],
        positions: Sequence[int],
        masks: TokenMasks | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose one token per sample.

        Args:
            logits: [any, vocab], floating; read where they lie if float32 or bfloat16 with contiguous rows
            rows: [n], the row of `logits` that each is chosen from
            lane_state: whose tables are read
            lanes: [n], whose parameters apply
            positions: [n], the place that each token will have in its sequence
            masks: the tokens that each sample may be; by default any

        Returns:
            token ids [n], int64; finite [n], bool, False where the row held NaN or +inf, or only -inf: the token is 0
        """
        if logits.dtype not in DTYPES or logits.stride(1) != 1:
            logits = logits.float().contiguous()
        vocab_size = logits.shape[1]
        assert vocab_size == lane_state.vocab_size
        assert not len(rows) or (min(rows) >= 0 and max(rows) < len(logits))
        assert not len(lanes) or (min(lanes) >= 0 and max(lanes) < lane_state.num_lanes)
        token_ids = torch.empty(len(rows), dtype=torch.int64)
        finite = torch.empty(len(rows), dtype=torch.bool)
        columns = torch.tensor([list(rows), list(lanes), list(positions)], dtype=torch.int64)
        self._functions["sample_rows"](
            logits.data_ptr(),
            logits.dtype == torch.bfloat16,
            logits.stride(0),
            vocab_size,
            ctypes.byref(_Lanes.of(lane_state)),
            columns.data_ptr(),
            None if masks is None else masks.bits.data_ptr(),
            None if masks is None else masks.rows.data_ptr(),
            len(rows),
            token_ids.data_ptr(),
            finite.data_ptr(),
            self._scratch_for(vocab_size).data_ptr(),
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
        columns = torch.stack((filters.top_k.view(torch.float64), filters.top_p, filters.min_p, uniform), dim=1)
        self._functions["draw_rows"](
            weights.data_ptr(),
            vocab_size,
            columns.data_ptr(),
            num_rows,
            token_ids.data_ptr(),
            self._scratch_for(vocab_size).data_ptr(),
            torch.get_num_threads(),
        )
        return token_ids

    def _scratch_for(self, vocab_size: int) -> torch.Tensor:
        """Memory for each thread, kept: fresh pages cost more than the work on them."""
        num_floats = torch.get_num_threads() * self._functions["scratch_len"](vocab_size)
        if self._scratch.numel() < num_floats:
            self._scratch = torch.empty(num_floats)
        return self._scratch


def reason_against_native_sampler(device: torch.device) -> str | None:
    """Why torch has to choose the tokens of a device; None where the compiled code can."""
    if device.type != "cpu":
        return f"the compiled sampler is for the CPU, not {device.type}"
    try:
        _compiled()
    except BackendError as error:
        return str(error)
    return None


@functools.cache
def _compiled() -> Mapping[str, NativeFunction]:
    """The functions, with the types of their arguments; raises `BackendError` where there are none."""
    functions = native_functions(SAMPLER)
    pointer, long, integer = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    functions["scratch_len"].declare(long, returns=long)
    functions["sample_rows"].declare(
        *(pointer, integer, long, long, pointer, pointer, pointer, pointer, long, pointer, pointer, pointer, integer)
    )
    functions["draw_rows"].declare(pointer, long, pointer, long, pointer, pointer, integer)
    return functions

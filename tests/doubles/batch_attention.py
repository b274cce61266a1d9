"""FlashInfer's `BatchAttention`: one launch for requests of any size, planned by the host with the device idle.

Written from the description of `TwoStageHolisticPlan` (FlashInfer 0.7.2, scheduler.cuh) and of its kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from tests.doubles.device import poison
from tests.doubles.kernels import assign, attend_rows, joined_states, readable_keys
from tests.doubles.planner import DoubleError
from tests.doubles.wrappers import FP8, HEAD_DIMS, INT_WORKSPACE_BYTES, bind_recorded

if TYPE_CHECKING:
    from tests.doubles.flashinfer import FlashInferDouble

__all__ = ["BatchAttentionDouble", "holistic_works"]

FLOAT_WORKSPACE_BYTES = 384 << 20
HOLISTIC_MAGIC, HOLISTIC_HEADER, WORK_NUMBERS = 0x0BA77E00, 3, 8
TILES = (128, 16)
MAX_WORKS = 65536

Work = tuple[int, int, int, int, int, int, int, int]
"""(first row, rows, first packed row, packed rows, first page entry, K/V length, chunk begin, chunk end)"""


class BatchAttentionDouble:
    """`flashinfer.BatchAttention`."""

    def __init__(self, double: FlashInferDouble, kv_layout: str = "NHD", device: str = "cuda") -> None:
        if kv_layout != "NHD":
            raise DoubleError(f"layout {kv_layout}")
        self._double, self._stream = double, double.stream
        self.float_workspace_buffer = torch.empty(FLOAT_WORKSPACE_BYTES, dtype=torch.uint8)
        self.int_workspace_buffer = torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8)
        self.page_locked_int_workspace_buffer = torch.empty(INT_WORKSPACE_BYTES // 4, dtype=torch.int32)
        self._stream.adopt_pinned(self.page_locked_int_workspace_buffer)
        self._num_rows = -1

    def plan(self, *args: Any, **kwargs: Any) -> None:
        if self._stream.capturing:
            raise DoubleError("plan during capture")
        bound = bind_recorded("BatchAttention.plan", args, kwargs)
        columns = [bound[name] for name in ("qo_indptr", "kv_indptr", "kv_len_arr")]
        for column in (*columns, bound["kv_indices"]):
            if column.dtype != torch.int32 or column.dim() != 1 or not column.is_contiguous():
                raise DoubleError("columns must be contiguous int32")
        if len(bound["kv_indices"]) and not self._stream.is_on_device(bound["kv_indices"]):
            raise DoubleError("page indices on the host: the kernel reads them where they are")
        heads, kv_heads, head_dim = bound["num_qo_heads"], bound["num_kv_heads"], bound["head_dim_qk"]
        if head_dim not in HEAD_DIMS or bound["head_dim_vo"] != head_dim or heads % kv_heads:
            raise DoubleError(f"{heads}/{kv_heads} heads of {head_dim}")
        if bound["q_data_type"] not in self._double.dtypes or bound["kv_data_type"] not in (bound["q_data_type"], FP8):
            raise DoubleError(f"q_data_type {bound['q_data_type']}, kv_data_type {bound['kv_data_type']}")
        if bound["logits_soft_cap"] is not None or bound["use_profiler"]:
            raise DoubleError("another module")
        self._stream.run_queued()  # torch.cuda.synchronize()
        blocks = self._double.num_sm * (1 if head_dim >= 256 else 2)
        lists = [column.tolist() for column in columns]
        works, num_split_rows = holistic_works(
            *lists, group=heads // kv_heads, num_kv_heads=kv_heads, num_blocks=blocks, causal=bound["causal"]
        )
        self._check_room(works, num_split_rows, blocks, kv_heads, head_dim)
        self._double.num_plans += 1
        numbers = [HOLISTIC_MAGIC, len(works), lists[0][-1], *(number for work in works for number in work)]
        pinned = self.page_locked_int_workspace_buffer[: len(numbers)]
        self._stream.check_host_write(pinned)
        pinned.copy_(torch.tensor(numbers, dtype=torch.int32))
        target = self.int_workspace_buffer.view(torch.int32)[: len(numbers)]
        self._stream.enqueue(lambda: assign(target, pinned), [target], [pinned])
        self._num_rows, self._kv_indices, self._causal = lists[0][-1], bound["kv_indices"], bound["causal"]
        self._heads, self._page_size, self._sm_scale = (heads, head_dim), bound["page_size"], bound["sm_scale"]
        self._dtypes = bound["q_data_type"], bound["kv_data_type"]

    def run(self, q: torch.Tensor, kv_cache: Any, *args: Any, **kwargs: Any) -> Any:
        bound = bind_recorded("BatchAttention.run", (q, kv_cache, *args), kwargs)
        out, lse, (k_pool, v_pool) = bound["out"], bound["lse"], kv_cache
        if self._stream.capturing:
            raise DoubleError("BatchAttention has no graph mode, and lengths are in its plan")
        if self._num_rows < 0 or len(q) != self._num_rows:
            raise DoubleError(f"q has {len(q)} rows, the plan {self._num_rows}: both sides are read beyond their ends")
        if (q.dtype, k_pool.dtype) != self._dtypes or v_pool.dtype != k_pool.dtype:
            raise DoubleError(f"q {q.dtype} and K {k_pool.dtype}, planned for {self._dtypes}")
        if q.stride(-1) != 1 or q.shape[1:] != self._heads or k_pool.shape[1] != self._page_size:
            raise DoubleError(f"q is {tuple(q.shape)}, pages of {k_pool.shape[1]}")
        if k_pool.stride() != v_pool.stride():
            raise DoubleError("another kernel module is loaded where K and V have different strides")
        if k_pool.shape[0] * k_pool.stride(0) > self._double.max_pool_elements:
            raise DoubleError("offsets into K and V are uint32: they wrap round in a pool of that size")
        if out is None or lse is None or not out.is_contiguous() or not lse.is_contiguous():
            raise DoubleError("out and lse are written as contiguous memory; without them they are allocated")
        if out.shape != q.shape or out.dtype != q.dtype or lse.shape != q.shape[:2] or lse.dtype != torch.float32:
            raise DoubleError(f"out {tuple(out.shape)} {out.dtype}, lse {tuple(lse.shape)} {lse.dtype}")
        scales = [1.0 if bound[name] is None else bound[name] for name in ("k_scale", "v_scale")]
        if not all(isinstance(scale, float) for scale in scales):
            raise DoubleError("a scale that is not a number is read by the host")
        self._double.num_runs += 1
        self._double.use("batch_attention", q.dtype, k_pool.dtype, q.shape[-1])
        sm_scale = (self._sm_scale or q.shape[-1] ** -0.5) * scales[0]
        pools, v_scale = (k_pool, v_pool), scales[1]
        self._stream.launch(
            lambda: self._run(q, pools, out, lse, sm_scale, v_scale),
            [q, out, lse, *pools, self.int_workspace_buffer, self._kv_indices],
        )
        return out, lse

    def _run(
        self, q: torch.Tensor, pools: Any, out: torch.Tensor, lse: torch.Tensor, scale: float, v_scale: float
    ) -> None:
        poison(out)
        poison(lse)
        numbers = self.int_workspace_buffer.view(torch.int32)
        magic, num_works, num_rows = numbers[:HOLISTIC_HEADER].tolist()
        if magic != HOLISTIC_MAGIC or num_rows != len(q):
            raise DoubleError("no plan for these rows in the int workspace")
        end = HOLISTIC_HEADER + WORK_NUMBERS * num_works
        group = q.shape[1] // pools[0].shape[2]
        states: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        for work in numbers[HOLISTIC_HEADER:end].view(-1, WORK_NUMBERS).tolist():
            first, count, packed_start, packed_rows, entry, kv_len, begin, stop = work
            packed = range(packed_start, packed_start + packed_rows)
            rows = range(first + packed.start // group, first + -(-packed.stop // group))
            limits = readable_keys(rows, first + count, kv_len, causal=self._causal, window=-1)
            v, s = attend_rows(q[rows.start : rows.stop], pools, self._kv_indices, entry, begin, stop, scale, limits)
            v = v * v_scale
            if stop - begin < kv_len:  # partial results pass through memory in the output's dtype
                v = v.to(q.dtype).double()
            if (first, packed_start) in states:
                v, s = joined_states(*states[first, packed_start], v, s)
            states[first, packed_start] = v, s
            for row in packed:
                place, heads = first + row // group, slice(row % group, None, group)
                out[place, heads] = v[place - rows.start, heads].to(out.dtype)
                lse[place, heads] = s[place - rows.start, heads].float()

    def _check_room(
        self, works: list[Work], num_split_rows: int, num_blocks: int, num_kv_heads: int, head_dim: int
    ) -> None:
        if len(works) * num_kv_heads > MAX_WORKS:
            raise DoubleError(f"{len(works) * num_kv_heads} works exceed {MAX_WORKS}")
        splits = 4 * num_blocks * sum(TILES)
        if num_split_rows + 1 > splits:
            raise DoubleError("more split rows than the workspace has places")
        needed = splits * num_kv_heads * (2 * head_dim + 4)
        if needed > self.float_workspace_buffer.numel():
            raise DoubleError(f"holistic_partial_o: {needed} bytes in {self.float_workspace_buffer.numel()}")


def holistic_works(
    qo_indptr: Sequence[int],
    kv_indptr: Sequence[int],
    kv_lens: Sequence[int],
    *,
    group: int,
    num_kv_heads: int,
    num_blocks: int,
    causal: bool,
) -> tuple[list[Work], int]:
    """The planner: works of one KV head, and how many packed rows are split; a length counts as it is given."""
    if causal:
        raise DoubleError("causal is one flag for all requests: shared levels have no mask")
    packed_tiles: list[tuple[int, int, int, int]] = []
    for i, kv_len in enumerate(kv_lens):
        rows = qo_indptr[i + 1] - qo_indptr[i]
        pages = kv_indptr[i + 1] - kv_indptr[i]
        if rows < 0 or pages < 0:
            raise DoubleError("indptr decreases")
        if kv_len and not pages:
            raise DoubleError(f"a request without pages has a length of {kv_len}")
        tile = TILES[0] if rows * group > TILES[1] else TILES[1]
        packed_tiles += [(i, rows, start, min(tile, rows * group - start)) for start in range(0, rows * group, tile)]
    total = sum(kv_lens[i] for i, *_ in packed_tiles)
    limit = -(-max(1, -(-total * num_kv_heads // num_blocks)) // 256) * 256
    limit = 128 if max(1, -(-total * num_kv_heads // num_blocks)) <= 128 else limit
    works: list[Work] = []
    num_split_rows = 0
    for i, rows, start, count in packed_tiles:
        kv_len = kv_lens[i]
        chunk = limit // min(num_kv_heads, 2) if rows * group > TILES[1] else limit
        num_split_rows += count if kv_len > chunk else 0
        for begin in range(0, max(1, kv_len), chunk):
            stop = min(kv_len, begin + chunk)
            works.append((qo_indptr[i], rows, start, count, kv_indptr[i], kv_len, begin, stop))
    return works, num_split_rows

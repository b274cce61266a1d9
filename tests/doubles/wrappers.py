"""FlashInfer's two wrappers: what they check, where their plans live, and when their columns arrive."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.doubles.kernels import assign, run_tiles
from tests.doubles.planner import HEADER, MAGIC, DoubleError, KernelPlan, decode_plan, prefill_plan

if TYPE_CHECKING:
    from tests.doubles.flashinfer import FlashInferDouble

__all__ = ["FP8", "HEAD_DIMS", "INT_WORKSPACE_BYTES", "SIGNATURES", "DecodeWrapper", "PrefillWrapper"]

SIGNATURES = Path(__file__).parents[1] / "attention" / "flashinfer_signatures.json"
HEAD_DIMS = (64, 128, 256)
INT_WORKSPACE_BYTES = 8 << 20
FP8 = torch.float8_e4m3fn
DECODE_GROUPS = (1, 2, 3, 4, 6, 8, 16)


class _Wrapper:
    """What the prefill and the decode wrapper have in common: workspaces, buffers, and a plan in bytes."""

    def __init__(
        self,
        double: FlashInferDouble,
        float_workspace: torch.Tensor,
        kv_layout: str,
        use_cuda_graph: bool,
        buffers: tuple[torch.Tensor | None, ...],
    ) -> None:
        if kv_layout != "NHD":
            raise DoubleError(f"layout {kv_layout}")
        double.claim_workspace(float_workspace)
        self._double, self._stream = double, double.stream
        self._float_workspace_buffer, self._use_cuda_graph = float_workspace, use_cuda_graph
        self._buffers = buffers
        self._take_int_workspace(torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, device=self._stream.device))
        self._max_rows: int | None = None
        self._captured_layout: tuple[Any, ...] | None = None
        self._num_rows = -1
        if use_cuda_graph:
            if any(buffer is None or buffer.dtype != torch.int32 or not buffer.is_contiguous() for buffer in buffers):
                raise DoubleError("graph mode needs all its buffers: contiguous int32")
            _, indptr, _, last_page_len = buffers
            assert indptr is not None
            assert last_page_len is not None
            self._fixed_segments = len(last_page_len)
            if len(indptr) != self._fixed_segments + 1:
                raise DoubleError("the indptr buffer needs one entry more than segments")

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        for buffer in (float_workspace_buffer, int_workspace_buffer):
            if buffer.data_ptr() % 16:
                raise DoubleError("a workspace must be aligned to 16 bytes")
        self._double.claim_workspace(float_workspace_buffer)
        self._float_workspace_buffer = float_workspace_buffer
        self._take_int_workspace(int_workspace_buffer)

    def _take_int_workspace(self, workspace: torch.Tensor) -> None:
        self._int_workspace = workspace
        self._pinned_workspace = torch.empty(workspace.numel() // 4, dtype=torch.int32)
        self._stream.adopt_pinned(self._pinned_workspace)

    def _check_shape(self, num_qo_heads: int, num_kv_heads: int, head_dim: int, q_dtype: Any, kv_dtype: Any) -> None:
        if head_dim not in HEAD_DIMS or num_qo_heads % num_kv_heads:
            raise DoubleError(f"{num_qo_heads}/{num_kv_heads} heads of {head_dim}")
        if q_dtype not in self._double.dtypes or kv_dtype not in (q_dtype, FP8):
            raise DoubleError(f"q_data_type {q_dtype}, kv_data_type {kv_dtype}")
        if kv_dtype == FP8 and head_dim == 64:
            raise DoubleError("FP8 pages at head_dim 64: a source note says that this does not work")
        self._kv_dtype = kv_dtype

    def _check_columns(self, *columns: torch.Tensor) -> None:
        for column in columns:
            if column.dtype != torch.int32 or column.dim() != 1 or not column.is_contiguous():
                raise DoubleError("columns must be contiguous int32")

    def _store_columns(self, columns: tuple[torch.Tensor, ...]) -> None:
        """Graph mode copies into the fixed buffers, else the wrapper takes new memory."""
        if len(columns[2]) and not self._stream.is_on_device(columns[2]):
            raise DoubleError("page indices on the host: pageable, their copy waits for the stream where they are many")
        if not self._use_cuda_graph:
            self._buffers = tuple(
                self._copied(torch.empty_like(column, device=self._stream.device), column) for column in columns
            )
            return
        if len(columns[3]) != self._fixed_segments:
            raise DoubleError(f"{len(columns[3])} segments for {self._fixed_segments} fixed slots")
        indices, indices_buffer = columns[2], self._buffers[2]
        assert indices_buffer is not None
        if len(indices) > len(indices_buffer):
            raise DoubleError("more page indices than the buffer holds")
        if len(indices) and indices.data_ptr() == indices_buffer.data_ptr():
            raise DoubleError("page indices are copied onto themselves")
        for buffer, column in zip(self._buffers, columns, strict=True):
            if buffer is not None:
                self._copied(buffer[: len(column)], column)

    def _copied(self, buffer: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        if self._stream.is_pinned(column):
            self._stream.enqueue(lambda: assign(buffer, column), [buffer], [column])
        elif self._stream.is_on_device(column):
            self._stream.enqueue(lambda: assign(buffer, column), [buffer, column])
        else:
            staged = column.clone()  # the driver stages pageable memory before the call returns
            self._stream.enqueue(lambda: assign(buffer, staged), [buffer])
        return buffer

    def _store_plan(self, plan: KernelPlan, num_segments: int, num_rows: int, float_bytes: int) -> None:
        """Write a plan to the pinned workspace, and queue its copy to the device."""
        if float_bytes > self._float_workspace_buffer.numel():
            available = self._float_workspace_buffer.numel()
            raise RuntimeError(
                f"Buffer overflow when allocating memory for batch_prefill_tmp_v with size {float_bytes} and alignment "
                f"16, but only {available} bytes available in AlignedAllocator. Increase the workspace buffer size."
            )
        header = [
            MAGIC,
            len(plan.tiles),
            plan.padded_tiles,
            plan.cta_tile_q,
            plan.chunk_pages,
            int(plan.split_kv),
            num_segments,
            num_rows,
        ]
        self._double.num_plans += 1
        if self._captured_layout is not None and plan.layout != self._captured_layout:
            raise DoubleError(f"a plan of layout {plan.layout} for a graph captured with {self._captured_layout}")
        content = torch.tensor([*header, *(number for tile in plan.tiles for number in tile)], dtype=torch.int32)
        if max(_plan_bytes(plan, num_segments, num_rows), 4 * len(content)) > self._int_workspace.numel():
            raise DoubleError("the plan does not fit the int workspace")
        pinned = self._pinned_workspace[: len(content)]
        self._stream.check_host_write(pinned)
        pinned.copy_(content)
        target = self._int_workspace.view(torch.int32)[: len(content)]
        self._stream.enqueue(lambda: assign(target, pinned), [target], [pinned])
        self._layout = plan.layout

    def _check_run(
        self,
        q: torch.Tensor,
        paged_kv_cache: Any,
        out: torch.Tensor | None,
        lse: torch.Tensor | None,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k_pool, v_pool = paged_kv_cache
        if self._num_rows < 0:
            raise DoubleError("run before plan")
        if len(q) != self._num_rows:
            raise DoubleError(f"q has {len(q)} rows, the plan {self._num_rows}")
        if q.dtype != self._dtype or k_pool.dtype != self._kv_dtype or v_pool.dtype != self._kv_dtype:
            planned = f"{self._dtype} and {self._kv_dtype}"
            raise DoubleError(f"q {q.dtype} and K {k_pool.dtype}, planned for {planned}")
        if q.stride(-1) != 1 or q.shape[1:] != self._heads:
            raise DoubleError(f"q is {tuple(q.shape)}")
        if k_pool.stride() != v_pool.stride():
            raise DoubleError("another kernel module is loaded where K and V have different strides")
        if out is None or lse is None or not return_lse:
            raise DoubleError("without out and lse, memory is allocated and set to zero in every layer")
        if out.shape != q.shape or out.dtype != q.dtype or lse.shape != q.shape[:2] or lse.dtype != torch.float32:
            raise DoubleError(f"out {tuple(out.shape)} {out.dtype}, lse {tuple(lse.shape)} {lse.dtype}")
        if not out.is_contiguous() or not lse.is_contiguous():
            raise DoubleError("out is written as contiguous memory whatever its strides")
        return k_pool, v_pool

    def _use(self, kernel: str, q: torch.Tensor) -> None:
        """Windows and soft caps are compiled in."""
        is_capped = bool(self._soft_cap)
        self._double.use(kernel, q.dtype, self._kv_dtype, q.shape[-1], self._window >= 0, is_capped)

    def _launch(
        self, run: Callable[[], None], touched: list[torch.Tensor], pools: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        self._double.num_runs += 1
        if self._stream.capturing:
            if not self._use_cuda_graph:
                raise DoubleError("a wrapper without fixed buffers in a capture")
            self._captured_layout = self._layout
        kept = [buffer for buffer in self._buffers if buffer is not None]
        self._stream.launch(run, [*touched, *pools, *kept, self._int_workspace])


class PrefillWrapper(_Wrapper):
    """`flashinfer.BatchPrefillWithPagedKVCacheWrapper`, backend fa2."""

    def __init__(
        self,
        double: FlashInferDouble,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: Any = None,
        jit_kwargs: Any = None,
        variant_owns_mask: bool = False,
    ) -> None:
        if backend != "fa2":
            raise DoubleError(f"backend {backend!r}: 'auto' takes fa3 on Hopper, which neither splits nor packs")
        buffers = (qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf)
        super().__init__(double, float_workspace_buffer, kv_layout, use_cuda_graph, buffers)
        if use_cuda_graph and qo_indptr_buf is not None and len(qo_indptr_buf) != self._fixed_segments + 1:
            raise DoubleError("the qo_indptr buffer needs one entry more than segments")

    def workspace_size(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        bound = _bind_recorded("BatchPrefillWithPagedKVCacheWrapper.workspace_size", args, kwargs)
        plan, num_segments, num_rows = self._kernel_plan(bound)
        return _workspace_bytes(
            plan, num_segments, num_rows, bound["num_qo_heads"], bound["num_kv_heads"], bound["head_dim_qk"]
        )

    def plan(self, *args: Any, **kwargs: Any) -> None:
        if self._stream.capturing:
            raise DoubleError("plan during capture")
        bound = _bind_recorded("BatchPrefillWithPagedKVCacheWrapper.plan", args, kwargs)
        columns = tuple(
            bound[name] for name in ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
        )
        self._check_columns(*columns)
        self._check_shape(
            bound["num_qo_heads"],
            bound["num_kv_heads"],
            bound["head_dim_qk"],
            bound["q_data_type"],
            bound["kv_data_type"],
        )
        _check_level(*(columns[i].tolist() for i in (0, 1, 3)), bound["page_size"])
        num_rows = int(columns[0][-1])
        if self._use_cuda_graph:
            if self._max_rows is None:
                self._max_rows = num_rows
            if num_rows > self._max_rows:
                raise DoubleError(f"{num_rows} rows, frozen at {self._max_rows} by the first plan")
        plan, num_segments, num_rows = self._kernel_plan(bound)
        self._store_columns(columns)
        heads = bound["num_qo_heads"], bound["num_kv_heads"], bound["head_dim_qk"]
        self._store_plan(plan, num_segments, num_rows, _workspace_bytes(plan, num_segments, num_rows, *heads)[0])
        self._num_rows, self._dtype = num_rows, bound["q_data_type"]
        self._heads = (bound["num_qo_heads"], bound["head_dim_qk"])
        self._causal, self._sm_scale, self._window = bound["causal"], bound["sm_scale"], bound["window_left"]
        self._soft_cap = bound["logits_soft_cap"]

    def run(self, q: torch.Tensor, paged_kv_cache: Any, *args: Any, **kwargs: Any) -> Any:
        bound = _bind_recorded("BatchPrefillWithPagedKVCacheWrapper.run", (q, paged_kv_cache, *args), kwargs)
        out, lse = bound["out"], bound["lse"]
        pools = self._check_run(q, paged_kv_cache, out, lse, bound["return_lse"])
        self._use("prefill", q)
        buffers, workspace = self._buffers, self._int_workspace
        options = {
            "causal": self._causal,
            "scale": _folded(self._sm_scale, bound),
            "window": self._window,
            "soft_cap": self._soft_cap,
        }

        def run() -> None:
            run_tiles(workspace, buffers, q, pools, out, lse, **options)

        self._launch(run, [q, out, lse], pools)
        return out, lse

    def _kernel_plan(self, bound: dict[str, Any]) -> tuple[KernelPlan, int, int]:
        qo_indptr, kv_indptr = bound["qo_indptr"].tolist(), bound["paged_kv_indptr"].tolist()
        if bound["fixed_split_size"] is not None or bound["uniform_q_len"] is not None:
            raise DoubleError("fixed_split_size and uniform_q_len are not for graphs")
        plan = prefill_plan(
            qo_indptr,
            kv_indptr,
            max_rows=self._max_rows or qo_indptr[-1],
            num_qo_heads=bound["num_qo_heads"],
            num_kv_heads=bound["num_kv_heads"],
            head_dim=bound["head_dim_qk"],
            page_size=bound["page_size"],
            graph=self._use_cuda_graph,
            disable_split_kv=bound["disable_split_kv"],
            num_sm=self._double.num_sm,
        )
        return plan, len(qo_indptr) - 1, qo_indptr[-1]


class DecodeWrapper(_Wrapper):
    """`flashinfer.BatchDecodeWithPagedKVCacheWrapper`: on tensor cores the FA2 kernel with one row per segment."""

    def __init__(
        self,
        double: FlashInferDouble,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: Any = None,
    ) -> None:
        if backend != "fa2":
            raise DoubleError(f"backend {backend!r}: 'auto' may choose cuDNN, whose log-sum-exp is wrong")
        range_buffer = None
        if paged_kv_indptr_buffer is not None:
            range_buffer = torch.arange(len(paged_kv_indptr_buffer), dtype=torch.int32, device=double.stream.device)
        buffers = (range_buffer, paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        super().__init__(double, float_workspace_buffer, kv_layout, use_cuda_graph, buffers)
        self._tensor_cores = use_tensor_cores

    def workspace_size(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        bound = _bind_recorded("BatchDecodeWithPagedKVCacheWrapper.workspace_size", args, kwargs)
        plan, rows = self._kernel_plan(bound)
        return self._workspace_bytes(plan, rows, bound["num_qo_heads"], bound["num_kv_heads"], bound["head_dim"])

    def plan(self, *args: Any, **kwargs: Any) -> None:
        if self._stream.capturing:
            raise DoubleError("plan during capture")
        bound = _bind_recorded("BatchDecodeWithPagedKVCacheWrapper._plan_impl", args, kwargs)
        columns = (bound["indptr"], bound["indices"], bound["last_page_len"])
        self._check_columns(*columns)
        self._check_shape(
            bound["num_qo_heads"], bound["num_kv_heads"], bound["head_dim"], bound["q_data_type"], bound["kv_data_type"]
        )
        group = bound["num_qo_heads"] // bound["num_kv_heads"]
        if not self._tensor_cores and group not in DECODE_GROUPS:
            raise DoubleError(f"CUDA-core decode has no kernel for {group} query heads per KV head")
        rows = len(columns[2])
        range_column = torch.arange(rows + 1, dtype=torch.int32)
        _check_level(range_column.tolist(), columns[0].tolist(), columns[2].tolist(), bound["page_size"])
        plan, _ = self._kernel_plan(bound)
        self._store_columns((range_column, *columns))
        heads = bound["num_qo_heads"], bound["num_kv_heads"], bound["head_dim"]
        self._store_plan(plan, rows, rows, self._workspace_bytes(plan, rows, *heads)[0])
        self._num_rows, self._dtype = rows, bound["q_data_type"]
        self._heads = (bound["num_qo_heads"], bound["head_dim"])
        self._sm_scale, self._window = bound["sm_scale"], bound["window_left"]
        self._soft_cap = bound["logits_soft_cap"]

    def run(self, q: torch.Tensor, paged_kv_cache: Any, *args: Any, **kwargs: Any) -> Any:
        bound = _bind_recorded("BatchDecodeWithPagedKVCacheWrapper.run", (q, paged_kv_cache, *args), kwargs)
        out, lse = bound["out"], bound["lse"]
        pools = self._check_run(q, paged_kv_cache, out, lse, bound["return_lse"])
        self._use("prefill" if self._tensor_cores else "decode", q)
        buffers, workspace = self._buffers, self._int_workspace
        options = {
            "causal": False,
            "scale": _folded(self._sm_scale, bound),
            "window": self._window,
            "soft_cap": self._soft_cap,
            "no_surplus": not self._tensor_cores,
        }

        def run() -> None:
            run_tiles(workspace, buffers, q, pools, out, lse, **options)

        self._launch(run, [q, out, lse], pools)
        return out, lse

    def _workspace_bytes(
        self, plan: KernelPlan, rows: int, num_qo_heads: int, num_kv_heads: int, head_dim: int
    ) -> tuple[int, int]:
        if self._tensor_cores or not plan.split_kv:
            return _workspace_bytes(plan, rows, rows, num_qo_heads, num_kv_heads, head_dim)
        # the decode kernel keeps a partial result for each item, of which each has a row of its own
        return num_qo_heads * plan.padded_tiles * (head_dim + 1) * 4, _plan_bytes(plan, rows, rows)

    def _kernel_plan(self, bound: dict[str, Any]) -> tuple[KernelPlan, int]:
        indptr = bound["indptr"].tolist()
        rows = len(indptr) - 1
        if bound["fixed_split_size"] is not None or bound["q_len_per_req"] != 1:
            raise DoubleError("fixed_split_size and q_len_per_req are not used here")
        if not self._tensor_cores:
            num_kv_heads, page_size = bound["num_kv_heads"], bound["page_size"]
            return decode_plan(
                indptr,
                num_kv_heads=num_kv_heads,
                page_size=page_size,
                graph=self._use_cuda_graph,
                num_sm=self._double.num_sm,
            ), rows
        plan = prefill_plan(
            range(rows + 1),
            indptr,
            max_rows=rows,
            num_qo_heads=bound["num_qo_heads"],
            num_kv_heads=bound["num_kv_heads"],
            head_dim=bound["head_dim"],
            page_size=bound["page_size"],
            graph=self._use_cuda_graph,
            disable_split_kv=bound["disable_split_kv"],
            num_sm=self._double.num_sm,
        )
        return plan, rows


@functools.cache
def _parameters(name: str) -> inspect.Signature:
    """A recorded signature, its defaults read back where they are literals."""
    recorded = json.loads(SIGNATURES.read_text())["calls"][f"flashinfer:{name}"]
    parameters = []
    for entry in recorded[1:]:
        default = inspect.Parameter.empty
        if "default" in entry:
            default = eval(entry["default"], {"torch": torch})
        parameters.append(inspect.Parameter(entry["name"], inspect._ParameterKind[entry["kind"]], default=default))
    return inspect.Signature(parameters)


def _bind_recorded(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, as the recorded signature takes them; TypeError where it does not."""
    bound = _parameters(name).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _folded(sm_scale: Any, bound: dict[str, Any]) -> Any:
    """The softmax scale of a run, a number of the host's; V's scale would be another kernel in every level."""
    if bound["q_scale"] is not None or bound["v_scale"] is not None:
        raise DoubleError("q_scale and v_scale are kernels of their own: multiply once, behind the last merge")
    k_scale = bound["k_scale"]
    if k_scale is not None and not isinstance(k_scale, float):
        raise DoubleError(f"k_scale is {type(k_scale).__name__}: read by the host")
    return sm_scale if k_scale is None else sm_scale * k_scale


def _check_level(qo_indptr: list[int], kv_indptr: list[int], last_page_len: list[int], page_size: int) -> None:
    if qo_indptr[0] != 0 or kv_indptr[0] != 0:
        raise DoubleError("indptr must start at 0")
    for segment, last in enumerate(last_page_len):
        num_pages = kv_indptr[segment + 1] - kv_indptr[segment]
        if num_pages == 0 and last != 0:
            raise DoubleError("an empty segment needs last_page_len 0: other kernels take it for a length")
        if num_pages and not 1 <= last <= page_size:
            raise DoubleError(f"last_page_len {last} of a page of {page_size}")


def _plan_bytes(plan: KernelPlan, num_segments: int, num_rows: int) -> int:
    return 4 * (HEADER + 3 * plan.padded_tiles + num_segments + num_rows + 64)


def _workspace_bytes(
    plan: KernelPlan, num_segments: int, num_rows: int, num_qo_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[int, int]:
    partial_rows = -(-plan.padded_tiles * plan.cta_tile_q // (num_qo_heads // num_kv_heads)) if plan.split_kv else 0
    return num_qo_heads * partial_rows * (head_dim + 1) * 4, _plan_bytes(plan, num_segments, num_rows)

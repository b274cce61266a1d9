"""One level of a cascade plan on one FlashInfer wrapper.

The wrappers are FlashInfer's own, planned and run as `claude_docs/flashinfer_cascade_spec.md` writes down. Every level
writes into tensors that it is given, and levels are joined in place: nothing is allocated between two kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.flashinfer.ops import FlashInferOps
from cascade_llm.device.stream import DeviceStream, Event
from cascade_llm.errors import CapacityError
from cascade_llm.kv_cache.paged_kv_cache import KVScale

__all__ = [
    "DecodeKernel",
    "FlashInferDevice",
    "KernelName",
    "LevelBuffers",
    "LevelColumns",
    "LevelKernel",
    "LevelOutput",
    "LevelRun",
    "attend_levels",
    "decode_kernel",
    "serving_kernels",
]

NO_WINDOW = -1

DecodeKernel = Literal["decode_tensor_cores", "decode_cuda_cores"]
KernelName = Literal["prefill_fa2", DecodeKernel]


def decode_kernel(spec: AttentionSpec) -> DecodeKernel:
    """What serves the leaf where every sequence has one row; one query head per KV head leaves tensor cores idle."""
    return "decode_cuda_cores" if spec.group_size == 1 else "decode_tensor_cores"


def serving_kernels(spec: AttentionSpec) -> tuple[KernelName, ...]:
    """Everything that serves a model: fa2 shared levels, and the leaf of prefill and mixed steps.

    On Hopper, FlashInfer's own choice for these is fa3, which neither splits K/V nor packs query heads.
    """
    return "prefill_fa2", decode_kernel(spec)


@dataclass(frozen=True)
class FlashInferDevice:
    """What all wrappers of an engine share: FlashInfer, one stream, one float workspace, since levels run in turn."""

    ops: FlashInferOps
    stream: DeviceStream
    float_workspace: torch.Tensor
    """uint8, split-KV partial results"""

    @classmethod
    def create(cls, ops: FlashInferOps, stream: DeviceStream, workspace_bytes: int) -> FlashInferDevice:
        """Allocate the workspace, see `float_workspace_bytes`."""
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=stream.device)
        return cls(ops, stream, workspace)


class LevelColumns(NamedTuple):
    """A level's four columns as `plan` takes them: int32, the page indices on the device, the others on the host."""

    qo_indptr: torch.Tensor
    kv_page_indptr: torch.Tensor
    kv_page_indices: torch.Tensor
    kv_last_page_len: torch.Tensor


class LevelBuffers(NamedTuple):
    """The same columns in fixed device memory, which captured kernels read."""

    qo_indptr: torch.Tensor
    kv_page_indptr: torch.Tensor
    kv_page_indices: torch.Tensor
    kv_last_page_len: torch.Tensor


class LevelOutput(NamedTuple):
    """Where a level's result goes; out must be contiguous."""

    out: torch.Tensor
    """[rows, num_qo_heads, head_dim]"""
    lse: torch.Tensor
    """[rows, num_qo_heads], float32, base 2"""

    @classmethod
    def empty(cls, rows: int, spec: AttentionSpec) -> LevelOutput:
        """Uninitialised memory for that many rows."""
        shape = (rows, spec.num_qo_heads)
        out = torch.empty((*shape, spec.head_dim), dtype=spec.dtype, device=spec.device)
        return cls(out, torch.empty(shape, dtype=torch.float32, device=spec.device))

    def first(self, rows: int) -> LevelOutput:
        """The first rows; still contiguous."""
        return LevelOutput(self.out[:rows], self.lse[:rows])


class LevelKernel:
    """A FlashInfer wrapper that serves one level: planned when the level changes, run in every layer.

    With `buffers` it is in CUDA-graph mode: the columns of each plan go to these buffers, the number of segments is
    theirs, and the wrapper owns a slice of plan memory just large enough.
    """

    def __init__(
        self,
        device: FlashInferDevice,
        spec: AttentionSpec,
        page_size: int,
        kernel: KernelName,
        *,
        causal: bool = False,
        buffers: LevelBuffers | None = None,
        split_kv: bool = True,
        window_len: int | None = None,
    ) -> None:
        self._device, self.spec, self._page_size = device, spec, page_size
        self._decodes = kernel.startswith("decode")
        self._options: dict[str, Any] = {
            "sm_scale": spec.sm_scale,
            "window_left": NO_WINDOW if window_len is None else window_len - 1,
            "logits_soft_cap": spec.logits_soft_cap,
            "q_data_type": spec.dtype,
            "kv_data_type": spec.page_dtype,
        }
        if kernel != "decode_cuda_cores":
            self._options["disable_split_kv"] = not split_kv
        if not self._decodes:
            self._options["causal"] = causal
        self._is_fixed = buffers is not None
        self._wrapper = self._decode_wrapper(kernel, buffers) if self._decodes else self._prefill_wrapper(buffers)
        self._planned: Event | None = None

    def plan(self, columns: LevelColumns) -> None:
        """Plan the kernel for these segments. The wrapper's own pinned memory is free again when the last plan's copy
        is done, so that is waited for."""
        if self._planned is not None:
            self._planned.synchronize()
        elif self._is_fixed:
            self._shrink(columns)
        self._wrapper.plan(*self._arguments(columns), **self._options, non_blocking=True)
        self._planned = self._device.stream.record_event()

    def run(
        self, q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], output: LevelOutput, k_scale: float = 1.0
    ) -> None:
        """Attention of q [rows, num_qo_heads, head_dim] to the level's pages of one layer's (K, V), into `output`.

        A level in pages of one token reads the same pool. `k_scale` is folded into the softmax scale, on the host: a
        capture keeps it. V stays as it is stored.
        """
        scales = {} if k_scale == 1.0 else {"k_scale": k_scale}
        if kv[0].shape[1] != self._page_size:
            kv = (kv[0].flatten(0, 1).unsqueeze(1), kv[1].flatten(0, 1).unsqueeze(1))
        self._wrapper.run(q, kv, out=output.out, lse=output.lse, return_lse=True, **scales)

    def _arguments(self, columns: LevelColumns) -> tuple[Any, ...]:
        spec = self.spec
        shape = (spec.num_qo_heads, spec.num_kv_heads, spec.head_dim, self._page_size)
        rows = () if self._decodes else (columns.qo_indptr,)
        return (*rows, columns.kv_page_indptr, columns.kv_page_indices, columns.kv_last_page_len, *shape)

    def _shrink(self, columns: LevelColumns) -> None:
        """Give the wrapper plan memory of its own in place of the 8 MiB that it came with; no plan needs more."""
        float_bytes, int_bytes = self._wrapper.workspace_size(*self._arguments(columns), **self._options)
        if float_bytes > self._device.float_workspace.numel():
            raise CapacityError(
                f"attention that cuts K/V needs a workspace of {float_bytes:,} bytes, "
                f"{self._device.float_workspace.numel():,} are set aside: lower max_num_seqs"
            )
        int_workspace = torch.empty(int_bytes, dtype=torch.uint8, device=self.spec.device)
        self._wrapper.reset_workspace_buffer(self._device.float_workspace, int_workspace)

    def _prefill_wrapper(self, buffers: LevelBuffers | None) -> Any:
        fixed: dict[str, Any] = {}
        if buffers is not None:
            fixed = {
                "use_cuda_graph": True,
                "qo_indptr_buf": buffers.qo_indptr,
                "paged_kv_indptr_buf": buffers.kv_page_indptr,
                "paged_kv_indices_buf": buffers.kv_page_indices,
                "paged_kv_last_page_len_buf": buffers.kv_last_page_len,
            }
        return self._device.ops.BatchPrefillWithPagedKVCacheWrapper(
            self._device.float_workspace, "NHD", backend="fa2", **fixed
        )

    def _decode_wrapper(self, kernel: str, buffers: LevelBuffers | None) -> Any:
        fixed: dict[str, Any] = {}
        if buffers is not None:
            fixed = {
                "use_cuda_graph": True,
                "paged_kv_indptr_buffer": buffers.kv_page_indptr,
                "paged_kv_indices_buffer": buffers.kv_page_indices,
                "paged_kv_last_page_len_buffer": buffers.kv_last_page_len,
            }
        return self._device.ops.BatchDecodeWithPagedKVCacheWrapper(
            self._device.float_workspace,
            "NHD",
            use_tensor_cores=kernel == "decode_tensor_cores",
            backend="fa2",
            **fixed,
        )


class LevelRun(NamedTuple):
    """A planned level, and how many rows from the first on it covers."""

    kernel: LevelKernel
    num_rows: int


def attend_levels(
    device: FlashInferDevice,
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    leaf: LevelKernel,
    shared: Sequence[LevelRun],
    result: LevelOutput,
    partial: LevelOutput | None,
    scale: KVScale,
) -> None:
    """Attend q [rows, num_qo_heads, head_dim] level after level into `result`; `partial` holds a shared level's result.

    V's scale is the same in all levels, so it is multiplied once, behind the last merge.
    """
    leaf.run(q, kv, result, scale.k)
    for level in shared:
        assert partial is not None
        mine = result.first(level.num_rows)
        other = partial.first(level.num_rows)
        level.kernel.run(q[: level.num_rows], kv, other, scale.k)
        device.ops.merge_state_in_place(mine.out, mine.lse, other.out, other.lse)
    if scale.v != 1.0:
        result.out.mul_(scale.v)

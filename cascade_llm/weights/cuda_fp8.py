"""Codes in float8_e4m3 on CUDA, multiplied by torch's scaled product (`_scaled_mm`, cuBLASLt).

Both sides of the product are 8 bits wide: inputs are rounded to float8_e4m3 by the largest of each row, or of each 128
inputs of a row where the weights have scales for those. `WeightOptions.exact_activations` asks for a dense copy.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from cascade_llm.weights.codes import CodeLayout
from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightFormat
from cascade_llm.weights.gpu_parts import code_chunks, first_codes, reason_against_gpu

__all__ = ["CudaFP8"]

CODE, CODE_DTYPE, LARGEST = "float8_e4m3fn", torch.float8_e4m3fn, 448.0
SMALLEST_SCALE = 1e-12
"""Of inputs that are all zero."""
BLOCK_LEN, MULTIPLE = 128, 16
ROWS_TOGETHER = 4
"""Of a product with scales of blocks: cuBLASLt takes a multiple of them."""
ROWS_ARCH, BLOCK_ARCH, LAST_ARCH = (8, 9), 9, 10
"""The least compute capability for scales of rows, the only major one for scales of blocks, and the last major one: on
12.0 cuBLASLt has refused scales of rows (pytorch issue 192707)."""
BLOCK_CUDA = (12, 9)
"""The first cuBLAS with scales of blocks."""


class CudaFP8(WeightFormat):
    """The codes as they come, and a scale for each row, or for each `BLOCK_LEN` inputs of a row."""

    name = "cuda_fp8"

    def __init__(self, spec: MatrixSpec, parts: Mapping[str, StoredTensor]) -> None:
        """Bring the codes of all parts to the device, some rows at a time."""
        self.spec = spec
        device = spec.options.device
        group_len = _group_len(spec, [codes.layout for codes in first_codes(parts)])
        assert group_len is not None, "reasons_against was not asked"
        self._group_len = group_len
        self._codes = torch.empty(spec.out_features, spec.in_features, dtype=CODE_DTYPE, device=device)
        self._scales = torch.empty(spec.in_features // group_len, spec.out_features, device=device)
        """[groups, out_features] float32."""
        for rows, codes in code_chunks(spec, parts):
            codes.check()
            self._codes[rows] = codes.codes.to(device)
            scales = codes.group_scales().t()
            self._scales[:, rows] = scales.repeat_interleave(len(self._scales) // len(scales), dim=0).to(device)

    @staticmethod
    def reasons_against(spec: MatrixSpec, parts: Mapping[str, StoredTensor]) -> list[str]:
        """The device, the dtype, the shape, other codes or groups, a GPU or CUDA without them, or exact inputs."""
        options = spec.options
        if reason := reason_against_gpu(options, parts, ROWS_ARCH):
            return [reason]
        if options.arch is not None and options.arch[0] > LAST_ARCH:
            return [f"its kernel is not known to run on compute capability {options.arch[0]}.x"]
        if options.exact_activations:
            return ["its kernel rounds inputs to 8 bits, and exact_activations is set"]
        if spec.out_features % MULTIPLE or spec.in_features % MULTIPLE:
            return [f"its kernel takes multiples of {MULTIPLE} outputs and inputs"]
        first = first_codes(parts)
        layouts = [codes.layout for codes in first]
        if other := next((layout.code for layout in layouts if layout.code != CODE), None):
            return [f"its kernel takes {CODE}, not {other}"]
        group_len = _group_len(spec, layouts)
        if group_len is None or any(codes.input_order is not None for codes in first):
            return [f"its kernel takes a scale for a row or for {BLOCK_LEN} inputs in order"]
        return _reasons_against_blocks(options.arch) if group_len != spec.in_features else []

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `WeightFormat`."""
        rows = len(x)
        missing = 0 if self._group_len == self.spec.in_features else -rows % ROWS_TOGETHER
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        has_place = out is not None and out.is_contiguous() and not missing
        y = out if out is not None and has_place else x.new_empty(len(x), self.spec.out_features)
        if rows:
            codes, scales = self._rounded(x)
            torch._scaled_mm(codes, self._codes.t(), scales, self._scales, out_dtype=x.dtype, out=y)
        y = y[:rows] if missing else y
        if bias is not None:
            y += bias
        return y if out is None or has_place else out.copy_(y)

    @property
    def num_bytes(self) -> int:
        """See `WeightFormat`."""
        return self._codes.nbytes + self._scales.nbytes

    def describe(self) -> str:
        """The codes, and what is rounded."""
        return f"{CODE} (inputs rounded to 8 bits)"

    def _rounded(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x as codes [rows, in_features] and scales [rows, groups] float32, of which a column lies together."""
        groups = x.reshape(len(x), -1, self._group_len)
        largest = torch.linalg.vector_norm(groups, torch.inf, dim=-1, dtype=torch.float32)
        scales = largest.div_(LARGEST).clamp_min_(SMALLEST_SCALE)
        codes = (groups / scales.unsqueeze(-1)).to(CODE_DTYPE)
        return codes.view(x.shape), scales.t().contiguous().t()


def _group_len(spec: MatrixSpec, layouts: list[CodeLayout]) -> int | None:
    """All inputs where every row has one scale; else `BLOCK_LEN`, where no group of any part is cut by that."""
    lengths = {layout.group_len for layout in layouts}
    if lengths == {spec.in_features}:
        return spec.in_features
    whole = all(length is not None and length % BLOCK_LEN == 0 for length in lengths)
    return BLOCK_LEN if whole and spec.in_features % BLOCK_LEN == 0 else None


def _reasons_against_blocks(arch: tuple[int, int] | None) -> list[str]:
    if arch is not None and arch[0] != BLOCK_ARCH:
        return ["scales of blocks need compute capability {}.x, the GPU has {}.{}".format(BLOCK_ARCH, *arch)]
    cuda = torch.version.cuda
    if cuda is not None and tuple(int(number) for number in cuda.split(".")[:2]) < BLOCK_CUDA:
        return ["scales of blocks need CUDA {}.{}, torch has {}".format(*BLOCK_CUDA, cuda)]
    return []

"""Plain values as they lie in a file, row by row, for matrices of which most are not used in a step.

Formats that lay values out anew multiply a little faster, and read all of a checkpoint to begin with. An expert here is
a view of the mapped file: it is read when a row first meets it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence

import torch

from cascade_llm.device.native_function import NativeFunction
from cascade_llm.device.native_library import native_functions
from cascade_llm.device.native_units import row_major_unit
from cascade_llm.errors import BackendError
from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightFormat
from cascade_llm.weights.native_stack import NativeStack

__all__ = ["RowMajor", "RowMajorStack"]

ELEMENTS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
LEAST_OUTPUTS = 4
"""Of a part."""

_pointer, _long, _int = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class _Part(ctypes.Structure):
    """`part` of the C file."""

    _fields_ = (("data", _pointer), ("num_outputs", _long), ("first_output", _long))


class RowMajor(WeightFormat):
    """The tensors of a matrix's parts: bfloat16, or the products' dtype."""

    name = "row_major"

    def __init__(self, spec: MatrixSpec, parts: Mapping[str, StoredTensor]) -> None:
        """Keeps what is stored so; other values are copied into the products' dtype."""
        self.spec = spec
        self.values = [_rows(spec, parts[name]) for name in spec.parts]
        """[outputs of the part, in_features] of each part."""
        if len({values.dtype for values in self.values}) > 1:
            self.values = [values.to(spec.options.dtype) for values in self.values]
        self._stack: RowMajorStack | None = None

    @staticmethod
    def reasons_against(spec: MatrixSpec, parts: Mapping[str, StoredTensor]) -> list[str]:
        """The device, the dtype, the shape, values that are not plain, or a compiler that is missing."""
        options = spec.options
        if options.on_stream or options.device.type != "cpu":
            return [f"its kernels are for the CPU, the device is {options.device.type}"]
        if options.dtype not in ELEMENTS:
            return [f"its kernels take float32 and bfloat16, not {str(options.dtype).removeprefix('torch.')}"]
        if any(stored.decode is not None for stored in parts.values()):
            return ["the values are not plain"]
        if min(spec.parts.values()) < LEAST_OUTPUTS:
            return [f"{spec.name} has parts of fewer than {LEAST_OUTPUTS} outputs"]
        kernel = _compiled(options.dtype)
        return [kernel] if isinstance(kernel, str) else []

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `WeightFormat`."""
        if self._stack is None:
            self._stack = RowMajorStack([self])
        y = self._stack.multiply(x, torch.tensor([len(x)], dtype=torch.int32), bias=bias)
        return y if out is None else out.copy_(y)

    @property
    def num_bytes(self) -> int:
        """See `WeightFormat`; of a view, what the file has."""
        return sum(values.nbytes for values in self.values)

    def describe(self) -> str:
        """See `WeightFormat`."""
        return f"{ELEMENTS[self.values[0].dtype]}, as they lie"


class RowMajorStack(NativeStack):
    """Matrices of one spec and one dtype, multiplied in one call."""

    def __init__(self, matrices: Sequence[RowMajor]) -> None:
        """`matrices`: such as `holds` says yes to."""
        spec = matrices[0].spec
        starts = [spec.rows_of(name).start for name in spec.parts]
        parts = [
            _Part(values.data_ptr(), len(values), start)
            for matrix in matrices
            for values, start in zip(matrix.values, starts, strict=True)
        ]
        kernel = _compiled(spec.options.dtype)
        assert not isinstance(kernel, str), kernel
        is_narrow = matrices[0].values[0].dtype == torch.bfloat16
        super().__init__(spec, matrices, (_Part * len(parts))(*parts), kernel, (is_narrow,))

    @staticmethod
    def holds(matrices: Sequence[WeightFormat]) -> bool:
        """Whether all are row-major, and of one dtype."""
        dtypes = {matrix.values[0].dtype if isinstance(matrix, RowMajor) else None for matrix in matrices}
        return None not in dtypes and len(dtypes) == 1


def _rows(spec: MatrixSpec, stored: StoredTensor) -> torch.Tensor:
    dtype = stored.data.dtype if stored.data.dtype == torch.bfloat16 else spec.options.dtype
    return stored.data.to(dtype).contiguous()


@functools.cache
def _compiled(dtype: torch.dtype) -> NativeFunction | str:
    """The kernel, or the reason why there is none."""
    try:
        kernel = native_functions(row_major_unit(ELEMENTS[dtype]))["row_major_product"]
    except BackendError as error:
        return str(error)
    kernel.declare(*[_pointer] * 3, _long, _pointer, _long, *[_pointer] * 2, *[_long] * 2, *[_int] * 2, returns=_int)
    return kernel

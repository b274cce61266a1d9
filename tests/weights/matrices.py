"""Matrices of random values in any format, and what they are compared with."""

from __future__ import annotations

import torch

from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightFormat, WeightOptions
from cascade_llm.weights.select import FORMATS

CPU = torch.device("cpu")
PLAIN = [name for name, entry in FORMATS.items() if not entry.changes_values]


def matrix_spec(
    inputs: int,
    outputs: int | dict[str, int],
    dtype: torch.dtype,
    *,
    quantization: str | None = None,
    stored_dtype: torch.dtype | None = None,
) -> MatrixSpec:
    """A matrix of one part, or of several named ones."""
    parts = outputs if isinstance(outputs, dict) else {"all": outputs}
    options = WeightOptions(dtype=dtype, device=CPU, quantization=quantization, stored_dtype=stored_dtype)
    return MatrixSpec("matrix", inputs, parts, options)


def filled(matrix: WeightFormat, values: torch.Tensor) -> WeightFormat:
    """A matrix of one part with its values, packed."""
    matrix.load("all", StoredTensor.plain(values))
    matrix.pack()
    return matrix


def matrix_in(spec: MatrixSpec, format_name: str) -> WeightFormat:
    """Allocated in a format of the table, whatever is preferred."""
    return FORMATS[format_name].allocate(spec, None)

"""Matrices of random values in any format, and what they are compared with."""

from __future__ import annotations

import torch

from cascade_llm.weights.codes import FLOAT_CODES, INTEGER_BITS, SUPER_LEN, CodeLayout, Codes
from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightFormat, WeightOptions
from cascade_llm.weights.select import FORMATS

CPU = torch.device("cpu")


def matrix_spec(
    inputs: int,
    outputs: int | dict[str, int],
    dtype: torch.dtype,
    *,
    quantization: str | None = None,
    exact_activations: bool = False,
) -> MatrixSpec:
    """A matrix of one part, or of several named ones."""
    parts = outputs if isinstance(outputs, dict) else {"all": outputs}
    options = WeightOptions(dtype=dtype, device=CPU, quantization=quantization, exact_activations=exact_activations)
    return MatrixSpec("matrix", inputs, parts, options)


def plain(**parts: torch.Tensor) -> dict[str, StoredTensor]:
    """Parts of plain values."""
    return {name: StoredTensor.plain(values) for name, values in parts.items()}


def matrix_in(spec: MatrixSpec, format_name: str, values: torch.Tensor) -> WeightFormat:
    """A matrix of one part in a format of the table, whatever is preferred."""
    return FORMATS[format_name].build(spec, plain(all=values))


def stored_codes(codes: Codes) -> StoredTensor:
    """A checkpoint's tensor that holds these codes."""

    def some(rows: torch.Tensor) -> Codes:
        numbers = (codes.codes, codes.scales, codes.minima, codes.sub_scales, codes.sub_minima)
        return Codes(codes.layout, *(None if n is None else n[rows] for n in numbers), codes.input_order)

    shape = tuple(codes.codes.shape)
    return StoredTensor("codes", shape, torch.arange(shape[0]), lambda rows: some(rows).dequantized(), some)


def random_codes(layout: CodeLayout, rows: int, inputs: int, generator: torch.Generator) -> Codes:
    """Any codes, with scales of about 0.1 and minima that they make about symmetric."""

    def uniform(*shape: int) -> torch.Tensor:
        numbers = torch.rand(*shape, generator=generator)
        return numbers if layout.scale == "float32" else numbers.half().float()

    if layout.code in INTEGER_BITS:
        codes = torch.randint(0, 2**layout.bits, (rows, inputs), dtype=torch.uint8, generator=generator)
    else:
        dtype = FLOAT_CODES.get(layout.code, torch.float32)
        codes = torch.randn(rows, inputs, generator=generator).to(dtype)
    if layout.group_len is None:
        return Codes(layout, codes)
    groups = inputs // layout.group_len
    if layout.scale != "sub":
        scales = uniform(rows, groups) / 8
        return Codes(layout, codes, scales, -uniform(rows, groups) if layout.has_minimum else None)
    supers = inputs // SUPER_LEN
    scales = (uniform(rows, supers) / 512).half()
    sub_scales = torch.randint(0, 64, (rows, groups), dtype=torch.int8, generator=generator)
    if not layout.has_minimum:
        return Codes(layout, codes, scales, None, sub_scales - 32)
    sub_minima = torch.randint(0, 64, (rows, groups), dtype=torch.int8, generator=generator)
    return Codes(layout, codes, scales, -(uniform(rows, supers) / 64).half(), sub_scales, sub_minima)

"""What the formats for a GPU share: what speaks against all of them, and the codes of a matrix, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from cascade_llm.weights.codes import ROWS_TOGETHER, Codes
from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightOptions

__all__ = ["code_chunks", "first_codes", "reason_against_gpu"]

CHUNK_LEN = 1 << 22
"""Weights that stand as codes on the host at a time."""


def reason_against_gpu(
    options: WeightOptions, parts: Mapping[str, StoredTensor], least_arch: tuple[int, int]
) -> str | None:
    """The device, its architecture, the dtype, or parts that are no codes; None where nothing speaks against it."""
    if options.arch is None:
        return f"its kernel is for CUDA, the device is {options.device.type}"
    if options.arch < least_arch:
        return "its kernel needs compute capability {}.{}, ".format(*least_arch) + "the GPU has {}.{}".format(
            *options.arch
        )
    if options.dtype != torch.bfloat16:
        return f"its kernel gives bfloat16, not {str(options.dtype).removeprefix('torch.')}"
    for stored in parts.values():
        if stored.codes is None:
            return "the values are plain" if stored.decode is None else f"{stored.format} is not read as codes"
    return None


def first_codes(parts: Mapping[str, StoredTensor]) -> list[Codes]:
    """The first row of each part: its layout and the order of its inputs are those of all rows."""
    return [_codes(stored, slice(0, 1)) for stored in parts.values()]


def code_chunks(spec: MatrixSpec, parts: Mapping[str, StoredTensor]) -> Iterator[tuple[slice, Codes]]:
    """All codes, on the host, with the rows of the matrix that they are; only the last chunk of a part is short."""
    step = max(1, CHUNK_LEN // spec.in_features // ROWS_TOGETHER) * ROWS_TOGETHER
    for name, stored in parts.items():
        start = spec.rows_of(name).start
        for row in range(0, stored.shape[0], step):
            codes = _codes(stored, slice(row, row + step))
            yield slice(start + row, start + row + len(codes.codes)), codes


def _codes(stored: StoredTensor, rows: slice) -> Codes:
    assert stored.codes is not None, f"{stored.format} is not read as codes"
    return stored.codes(stored.data[rows].cpu())  # dummy values are made on the device

"""The one door to weight formats: which one holds a matrix, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from cascade_llm.weights.blocked import Blocked
from cascade_llm.weights.cuda_fp8 import CudaFP8
from cascade_llm.weights.cuda_int4 import CudaInt4
from cascade_llm.weights.dense import Dense, dense_values
from cascade_llm.weights.format import MatrixSpec, Refusal, StoredTensor, WeightFormat
from cascade_llm.weights.onednn import OneDNN
from cascade_llm.weights.packed import Packed
from cascade_llm.weights.packed_stack import PackedStack
from cascade_llm.weights.quantize import quantized
from cascade_llm.weights.row_major import RowMajor, RowMajorStack
from cascade_llm.weights.stack import MatrixStack, OneByOne

__all__ = [
    "FORMATS",
    "Entry",
    "FormatChoice",
    "build_embedding",
    "build_expert",
    "build_matrix",
    "build_tied_matrix",
    "describe_weights",
    "join_experts",
    "select_format",
]

Parts = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Entry:
    """A format of the table."""

    reasons_against: Callable[[MatrixSpec, Parts], list[str]]
    """Why the format cannot hold the matrix that these parts make, or should not; empty where it can."""
    build: Callable[[MatrixSpec, Parts], WeightFormat]


def _reasons_against_packed(spec: MatrixSpec, parts: Parts) -> list[str]:
    """Packed serves what is stored in few bits, and plain values where the processor has no bfloat16 product."""
    if reasons := Packed.reasons_against(spec, parts):
        return reasons
    if all(stored.codes is None for stored in parts.values()) and spec.options.dtype == torch.bfloat16:
        return ["the values are plain"]
    return []


def _values_to_copy(spec: MatrixSpec, parts: Parts) -> torch.Tensor:
    """The values of all parts, in new memory only where they lie otherwise."""
    first, *others = parts.values()
    if others or first.decode is not None or first.data.dtype != spec.options.dtype:
        return dense_values(spec, parts)
    return first.data.to(spec.options.device).contiguous()


FORMATS: Mapping[str, Entry] = {
    "packed": Entry(_reasons_against_packed, Packed),
    "cuda_int4": Entry(CudaInt4.reasons_against, CudaInt4),
    "cuda_fp8": Entry(CudaFP8.reasons_against, CudaFP8),
    "blocked": Entry(
        lambda spec, _: Blocked.reasons_against(spec), lambda spec, parts: Blocked(_values_to_copy(spec, parts))
    ),
    "onednn": Entry(
        lambda spec, _: OneDNN.reasons_against(spec), lambda spec, parts: OneDNN(_values_to_copy(spec, parts))
    ),
    "dense": Entry(lambda spec, parts: [], lambda spec, parts: Dense(dense_values(spec, parts))),
}
"""By preference."""


@dataclass(frozen=True)
class FormatChoice:
    """The format that holds a matrix, and what speaks against those that were preferred to it."""

    name: str
    refused: tuple[Refusal, ...]

    def describe(self) -> str:
        """One line for the log."""
        return f"weights: {self.name}" + _told(self.refused)


def select_format(spec: MatrixSpec, parts: Parts) -> FormatChoice:
    """The first format of the table that nothing speaks against."""
    refused: list[Refusal] = []
    for name, entry in FORMATS.items():
        reasons = entry.reasons_against(spec, parts)
        if not reasons:
            return FormatChoice(name, tuple(refused))
        refused.extend((name, reason) for reason in reasons)
    raise AssertionError("dense holds every matrix")


def describe_weights(matrices: Iterable[WeightFormat | MatrixStack]) -> str:
    """One line for the log: how many matrices are in which format, how they multiply, and why in no preferred one."""
    kinds = Counter(matrix.describe() + _told(matrix.refused) for matrix in matrices)
    return "weights: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def _told(refused: Iterable[Refusal]) -> str:
    """Formats by what speaks against them, in brackets; nothing where there are none."""
    names: dict[str, list[str]] = {}
    for name, reason in refused:
        names.setdefault(reason, []).append(name)
    reasons = "; ".join(f"not {' nor '.join(refused_for)}: {reason}" for reason, refused_for in names.items())
    return f" ({reasons})" if reasons else ""


def build_matrix(spec: MatrixSpec, parts: Parts) -> WeightFormat:
    """The matrix of these parts in its format; plain parts are rounded first where `quantization` says so."""
    parts = _rounded(spec, parts)
    return _built(select_format(spec, parts), spec, parts)


def _built(choice: FormatChoice, spec: MatrixSpec, parts: Parts) -> WeightFormat:
    matrix = FORMATS[choice.name].build(spec, parts)
    matrix.refused = choice.refused
    return matrix


def _rounded(spec: MatrixSpec, parts: Parts) -> Parts:
    """The parts, plain ones rounded where `quantization` says so."""
    method = spec.options.quantization
    return parts if method is None else {name: quantized(method, stored) for name, stored in parts.items()}


def build_expert(spec: MatrixSpec, parts: Parts) -> WeightFormat:
    """As `build_matrix`, of one matrix of a stack: plain values stay where they lie, since few experts meet a row."""
    parts = _rounded(spec, parts)
    if not RowMajor.reasons_against(spec, parts):
        return RowMajor(spec, parts)
    return _built(select_format(spec, parts), spec, parts)


def join_experts(spec: MatrixSpec, matrices: list[WeightFormat]) -> MatrixStack:
    """A stack of matrices of one spec that `build_expert` built."""
    if PackedStack.holds(matrices):
        return PackedStack([matrix for matrix in matrices if isinstance(matrix, Packed)])
    if RowMajorStack.holds(matrices):
        return RowMajorStack([matrix for matrix in matrices if isinstance(matrix, RowMajor)])
    return OneByOne(matrices, spec.out_features)


def build_embedding(spec: MatrixSpec, stored: StoredTensor) -> Packed | Dense:
    """A matrix of one part whose rows are looked up: in few bits where it is stored so, else dense."""
    (part,) = spec.parts
    method = spec.options.quantization
    parts = {part: stored if method is None else quantized(method, stored)}
    if not FORMATS[Packed.name].reasons_against(spec, parts):
        return Packed(spec, parts)
    return Dense(dense_values(spec, parts))


def build_tied_matrix(spec: MatrixSpec, embedding: Packed | Dense) -> WeightFormat:
    """The matrix whose values are an embedding's: the very same, or a copy in the form that multiplies fastest."""
    if isinstance(embedding, Packed):
        return embedding
    (part,) = spec.parts
    parts = {part: StoredTensor.plain(embedding.values)}
    choice = select_format(spec, parts)
    if choice.name != Dense.name:
        return _built(choice, spec, parts)
    embedding.refused = choice.refused
    return embedding

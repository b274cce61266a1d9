"""Products of quantized matrices: right against what the codes stand for, and how fast beside a dense copy.

Matrices stand as often as fills the last-level cache several times, as the layers of a model do, and a graph multiplies
by all of them; what is compared is what its replay left.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch

from cascade_llm.weights.codes import FLOAT_CODES, CodeLayout, Codes
from cascade_llm.weights.dense import Dense
from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightFormat, WeightOptions
from cascade_llm.weights.select import build_matrix, select_format
from scripts.gpu_suite.machine import Machine
from scripts.gpu_suite.stage import StageRun

__all__ = ["run"]

ALL_INPUTS = 0
FP8 = "float8_e4m3fn"
KINDS = {
    "4 bits, groups of 32": CodeLayout("u4", zero=8, group_len=32, has_minimum=True),
    "4 bits, groups of 128": CodeLayout("u4", group_len=128, scale="float32", has_minimum=True),
    "float8, a scale for a row": CodeLayout(FP8, group_len=ALL_INPUTS, scale="float32"),
    "float8, blocks of 128": CodeLayout(FP8, group_len=128, scale="float32"),
}
TOLERANCES = {"cuda_int4": 0.05, "cuda_fp8": 0.25}
"""Of the worst output's error, as a share of the mean output; float8 rounds the inputs, a scale misplaced gives 1."""
CACHES = 3


def run(stage: StageRun) -> dict[str, Any]:
    """See the module."""
    results: list[dict[str, Any]] = []
    torch.manual_seed(0)
    with torch.inference_mode():
        for shape in stage.sizes.matrices:
            for name, layout in KINDS.items():
                results.append({"kind": name, "shape": list(shape), **_measured(stage, layout, shape)})
                stage.save(_told(results))
    return _told(results)


def _measured(stage: StageRun, layout: CodeLayout, shape: tuple[int, int]) -> dict[str, Any]:
    """A kind that raises is a result, and the next one comes."""
    if not stage.has_time():
        return {"skipped": "out of time"}
    codes = _codes(replace(layout, group_len=layout.group_len or shape[1]), *shape)
    machine = stage.machine
    spec = MatrixSpec("matrix", shape[1], {"all": shape[0]}, _options(machine))
    parts = {"all": _stored(codes)}
    choice = select_format(spec, parts)
    if choice.name == Dense.name:
        return {"skipped": choice.describe()}
    entry: dict[str, Any] = {"format": choice.name}
    try:
        matrix = build_matrix(spec, parts)
        entry["bits"] = 8 * matrix.num_bytes / math.prod(shape)
        values = codes.dequantized().to(machine.device)
        entry["rows"] = [_compared(machine, matrix, values, rows) for rows in stage.sizes.product_rows]
    except Exception as error:
        entry["refused"] = f"{type(error).__name__}: {error}"[:500]
    return entry


def _compared(machine: Machine, matrix: WeightFormat, values: torch.Tensor, rows: int) -> dict[str, Any]:
    x = torch.randn(rows, values.shape[1], device=machine.device).to(machine.dtype)
    expected = x.double() @ values.double().T
    seconds, found = _timed(machine, matrix, x, len(values))
    dense_s, _ = _timed(machine, Dense(values.to(machine.dtype)), x, len(values))
    off = (found.double() - expected).norm(dim=0).max() / expected.norm(dim=0).mean()
    return {
        "rows": rows,
        "error": float(off),
        "us": 1e6 * seconds,
        "dense_us": 1e6 * dense_s,
        "floor_us": 1e6 * matrix.num_bytes / machine.card.copy_bytes_per_s,
    }


def _timed(machine: Machine, matrix: WeightFormat, x: torch.Tensor, outputs: int) -> tuple[float, torch.Tensor]:
    """Of one product with a matrix that is in no cache, and what the last one wrote."""
    count = 1 + CACHES * machine.card.l2_bytes // matrix.num_bytes
    matrices = [matrix, *(copy.deepcopy(matrix) for _ in range(count - 1))]
    out = torch.full((len(x), outputs), torch.nan, dtype=x.dtype, device=x.device)

    def work() -> None:
        for one in matrices:
            one.multiply(x, out=out)

    return machine.seconds(work) / count, out


def _options(machine: Machine) -> WeightOptions:
    return WeightOptions(dtype=machine.dtype, device=machine.device, on_stream=True, arch=machine.arch)


def _codes(layout: CodeLayout, outputs: int, inputs: int) -> Codes:
    """Any, whose weights lie about zero."""
    assert layout.group_len is not None
    scales = (torch.rand(outputs, inputs // layout.group_len) / 64).half().float()
    if layout.code in FLOAT_CODES:
        return Codes(layout, torch.randn(outputs, inputs).to(FLOAT_CODES[layout.code]), scales)
    codes = torch.randint(0, 1 << layout.bits, (outputs, inputs), dtype=torch.uint8)
    minima = scales * (layout.zero - 7.5) + torch.randn_like(scales) / 64
    return Codes(layout, codes, scales, minima)


def _stored(codes: Codes) -> StoredTensor:
    """As a checkpoint holds them: rows are cut out by their numbers."""

    def some(numbers: torch.Tensor) -> Codes:
        minima = None if codes.minima is None else codes.minima[numbers]
        assert codes.scales is not None
        return Codes(codes.layout, codes.codes[numbers], codes.scales[numbers], minima)

    shape = tuple(codes.codes.shape)
    return StoredTensor("codes", shape, torch.arange(shape[0]), lambda numbers: some(numbers).dequantized(), some)


def _told(results: list[dict[str, Any]]) -> dict[str, Any]:
    wrong, speedups = [], {}
    for entry in results:
        name = f"{entry['kind']}, {entry['shape'][0]} x {entry['shape'][1]}"
        compared = entry.get("rows", [])
        tolerance = TOLERANCES.get(entry.get("format", ""), 0.0)
        if "refused" in entry or not all(found["error"] <= tolerance for found in compared):
            wrong.append(name)
        speedups[name] = {found["rows"]: round(found["dense_us"] / found["us"], 2) for found in compared}
    verdict = "failed" if wrong else "passed" if any("rows" in entry for entry in results) else "not run"
    return {"verdict": verdict, "headline": {"wrong": wrong, "times_as_fast_as_dense": speedups}, "products": results}

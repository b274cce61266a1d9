"""bitsandbytes, as transformers saves it: tables of 16 numbers (NF4, FP4), or integers of 8 bits (LLM.int8).

    4 bits   weight, the matrix [out, in] as one run of bytes, each two neighbouring weights, the upper half first;
             weight.absmax [blocks] float32, the scales of blocks of that run; weight.quant_map [16] float32, the table;
             weight.quant_state.bitsandbytes__nf4 uint8, a JSON object
    nested   weight.absmax [blocks] uint8, places in weight.nested_quant_map [256]; weight.nested_absmax, the scales of
             blocks of those, and in the object an offset
    8 bits   weight [out, in] int8, SCB [out] float32, each row's largest weight, weight_format, 0

A block that ends within a row, or has rows of its own, becomes groups of inputs that divide both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from reprlib import repr as short_repr
from typing import Any

import torch

from cascade_llm.errors import CheckpointError
from cascade_llm.loader.quantized.format import MatrixFormat, is_listed, names_of, unsupported, words_of
from cascade_llm.loader.quantized.grid import Grid, integer_grid, unpaired
from cascade_llm.loader.quantized.parts import MatrixParts
from cascade_llm.weights.codes import CodeLayout

__all__ = ["FourBits", "LLMInt8", "bits_and_bytes"]

METHOD = "bitsandbytes"
KINDS = ("nf4", "fp4")
BLOCK_LENS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TABLE_LEN, NESTED_TABLE_LEN = 16, 256
ABSMAX, TABLE, STATE = "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__"
NESTED_ABSMAX, NESTED_TABLE = "weight.nested_absmax", "weight.nested_quant_map"
FLOAT32, BYTES = (torch.float32,), (torch.uint8,)
CONTAINERS = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32)
"""Dtypes whose bytes may hold the codes (`bnb_4bit_quant_storage`)."""
PER_LARGEST = 1 / 127
MAX_TOLD = 100
"""Characters of what is wrong with a description."""


def bits_and_bytes(config: Mapping[str, Any]) -> MatrixFormat:
    """The format that a configuration of this method asks for."""
    if config.get("load_in_8bit") is True:
        return LLMInt8(config)
    if config.get("load_in_4bit") is True:
        return FourBits(config)
    raise CheckpointError(
        "config.json: quantization_config: neither load_in_4bit nor load_in_8bit is true; use the config.json that was "
        "saved with these weights"
    )


@dataclass(frozen=True)
class State:
    """What the JSON object of a matrix says."""

    shape: tuple[int, int]
    block_len: int
    """Weights that share a scale."""
    nested_len: int
    """Scales that share one, where they are nested."""
    offset: float
    """Added to nested scales."""


class FourBits(MatrixFormat):
    """Codes of 4 bits; see the module."""

    method = METHOD
    markers = (ABSMAX, *(STATE + kind for kind in KINDS))
    suffixes = ("weight", TABLE, NESTED_ABSMAX, NESTED_TABLE, *markers)
    coded_types = ("U8",)

    def __init__(self, config: Mapping[str, Any]) -> None:
        """See `QuantizedFormat`."""
        self._kind = config.get("bnb_4bit_quant_type") or "fp4"
        if self._kind not in KINDS:
            raise unsupported(f"bnb_4bit_quant_type={short_repr(self._kind)}", f"choose one of {', '.join(KINDS)}")
        self._ignored = names_of(config, "llm_int8_skip_modules")

    def is_ignored(self, name: str) -> bool:
        """See `QuantizedFormat`."""
        return is_listed(name, self._ignored)

    def kind(self, parts: MatrixParts) -> str:
        """See `MatrixFormat`."""
        return f"{self.method} {self._kind}"

    def grid(self, parts: MatrixParts) -> Grid:
        """See `QuantizedFormat`."""
        state = self._state(parts)
        (out, inputs), block_len = state.shape, state.block_len
        stored = parts.tensor("weight", CONTAINERS)
        if inputs % 2 or stored.nbytes != out * inputs // 2:
            raise parts.error("weight", f"has {stored.nbytes} bytes, which are not 4 bits of each of {[out, inputs]}")
        largest = _largest(parts, state, -(-out * inputs // block_len))
        table = parts.tensor(TABLE, FLOAT32, (TABLE_LEN,))
        if not (table.abs() <= 1).all():
            raise parts.error(TABLE, "has values that are not between -1 and 1")
        unit = gcd(inputs, block_len)
        first = torch.arange(out).unsqueeze(1) * inputs + torch.arange(0, inputs, unit)
        layout = CodeLayout("u4", 0, unit, "float32", values=tuple(table.tolist()))
        return Grid(state.shape, layout, largest[first // block_len])

    def codes(self, parts: MatrixParts, rows: slice, inputs: slice) -> torch.Tensor:
        """See `MatrixFormat`."""
        stored = parts.tensor("weight", CONTAINERS).flatten().view(torch.uint8)
        pairs, own = words_of(inputs, 2)
        some = stored.view(self._state(parts).shape[0], -1)[rows, pairs]
        return unpaired(some << 4 | some >> 4)[:, own]

    def _state(self, parts: MatrixParts) -> State:
        suffix = STATE + self._kind
        if suffix not in parts and any(STATE + kind in parts for kind in KINDS):
            raise CheckpointError(
                f"config.json: quantization_config: bnb_4bit_quant_type is {self._kind}, but {parts.name} is stored in "
                "another; use the config.json that was saved with these weights"
            )
        try:
            fields = json.loads(bytes(parts.tensor(suffix, BYTES).flatten().tolist()))
            return _checked_state(fields, self._kind, _is_nested(parts))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise parts.error(suffix, f"holds no description of a matrix ({str(error)[:MAX_TOLD]})") from error


class LLMInt8(MatrixFormat):
    """Codes of 8 bits; see the module."""

    method = METHOD
    markers = ("SCB",)
    suffixes = ("weight", "SCB", "weight_format")
    coded_types = ("I8",)

    def __init__(self, config: Mapping[str, Any]) -> None:
        """See `QuantizedFormat`."""
        self._ignored = names_of(config, "llm_int8_skip_modules")

    def is_ignored(self, name: str) -> bool:
        """See `QuantizedFormat`."""
        return is_listed(name, self._ignored)

    def kind(self, parts: MatrixParts) -> str:
        """See `MatrixFormat`."""
        return f"{self.method} int8"

    def grid(self, parts: MatrixParts) -> Grid:
        """See `QuantizedFormat`."""
        shape = parts.matrix("weight", (torch.int8,))
        if "weight_format" in parts and (parts.tensor("weight_format", BYTES) != 0).any():
            raise parts.error("weight_format", "is not 0: an order of a GPU's tiles is not read")
        largest = parts.scales_or_zeros("SCB", FLOAT32, shape[:1])
        return integer_grid(shape, 8, shape[1], largest.unsqueeze(1) * PER_LARGEST, None)

    def codes(self, parts: MatrixParts, rows: slice, inputs: slice) -> torch.Tensor:
        """See `MatrixFormat`."""
        return parts.tensor("weight", (torch.int8,))[rows, inputs].view(torch.uint8) ^ 128


def _checked_state(fields: Mapping[str, Any], kind: str, is_nested: bool) -> State:
    """Raises `ValueError`, `TypeError` or `KeyError` where the fields make no sense."""
    nested = (fields["nested_blocksize"], float(fields["nested_offset"])) if is_nested else (1, 0.0)
    state = State(tuple(fields["shape"]), fields["blocksize"], *nested)
    if fields["quant_type"] != kind or state.block_len not in BLOCK_LENS:
        raise ValueError(f"quant_type is {short_repr(fields['quant_type'])}, blocksize {short_repr(state.block_len)}")
    numbers = (*state.shape, state.nested_len)
    if len(state.shape) != 2 or not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError(f"shape {state.shape}, nested_blocksize {state.nested_len}")
    if not math.isfinite(state.offset):
        raise ValueError(f"nested_offset {state.offset}")
    return state


def _is_nested(parts: MatrixParts) -> bool:
    return NESTED_ABSMAX in parts or NESTED_TABLE in parts


def _largest(parts: MatrixParts, state: State, num_blocks: int) -> torch.Tensor:
    """The largest weight of each block, float32 [blocks]."""
    why = f": blocks have {state.block_len} weights"
    if not _is_nested(parts):
        return parts.scales_or_zeros(ABSMAX, FLOAT32, (num_blocks,), why)
    places = parts.tensor(ABSMAX, BYTES, (num_blocks,), why).long()
    scales = parts.scales_or_zeros(NESTED_ABSMAX, FLOAT32, (-(-num_blocks // state.nested_len),))
    table = parts.tensor(NESTED_TABLE, FLOAT32, (NESTED_TABLE_LEN,))
    if not table.isfinite().all():
        raise parts.error(NESTED_TABLE, "has values that are not finite")
    return table[places] * scales[torch.arange(num_blocks) // state.nested_len] + state.offset

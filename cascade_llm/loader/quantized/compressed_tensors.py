"""compressed-tensors: groups of layers, each with the kind of its weights, as vLLM's tools save them.

    pack-quantized    weight_packed [out, in * bits / 32] int32, weight_scale [out, groups], weight_shape [2],
                      weight_zero_point [out * bits / 32, groups] int32, weight_g_idx [in] int32
    int-quantized     weight [out, in] int8, weight_scale, weight_zero_point int8
    float-quantized   weight [out, in] float8_e4m3fn, weight_scale, for a channel, a block or all
    nvfp4-pack-quantized, mxfp4-pack-quantized
                      weight_packed [out, in / 2] uint8, weight_scale, see `e2m1`; NVFP4 has a weight_global_scale [1]
                      float32, which its scales are divided by

Integers are signed there; they are read as unsigned ones, zero points with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as short_repr
from typing import Any

import torch

from cascade_llm.errors import CheckpointError
from cascade_llm.loader.quantized.e2m1 import e2m1_codes, mxfp4_grid, nvfp4_grid
from cascade_llm.loader.quantized.format import MatrixFormat, names_of, number_of, unpacked_words, unsupported, words_of
from cascade_llm.loader.quantized.fp8 import DTYPE, block_scales, block_shape, float_grid
from cascade_llm.loader.quantized.gptq import grouped
from cascade_llm.loader.quantized.grid import Grid, groups_of, integer_grid
from cascade_llm.loader.quantized.parts import SCALE_DTYPES, MatrixParts

__all__ = ["CompressedTensors"]

NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
E2M1_GROUPS = {NVFP4: ("tensor_group", 16), MXFP4: ("group", 32)}
"""Formats of floats of 4 bits: the strategy, and the inputs of a group."""
KINDS = {
    "pack-quantized": "int",
    "int-quantized": "int",
    "float-quantized": "float",
    "naive-quantized": None,
    **dict.fromkeys(E2M1_GROUPS, "float"),
}
"""Formats that are read, and the type of number that is in them."""
INSTEAD = f"choose a checkpoint in {', '.join(KINDS)}"
STRATEGIES = ("tensor", "channel", "group", "block")


@dataclass(frozen=True)
class Scheme:
    """How the weights of one group of layers are stored."""

    stored_as: str
    """A key of `KINDS`."""
    is_float: bool
    bits: int
    is_symmetric: bool
    strategy: str
    group_len: int
    """Of "group"."""
    block: tuple[int, int]
    """Of "block"."""

    @property
    def is_packed(self) -> bool:
        """Whether integers lie in words."""
        return self.stored_as == "pack-quantized"

    def scale_block(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        blocks = {"tensor": shape, "channel": (1, shape[1]), "group": (1, self.group_len), "block": self.block}
        return blocks[self.strategy]


class CompressedTensors(MatrixFormat):
    """See the module."""

    method = "compressed-tensors"
    markers = ("weight_packed", "weight_scale")
    suffixes = (
        *("weight_packed", "weight", "weight_scale", "weight_global_scale"),
        *("weight_zero_point", "weight_shape", "weight_g_idx"),
    )
    unread = ("input_scale", "input_global_scale", "input_zero_point", "output_scale", "output_zero_point")
    coded_types = ("I8", "F8_E4M3", "F8_E5M2")

    def __init__(self, config: Mapping[str, Any]) -> None:
        """See `QuantizedFormat`."""
        sparsity = config.get("sparsity_config") or {}
        if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
            raise unsupported(f"sparsity_config ({sparsity['format']})", "choose a checkpoint that is not sparse")
        transforms = config.get("transform_config") or {}
        if isinstance(transforms, Mapping) and transforms.get("config_groups"):
            raise unsupported("transform_config", "choose a checkpoint without rotations")
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups.values()):
            raise CheckpointError("config.json: quantization_config: config_groups must be an object of objects")
        self._groups = [
            (names_of(group, "targets"), _scheme(group, group.get("format") or config.get("format")))
            for group in groups.values()
        ]
        self.input_bits = min((bits for group in groups.values() if (bits := _input_bits(group))), default=None)
        self._ignored = names_of(config, "ignore")
        for entry in (*self._ignored, *(target for targets, _ in self._groups for target in targets)):
            _check_pattern(entry)

    def is_ignored(self, name: str) -> bool:
        """See `QuantizedFormat`."""
        return any(_matches(name, entry) for entry in self._ignored)

    def kind(self, parts: MatrixParts) -> str:
        """See `MatrixFormat`."""
        return self._scheme_of(parts).stored_as

    def grid(self, parts: MatrixParts) -> Grid:
        """See `QuantizedFormat`."""
        scheme = self._scheme_of(parts)
        if scheme.is_float and "weight_g_idx" in parts:
            raise parts.error("weight_g_idx", f"orders the inputs of {scheme.stored_as}, where nobody reads an order")
        if scheme.stored_as == NVFP4:
            factor = 1 / parts.number("weight_global_scale").double()
            return nvfp4_grid(parts, "weight_packed", "weight_scale", factor, "weight_global_scale")
        if scheme.stored_as == MXFP4:
            return mxfp4_grid(parts, "weight_packed", "weight_scale")
        shape = _shape(parts, scheme)
        block = scheme.scale_block(shape)
        if scheme.is_float:
            return float_grid(parts, "weight_scale", shape, block)
        rows, scales = block_scales(parts, "weight_scale", shape, block)
        zeros = None if scheme.is_symmetric else _zeros(parts, scheme, shape, scales.shape)
        unit, groups = groups_of(shape[1], min(block[1], shape[1]))
        order = None
        if "weight_g_idx" in parts:
            found = parts.tensor("weight_g_idx", (torch.int32, torch.int64), shape[1:]).long()
            if not (found == -1).all():
                unit, order, groups = grouped(parts, "weight_g_idx", found, unit, groups, scales.shape[1])
        spread = None if zeros is None else zeros[rows][:, groups]
        return integer_grid(shape, scheme.bits, unit, scales[rows][:, groups], spread, order)

    def codes(self, parts: MatrixParts, rows: slice, inputs: slice) -> torch.Tensor:
        """See `MatrixFormat`."""
        scheme = self._scheme_of(parts)
        if scheme.stored_as in E2M1_GROUPS:
            return e2m1_codes(parts, "weight_packed", rows, inputs)
        if scheme.is_packed:
            words, own = words_of(inputs, 32 // scheme.bits)
            return unpacked_words(parts.tensor("weight_packed", (torch.int32,))[rows, words], scheme.bits)[:, own]
        stored = parts.tensor("weight", (DTYPE if scheme.is_float else torch.int8,))[rows, inputs]
        return stored if scheme.is_float else stored.view(torch.uint8) ^ 128

    def _scheme_of(self, parts: MatrixParts) -> Scheme:
        for targets, scheme in self._groups:
            if any(_matches(parts.name, target) for target in targets):
                return scheme
        for targets, scheme in self._groups:
            if "Linear" in targets:
                return scheme
        raise CheckpointError(
            f"config.json: quantization_config: no group of config_groups has the target {parts.name}, which is "
            "quantized; use the config.json that was saved with these weights"
        )


def _scheme(group: Mapping[str, Any], stored_as: object) -> Scheme:
    if not isinstance(stored_as, str) or stored_as not in KINDS:
        raise unsupported(f"format={stored_as!r}", INSTEAD)
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise CheckpointError("config.json: quantization_config: a group of config_groups has no object weights")
    kind, bits = weights.get("type", "int"), number_of(weights, "num_bits")
    if stored_as in E2M1_GROUPS:
        return _e2m1_scheme(weights, stored_as)
    is_packed = stored_as == "pack-quantized"
    if kind not in ("int", "float") or KINDS[stored_as] not in (None, kind):
        raise unsupported(f"type={kind!r} in {stored_as}", INSTEAD)
    if bits != 8 and not (bits == 4 and is_packed):
        raise unsupported(f"num_bits={bits} of {kind} in {stored_as}", "4 and 8 bits packed and 8 bits are read")
    strategy = weights.get("strategy") or _implied_strategy(weights.get("group_size"))
    if strategy not in STRATEGIES:
        raise unsupported(f"strategy={strategy!r}", f"choose a checkpoint with one of {', '.join(STRATEGIES)}")
    group_len = number_of(weights, "group_size") if strategy == "group" else 1
    if group_len < 1:
        raise unsupported(f"group_size={group_len}", "group sizes are positive")
    block = block_shape(weights.get("block_structure"), "block_structure") if strategy == "block" else (1, 1)
    symmetric = weights.get("symmetric", True) is not False
    return Scheme(stored_as, kind == "float", bits, symmetric, strategy, group_len, block)


def _e2m1_scheme(weights: Mapping[str, Any], stored_as: str) -> Scheme:
    strategy, group_len = E2M1_GROUPS[stored_as]
    wanted = {"type": "float", "num_bits": 4, "strategy": strategy, "group_size": group_len, "symmetric": True}
    for field, value in wanted.items():
        found = weights.get(field, True if field == "symmetric" else None)
        if found != value and not (field == "strategy" and found is None):
            raise unsupported(f"{field}={short_repr(found)} in {stored_as}", f"weights with {field}={value!r} are read")
    return Scheme(stored_as, True, 4, True, strategy, group_len, (1, group_len))


def _input_bits(group: Mapping[str, Any]) -> int | None:
    """Below 8, which products may round inputs to."""
    inputs = group.get("input_activations")
    bits = inputs.get("num_bits") if isinstance(inputs, Mapping) else None
    return bits if isinstance(bits, int) and 0 < bits < 8 else None


def _implied_strategy(group_size: object) -> str:
    if group_size is None:
        return "tensor"
    return "channel" if group_size == -1 else "group"


def _shape(parts: MatrixParts, scheme: Scheme) -> tuple[int, int]:
    if not scheme.is_packed:
        return parts.matrix("weight", (DTYPE if scheme.is_float else torch.int8,))
    out, num_words = parts.matrix("weight_packed", (torch.int32,))
    shape = [int(side) for side in parts.tensor("weight_shape", (torch.int64, torch.int32), (2,))]
    if shape[0] != out or shape[1] < 1 or num_words != -(-shape[1] * scheme.bits // 32):
        raise parts.error(
            "weight_packed",
            f"has shape {[out, num_words]}, which is not {shape} of weight_shape in the {scheme.bits} bits of "
            "quantization_config",
        )
    return shape[0], shape[1]


def _zeros(parts: MatrixParts, scheme: Scheme, shape: tuple[int, int], scale_shape: torch.Size) -> torch.Tensor:
    """[rows, groups] of unsigned codes, as the scales."""
    suffix, middle = "weight_zero_point", 1 << (scheme.bits - 1)
    if scheme.is_packed and scheme.strategy != "tensor":
        num_words = -(-scale_shape[0] * scheme.bits // 32)
        packed = parts.tensor(suffix, (torch.int32,), (num_words, scale_shape[1]))
        return unpacked_words(packed.t(), scheme.bits).t()[: scale_shape[0]].short()
    found = parts.tensor(suffix, (torch.int8, *SCALE_DTYPES))
    if found.numel() != scale_shape.numel():
        raise parts.error(suffix, f"has shape {list(found.shape)}, weight_scale has {list(scale_shape)}")
    zeros = found.reshape(scale_shape).float() + middle
    if not ((zeros >= 0) & (zeros < 2 * middle)).all():
        raise parts.error(suffix, f"has zero points that are out of range for {scheme.bits} bits")
    return zeros


def _matches(name: str, entry: str) -> bool:
    """A pattern matches from the beginning of a name."""
    if entry.startswith("re:"):
        return re.match(entry[3:], name) is not None
    return name == entry


def _check_pattern(entry: str) -> None:
    try:
        _matches("", entry)
    except re.error as error:
        raise CheckpointError(
            f"config.json: quantization_config: {entry!r} is no regular expression ({error})"
        ) from error

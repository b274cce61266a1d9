"""NVIDIA's modelopt, as it exports folders of Hugging Face: NVFP4 and FP8, for all layers or by a table of them.

    NVFP4    weight [out, in / 2] uint8, weight_scale [out, in / 16] float8_e4m3fn, see `e2m1`; weight_scale_2, a
             float32 that the scales are multiplied by
    FP8      weight [out, in] float8_e4m3fn, weight_scale, for a channel or all

The configuration stands in config.json, or in a file of its own, hf_quant_config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from reprlib import repr as short_repr
from typing import Any

import torch

from cascade_llm.errors import CheckpointError
from cascade_llm.loader.quantized.e2m1 import NVFP4_LEN, e2m1_codes, nvfp4_grid
from cascade_llm.loader.quantized.format import MatrixFormat, names_of, unsupported
from cascade_llm.loader.quantized.fp8 import DTYPE, float_grid
from cascade_llm.loader.quantized.grid import Grid
from cascade_llm.loader.quantized.parts import MatrixParts

__all__ = ["ModelOpt"]

ALGORITHMS = {"NVFP4": 4, "W4A16_NVFP4": None, "FP8": None, "FP8_PER_CHANNEL_PER_TOKEN": None}
"""What is read, and the bits that activations are rounded to where these are below 8."""
NVFP4_ALGORITHMS = ("NVFP4", "W4A16_NVFP4")
MIXED = "MIXED_PRECISION"
INSTEAD = f"choose a checkpoint in {', '.join((*ALGORITHMS, MIXED))}"


class ModelOpt(MatrixFormat):
    """See the module."""

    method = "modelopt"
    markers = ("weight_scale",)
    suffixes = ("weight", "weight_scale", "weight_scale_2")
    unread = ("input_scale",)
    coded_types = ("U8", "F8_E4M3", "F8_E5M2")

    def __init__(self, config: Mapping[str, Any]) -> None:
        """See `QuantizedFormat`; the fields may stand below "quantization"."""
        fields = config.get("quantization", config)
        if not isinstance(fields, Mapping):
            raise CheckpointError("config.json: quantization_config: quantization must be an object")
        self._of_all = fields.get("quant_algo")
        self._by_layer = _layers(fields.get("quantized_layers")) if self._of_all == MIXED else {}
        named = [_algorithm(layer) for layer in (self._by_layer.values() if self._of_all == MIXED else (fields,))]
        self.input_bits = min((bits for name in named if (bits := ALGORITHMS[name])), default=None)
        self._ignored = names_of(fields, "ignore", "exclude_modules")

    def is_ignored(self, name: str) -> bool:
        """See `QuantizedFormat`; entries are patterns of a shell."""
        return any(fnmatchcase(name, entry) for entry in self._ignored)

    def kind(self, parts: MatrixParts) -> str:
        """See `MatrixFormat`."""
        return f"{self.method} {self._algorithm_of(parts)}"

    def grid(self, parts: MatrixParts) -> Grid:
        """See `QuantizedFormat`."""
        algorithm = self._algorithm_of(parts)
        if algorithm in NVFP4_ALGORITHMS:
            factor = parts.number("weight_scale_2").double()
            return nvfp4_grid(parts, "weight", "weight_scale", factor, "weight_scale_2")
        shape = parts.matrix("weight", (DTYPE,))
        return float_grid(parts, "weight_scale", shape, shape if algorithm == "FP8" else (1, shape[1]))

    def codes(self, parts: MatrixParts, rows: slice, inputs: slice) -> torch.Tensor:
        """See `MatrixFormat`."""
        if self._algorithm_of(parts) in NVFP4_ALGORITHMS:
            return e2m1_codes(parts, "weight", rows, inputs)
        return parts.tensor("weight", (DTYPE,))[rows, inputs]

    def _algorithm_of(self, parts: MatrixParts) -> str:
        if self._of_all != MIXED:
            return str(self._of_all)
        if parts.name not in self._by_layer:
            raise CheckpointError(
                f"config.json: quantization_config: quantized_layers has no {parts.name}, which is quantized; use the "
                "configuration that was saved with these weights"
            )
        return _algorithm(self._by_layer[parts.name])


def _layers(value: object) -> Mapping[str, Mapping[str, Any]]:
    if isinstance(value, Mapping) and value and all(isinstance(layer, Mapping) for layer in value.values()):
        return value
    raise CheckpointError(
        f"config.json: quantization_config: quant_algo is {MIXED}, so quantized_layers must be an object of objects"
    )


def _algorithm(fields: Mapping[str, Any]) -> str:
    name = fields.get("quant_algo")
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise unsupported(f"quant_algo={short_repr(name)}", INSTEAD)
    groups = fields.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise CheckpointError(
            "config.json: quantization_config: config_groups must be an object of objects; use the configuration that "
            "was saved with these weights"
        )
    for holder in (fields, *(group.get("weights") for group in groups.values())):
        length = holder.get("group_size") if isinstance(holder, Mapping) else None
        if name in NVFP4_ALGORITHMS and length not in (None, NVFP4_LEN):
            raise unsupported(
                f"group_size={short_repr(length)} in {name}", f"choose a checkpoint with groups of {NVFP4_LEN}"
            )
    return name

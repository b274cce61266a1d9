"""Which layers read all earlier tokens and which a window, as config.json says it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from cascade_llm.config import ModelConfig, kinds_of_layers
from cascade_llm.models.config_fields import ConfigFields

__all__ = ["FULL", "SLIDING", "alternating", "read_layer_types", "with_windows", "with_windows_if_stated"]

FULL, SLIDING = "full_attention", "sliding_attention"


def alternating(period: int) -> Callable[[int], str]:
    """Every `period`-th layer reads all, the others a window."""
    return lambda layer: SLIDING if (layer + 1) % period else FULL


def read_layer_types(fields: ConfigFields, num_layers: int, default: Callable[[int], str]) -> list[str]:
    """`layer_types`, `FULL` or `SLIDING` for each layer; where it is not there, what `default` says of each.

    Raises `CheckpointError` where it is not of so many layers, or names another type.
    """
    if "layer_types" not in fields:
        return [default(layer) for layer in range(num_layers)]
    types = fields.texts("layer_types")
    if len(types) != num_layers:
        raise fields.wrong("layer_types", f"a list of {num_layers}, as num_hidden_layers says")
    if set(types) - {FULL, SLIDING}:
        raise fields.wrong("layer_types", f"a list of {FULL} and {SLIDING}: other types are not implemented")
    return types


def with_windows(config: ModelConfig, fields: ConfigFields, layer_types: Sequence[str]) -> ModelConfig:
    """The configuration with a window of `sliding_window` tokens in each layer of type `SLIDING`."""
    window_len = fields.count("sliding_window") if SLIDING in layer_types else None
    attention_kinds, layer_kinds = kinds_of_layers([window_len if kind == SLIDING else None for kind in layer_types])
    return replace(config, attention_kinds=attention_kinds, layer_kinds=layer_kinds)


def with_windows_if_stated(config: ModelConfig, fields: ConfigFields) -> ModelConfig:
    """The configuration with a window of `sliding_window` tokens in every layer, where that is no null."""
    return with_windows(config, fields, [SLIDING if "sliding_window" in fields else FULL] * config.num_layers)

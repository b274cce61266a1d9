"""Which layers read all earlier tokens and which a window, as config.json says it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from cascade_llm.config import ModelConfig, kinds_of_layers
from cascade_llm.models.config_fields import ConfigFields

__all__ = [
    "FULL",
    "SLIDING",
    "WINDOW_SWITCH",
    "alternating",
    "read_layer_types",
    "with_switched_windows",
    "with_windows",
    "with_windows_if_stated",
]

WINDOW_SWITCH = frozenset({"use_sliding_window", "sliding_window", "layer_types"})
"""The fields that `with_switched_windows` reads."""

FULL, SLIDING = "full_attention", "sliding_attention"


def alternating(period: int) -> Callable[[int], str]:
    """Every `period`-th layer reads all, the others a window."""
    return lambda layer: SLIDING if (layer + 1) % period else FULL


def read_layer_types(fields: ConfigFields, num_layers: int, default: Callable[[int], str]) -> list[str]:
    """`layer_types`, `FULL` or `SLIDING` for each layer; where it is not there, what `default` says of each.

    Raises `CheckpointError` where it names another type.
    """
    if "layer_types" not in fields:
        return [default(layer) for layer in range(num_layers)]
    types = fields.texts("layer_types")
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


def with_switched_windows(config: ModelConfig, fields: ConfigFields, default: Callable[[int], str]) -> ModelConfig:
    """As `with_windows`, where `use_sliding_window` is set; else `sliding_window` says nothing.

    Args:
        config: without windows
        fields: of config.json
        default: the type of each layer, where `layer_types` is not there

    Raises:
        CheckpointError: `layer_types` has windows, and the switch is off
    """
    is_on = fields.flag("use_sliding_window") and "sliding_window" in fields
    layer_types = read_layer_types(fields, config.num_layers, default if is_on else lambda layer: FULL)
    if SLIDING in layer_types and not is_on:
        raise fields.wrong("layer_types", f"without {SLIDING}, since use_sliding_window is not set")
    return with_windows(config, fields, layer_types)

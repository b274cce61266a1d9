"""What sets one architecture apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cascade_llm.config import ModelConfig
from cascade_llm.models.blocks import BlockOptions, DecoderLayer
from cascade_llm.models.config_fields import ConfigFields

__all__ = ["Architecture"]


def _as_it_is(config: ModelConfig, fields: ConfigFields) -> ModelConfig:
    return config


def _own_name(name: str) -> str:
    return name


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A composition of blocks, and what its config.json says beyond what all say."""

    hf_class: str
    layer: Callable[[BlockOptions, int], DecoderLayer]
    """Composes the layer of an index from blocks."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of fields that config.json leaves out, where they are other than those of most."""
    implements: frozenset[str] = frozenset()
    """Fields of `architectures.NEUTRAL_VALUES` that this architecture reads; all others are refused."""
    refine: Callable[[ModelConfig, ConfigFields], ModelConfig] = _as_it_is
    """Adds to the configuration what the architecture's own fields say; raises as `model_config_from_hf` does."""
    tensor_name: Callable[[str], str | None] = _own_name
    """From a checkpoint's name of a tensor to that of the block it belongs to; None for one that is left out."""
    wrapper: str | None = None
    """A class of Hugging Face that has such a model as `text_config`, beside parts that are left out."""

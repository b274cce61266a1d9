"""How a config.json says that positions are rotated, and how the rotation is stretched."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from cascade_llm.config import RopeConfig
from cascade_llm.errors import CheckpointError, UnsupportedModelError
from cascade_llm.layers.rope import ROPE_TYPES
from cascade_llm.models.config_fields import ConfigFields

__all__ = ["read_layer_type_ropes", "read_rope"]

PARTIAL = "partial_rotary_factor"
RAMP = ("beta_fast", "beta_slow")
SCALING_NUMBERS = ("low_freq_factor", "high_freq_factor", "attention_factor", "mscale", "mscale_all_dim", *RAMP)
STRETCHED_FROM_ORIGINAL = ("llama3", "yarn", "longrope")
"""Types that read `original_max_position_embeddings`."""


def read_rope(fields: ConfigFields, head_dim: int, implemented: Container[str]) -> RopeConfig:
    """From `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (before), the same for all layers.

    Args:
        fields: of the model
        head_dim: of its heads
        implemented: whether it has `partial_rotary_factor`, and `layer_type_ropes`: then full attention's are read
    """
    name = _holder(fields)
    scaling = fields.object(name)
    if by_type := scaling.objects():
        if "layer_type_ropes" not in implemented:
            raise UnsupportedModelError(f"config.json: {name} differs between layer types, which is not implemented")
        scaling = by_type.get("full_attention", ConfigFields({}, where=f"{scaling.where}: full_attention"))
    return _read(fields, scaling, head_dim, implemented)


def read_layer_type_ropes(fields: ConfigFields, head_dim: int, implemented: Container[str]) -> Mapping[str, RopeConfig]:
    """As `read_rope`, by type of layer, from `rope_parameters` that name them; empty where they do not."""
    by_type = fields.object("rope_parameters").objects()
    return {name: _read(fields, scaling, head_dim, implemented) for name, scaling in by_type.items()}


def _holder(fields: ConfigFields) -> str:
    return "rope_scaling" if fields.value("rope_scaling") else "rope_parameters"


def _read(fields: ConfigFields, scaling: ConfigFields, head_dim: int, implemented: Container[str]) -> RopeConfig:
    rope_type = scaling.value("rope_type") or scaling.value("type") or "default"
    if rope_type == "su" or (rope_type == "yarn" and "short_factor" in scaling):  # older names, of Phi-3
        rope_type = "longrope"
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"config.json: rope type {rope_type!r} is not implemented; supported: {', '.join(ROPE_TYPES)}"
        )
    if scaling.value("mrope_section"):
        raise UnsupportedModelError(f"{scaling.where} rotates by mrope_section, which is not implemented")
    rotary_dim = _rotary_dim(fields, scaling, head_dim, implemented)
    places = (scaling, fields.object("rope_parameters"), fields)
    theta = next((place for place in places if "rope_theta" in place), fields).number("rope_theta", 1e4, least=1.0)
    given: dict[str, Any] = {"theta": theta, "rotary_dim": None if rotary_dim == head_dim else rotary_dim}
    if rope_type != "default":
        given |= {"rope_type": rope_type, **_stretching(fields, scaling, rope_type, rotary_dim)}
    if rope_type == "dynamic" and rotary_dim == 2:
        raise CheckpointError("config.json: head_dim is 2: a dynamic rotary embedding needs 4 or more")
    return RopeConfig(**given)


def _rotary_dim(fields: ConfigFields, scaling: ConfigFields, head_dim: int, implemented: Container[str]) -> int:
    place = scaling if PARTIAL in scaling else fields
    factor = place.number(PARTIAL, 1.0, least=0.0)
    if factor != 1 and PARTIAL not in implemented:
        raise UnsupportedModelError(f"{place.where}: {PARTIAL}={factor:g} is not implemented for this architecture")
    rotary_dim = int(head_dim * factor)
    if factor > 1 or rotary_dim % 2 or rotary_dim == 0:
        raise place.wrong(PARTIAL, f"at most 1 and rotate an even part of the {head_dim} dimensions of a head")
    return rotary_dim


def _stretching(fields: ConfigFields, scaling: ConfigFields, rope_type: str, rotary_dim: int) -> dict[str, Any]:
    """The fields of `RopeConfig` that say how far, and how, positions are stretched."""
    max_len = original_len = fields.count("max_position_embeddings")
    if rope_type in STRETCHED_FROM_ORIGINAL:
        inner = scaling.count("original_max_position_embeddings", max_len)
        original_len = fields.count("original_max_position_embeddings", inner)
    found: dict[str, Any] = {"original_max_position_embeddings": original_len}
    if "factor" in scaling:
        found["factor"] = scaling.number("factor", least=0.0)
    elif rope_type in ("yarn", "longrope"):
        found["factor"] = max_len / original_len
    # 0 means "not given" for the two ends of yarn's ramp, as transformers reads them
    given = [name for name in SCALING_NUMBERS if name in scaling and (scaling.value(name) or name not in RAMP)]
    found |= {name: scaling.number(name, least=0.0 if name in RAMP else None) for name in given}
    _check_stretching(scaling, rope_type, found)
    if rope_type == "longrope":
        for name in ("short", "long"):
            found[f"{name}_factors"] = scaling.numbers(f"{name}_factor", rotary_dim // 2, least=0.0)
    return {**found, "truncate": scaling.flag("truncate", True)}


def _check_stretching(scaling: ConfigFields, rope_type: str, found: Mapping[str, Any]) -> None:
    required = ("factor", "low_freq_factor", "high_freq_factor") if rope_type == "llama3" else ("factor",)
    if missing := [name for name in required if name not in found]:
        raise CheckpointError(f"{scaling.where} of type {rope_type} lacks {', '.join(missing)}")
    if rope_type == "llama3" and found["low_freq_factor"] == found["high_freq_factor"]:
        raise CheckpointError(f"{scaling.where} has equal low_freq_factor and high_freq_factor")

"""How a GGUF file says that positions are stretched by YaRN."""

from __future__ import annotations

import math
from typing import Any

from cascade_llm.loader.gguf_keys import GGUFKeys

__all__ = ["yarn_scaling"]


def yarn_scaling(keys: GGUFKeys, factor: float) -> dict[str, Any]:
    """YaRN (Peng et al. 2023). llama.cpp's attn_factor multiplies the paper's 0.1 ln(factor) + 1."""
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length"),
    }
    for name in ("beta_fast", "beta_slow"):
        if keys.get(f"rope.scaling.yarn_{name}") is not None:
            scaling[name] = keys.number(f"rope.scaling.yarn_{name}")
    for name in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        if keys.get(name) is not None:
            scaling["attention_factor"] = keys.number(name) * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    return scaling

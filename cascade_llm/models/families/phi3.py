"""Phi-3 and Phi-4 (Microsoft): as Llama, with q, k and v in one tensor, gate and up in another.

Phi-3 mini of 4,096 positions has a window in every layer, the others have none.
"""

from __future__ import annotations

from cascade_llm.models.architecture import Architecture
from cascade_llm.models.blocks import AttentionBlock, BlockOptions, DecoderLayer, GatedMLP
from cascade_llm.models.layer_types import with_windows_if_stated

__all__ = ["PHI3"]


def _layer(options: BlockOptions, index: int) -> DecoderLayer:
    attention = AttentionBlock(options, fused_name="qkv_proj")
    return DecoderLayer(options, index, attention, GatedMLP(options, fused_name="gate_up_proj"))


PHI3 = Architecture(
    hf_class="Phi3ForCausalLM",
    layer=_layer,
    defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    implements=frozenset({"partial_rotary_factor", "sliding_window"}),
    refine=with_windows_if_stated,
)

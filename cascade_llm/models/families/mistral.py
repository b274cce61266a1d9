"""Mistral (Jiang et al. 2023): as Llama without biases; the first checkpoints with a window in every layer."""

from __future__ import annotations

from cascade_llm.models.architecture import Architecture
from cascade_llm.models.blocks import AttentionBlock, BlockOptions, DecoderLayer, GatedMLP
from cascade_llm.models.layer_types import with_windows_if_stated

__all__ = ["MISTRAL"]


def _layer(options: BlockOptions, index: int) -> DecoderLayer:
    return DecoderLayer(options, index, AttentionBlock(options), GatedMLP(options))


MISTRAL = Architecture(
    hf_class="MistralForCausalLM",
    layer=_layer,
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    implements=frozenset({"sliding_window"}),
    refine=with_windows_if_stated,
)

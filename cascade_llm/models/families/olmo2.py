"""OLMo 2 (Ai2): blocks read the residual stream as it is, and what they add to it is normalised; so are all queries
together, and all keys."""

from __future__ import annotations

from cascade_llm.models.architecture import Architecture
from cascade_llm.models.blocks import AttentionBlock, BlockOptions, DecoderLayer, GatedMLP, NormNames
from cascade_llm.models.families.qwen import with_attention_bias

__all__ = ["OLMO2"]

NORMS = NormNames(after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm")


def _layer(options: BlockOptions, index: int) -> DecoderLayer:
    bias = options.config.own["attention_bias"]
    attention = AttentionBlock(options, qkv_bias=bias, out_bias=bias, projection_norms=True)
    return DecoderLayer(options, index, attention, GatedMLP(options), NORMS)


OLMO2 = Architecture(
    hf_class="Olmo2ForCausalLM", layer=_layer, refine=with_attention_bias, defaults={"rms_norm_eps": 1e-5}
)

"""GGUF metadata as the fields of Hugging Face's config.json."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from cascade_llm.errors import CheckpointError, UnsupportedModelError
from cascade_llm.loader.gguf_architectures import GGUFArchitecture, architecture_of
from cascade_llm.loader.gguf_file import PLAIN_TYPES, GGUFFile, dequantize
from cascade_llm.loader.gguf_keys import GGUFKeys
from cascade_llm.loader.gguf_texts import GGUFTexts
from cascade_llm.loader.gguf_yarn import yarn_scaling

__all__ = ["ending_token_ids", "hf_config_of"]

NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_weights_norm": (False,),
    "expert_weights_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "attention.temperature_scale": (0.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
"""Keys that change the mathematics, with the values at which they do not; refused where an architecture does not read
them."""

END_OF_TURN_TEXTS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
"""Control tokens that end a turn where the file names none, as in llama.cpp."""

CONTROL_TOKEN = 3

ROPE_FACTORS: Mapping[str, str] = {
    "rope_factors_short.weight": "short_factor",
    "rope_factors_long.weight": "long_factor",
}
"""Tensors that hold LongRoPE's factors, and the fields of rope_scaling that they stand for."""

BLOCK_NAME = re.compile(r"blk\.\d{1,9}\.")

LLAMA3_ORIGINAL_LEN, LLAMA3_LOW_FREQ_FACTOR, LLAMA3_HIGH_FREQ_FACTOR = 8192, 1.0, 4.0


def hf_config_of(file: GGUFFile) -> dict[str, Any]:
    """config.json of the model in a GGUF file, with the classic `rope_theta` and `rope_scaling`.

    Raises `UnsupportedModelError` for an architecture or a feature that is not implemented, `CheckpointError` for
    metadata that is missing or contradicts itself.
    """
    architecture, keys = architecture_of(file), GGUFKeys(file)
    _check_features(keys, architecture)
    num_heads, hidden_size = keys.integer("attention.head_count"), keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads)
    biased = "blk.0.attn_q.bias" in file.tensors
    return {
        "architectures": [architecture.hf_class],
        "model_type": architecture.model_type,
        "vocab_size": _embedding_rows(file),
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": _num_layers(keys),
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(keys, head_dim),
        "original_max_position_embeddings": keys.get("rope.scaling.original_context_length"),
        "partial_rotary_factor": _partial_rotary_factor(keys, head_dim, architecture),
        "attention_bias": biased,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": _dtype(file),
        "hidden_act": "silu",
        "bos_token_id": _token_id(file, "bos"),
        "eos_token_id": _token_id(file, "eos"),
        **architecture.fields(keys, head_dim),
    }


def _num_layers(keys: GGUFKeys) -> int:
    """`block_count`, which must be what the tensors say where there are any."""
    num_layers = keys.integer("block_count")
    numbers = {int(name.split(".")[1]) for name in keys.file.tensors if BLOCK_NAME.match(name)}
    if numbers and num_layers != len(numbers):
        raise CheckpointError(
            f"{keys.file.path}: {keys.architecture}.block_count is {num_layers}, its tensors are of {len(numbers)} "
            "blocks: the file is corrupt"
        )
    return num_layers


def ending_token_ids(file: GGUFFile) -> list[int]:
    """End of sequence, of turn (eot) and of message (eom), in this order, each once."""
    ids = [_token_id(file, name) for name in ("eos", "eot", "eom")]
    if ids[1] is None:
        texts, types = _texts(file), _token_types(file)
        control = [i for i, kind in enumerate(types[: len(texts)]) if kind == CONTROL_TOKEN]
        ids += [i for i in control if texts[i] in END_OF_TURN_TEXTS]
    return [token_id for token_id in dict.fromkeys(ids) if token_id is not None]


def _token_id(file: GGUFFile, name: str) -> int | None:
    value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.{name}_token_id is {value!r}, it must be a token id")
    return value


def _texts(file: GGUFFile) -> GGUFTexts | list[str]:
    """The vocabulary; empty where there is none."""
    texts = file.metadata.get("tokenizer.ggml.tokens", [])
    if isinstance(texts, GGUFTexts):
        return texts
    if texts == []:
        return []
    raise CheckpointError(f"{file.path}: tokenizer.ggml.tokens is no list of texts")


def _token_types(file: GGUFFile) -> list[int]:
    """Of each token of the vocabulary; empty where there is none."""
    types = file.metadata.get("tokenizer.ggml.token_type", [])
    if isinstance(types, list) and all(isinstance(kind, int) for kind in types):
        return types
    raise CheckpointError(f"{file.path}: tokenizer.ggml.token_type is no list of integers")


def _check_features(keys: GGUFKeys, architecture: GGUFArchitecture) -> None:
    for name, neutral in NEUTRAL_VALUES.items():
        value = keys.get(name, neutral[0])
        if value not in neutral and name not in architecture.implements:
            raise UnsupportedModelError(f"{keys.file.path}: {keys.architecture}.{name} = {value} is not implemented")
    key_len, value_len = keys.get("attention.key_length"), keys.get("attention.value_length")
    if key_len != value_len and None not in (key_len, value_len):
        raise UnsupportedModelError(
            f"{keys.file.path}: keys of {key_len} and values of {value_len} are not implemented"
        )
    if keys.get("attention.sliding_window") and "attention.sliding_window" not in architecture.implements:
        raise UnsupportedModelError(f"{keys.file.path}: sliding-window attention is not implemented")


def _embedding_rows(file: GGUFFile) -> int:
    tensor = file.tensors.get("token_embd.weight")
    if tensor is None or len(tensor.shape) != 2:
        raise CheckpointError(f"{file.path} has no token_embd.weight: it is no whole language model")
    return tensor.shape[0]


def _dtype(file: GGUFFile) -> str:
    """The plain type of the large matrices; block types are dequantized to float32."""
    plain = {kind: str(dtype).removeprefix("torch.") for kind, dtype in PLAIN_TYPES.items()}
    types = {plain.get(tensor.type, "float32") for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return types.pop() if len(types) == 1 else "float32"


def _partial_rotary_factor(keys: GGUFKeys, head_dim: int, architecture: GGUFArchitecture) -> float:
    """The part of a head that is rotated, from the number of its dimensions."""
    rotary_dim = keys.integer("rope.dimension_count", head_dim)
    if rotary_dim != head_dim and "rope.dimension_count" not in architecture.implements:
        raise UnsupportedModelError(
            f"{keys.file.path}: RoPE over {rotary_dim} of {head_dim} dimensions: not implemented"
        )
    factor = rotary_dim / head_dim
    return factor if int(head_dim * factor) == rotary_dim else math.nextafter(factor, 1.0)


def _rope_scaling(keys: GGUFKeys, head_dim: int) -> dict[str, Any] | None:
    """Hugging Face's rope_scaling; None where positions are not stretched."""
    if keys.file.tensors.keys() >= ROPE_FACTORS.keys():
        return _longrope_scaling(keys)
    if "rope_freqs.weight" in keys.file.tensors:
        return _llama3_scaling(keys, head_dim)
    kind = keys.get("rope.scaling.type", "linear" if keys.get("rope.scale_linear") else "none")
    if kind == "none":
        return None
    factor = keys.number("rope.scaling.factor", keys.get("rope.scale_linear"))
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor} if factor != 1 else None
    if kind == "yarn":
        return yarn_scaling(keys, factor)
    raise UnsupportedModelError(f"{keys.file.path}: RoPE scaling {kind!r} is not implemented: linear, yarn, llama3 are")


def _longrope_scaling(keys: GGUFKeys) -> dict[str, Any]:
    """LongRoPE, whose factors are tensors; llama.cpp's attn_factor is here the factor itself."""
    scaling: dict[str, Any] = {"rope_type": "longrope"}
    if keys.get("rope.scaling.attn_factor") is not None:
        scaling["attention_factor"] = keys.number("rope.scaling.attn_factor")
    for tensor_name, name in ROPE_FACTORS.items():
        tensor = keys.file.tensors[tensor_name]
        scaling[name] = dequantize(keys.file.data(tensor), tensor.type, tensor.shape).tolist()
    return scaling


def _llama3_scaling(keys: GGUFKeys, head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling, found again from the divisors of each frequency that a GGUF holds in its place.

    All Llama 3.1 to 3.3 models share three of its four numbers; divisors that these do not reproduce are refused.
    """
    tensor = keys.file.tensors["rope_freqs.weight"]
    divisors = dequantize(keys.file.data(tensor), tensor.type, tensor.shape).double()
    scaling = {
        "rope_type": "llama3",
        "factor": round(float(divisors.max()), 4),
        "low_freq_factor": LLAMA3_LOW_FREQ_FACTOR,
        "high_freq_factor": LLAMA3_HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": LLAMA3_ORIGINAL_LEN,
    }
    expected = _llama3_divisors(keys.number("rope.freq_base", 10000.0), head_dim, float(divisors.max()))
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
        raise UnsupportedModelError(
            f"{keys.file.path}: rope_freqs.weight is not the scaling of Llama 3.1 to 3.3, others are not implemented"
        )
    return scaling


def _llama3_divisors(theta: float, head_dim: int, factor: float) -> torch.Tensor:
    """[head_dim / 2], what Llama 3 divides each frequency by (Llama 3.1 reference code, `apply_scaling`)."""
    wavelengths = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = (LLAMA3_ORIGINAL_LEN / wavelengths - LLAMA3_LOW_FREQ_FACTOR) / (
        LLAMA3_HIGH_FREQ_FACTOR - LLAMA3_LOW_FREQ_FACTOR
    )
    smooth = smooth.clamp(0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)

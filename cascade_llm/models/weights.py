"""Filling a decoder: from a checkpoint's tensors under Hugging Face's names, or with random ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cascade_llm.errors import CheckpointError
from cascade_llm.models.decoder import Decoder, DecoderLayer

__all__ = ["checkpoint_slots", "init_dummy", "load_weights"]

MAX_NAMED_PROBLEMS = 10
DUMMY_PERIOD = 1_000_003
"""Random numbers that are drawn once and repeated; a prime, so that no two rows of a matrix are alike."""

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
RECOMPUTED_SUFFIXES = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
"""Buffers that old checkpoints carry and nobody needs."""


def checkpoint_slots(decoder: Decoder) -> dict[str, torch.Tensor]:
    """Where each tensor of a checkpoint goes: its name, and the view of a parameter that it fills."""
    slots = {"model.embed_tokens.weight": decoder.embedding, "model.norm.weight": decoder.final_norm.weight}
    for layer in decoder.layers:
        for name, slot in _layer_slots(decoder, layer).items():
            slots[f"model.layers.{layer.index}.{name}"] = slot
    if not decoder.config.tie_word_embeddings:
        slots["lm_head.weight"] = decoder.lm_head.weight
    return slots


def load_weights(decoder: Decoder, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy a checkpoint's tensors into the decoder, converting their dtype, one at a time; call before `pack()`.

    A head beside a tied embedding and recomputed rotary buffers are passed over. Raises `CheckpointError` with every
    tensor that is missing, unexpected, wrongly shaped, of a dtype that is no plain float, or given twice.
    """
    slots = checkpoint_slots(decoder)
    missing = dict.fromkeys(slots)
    problems: list[str] = []
    for name, tensor in tensors:
        if name not in slots:
            if not _is_ignored(decoder, name):
                problems.append(f"{name} is not a tensor of {decoder.config.architecture}")
            continue
        if name not in missing:
            problems.append(f"{name} is given twice")
            continue
        del missing[name]
        slot = slots[name]
        if tensor.shape != slot.shape:
            problems.append(f"{name} has shape {list(tensor.shape)}, the configuration says {list(slot.shape)}")
        elif tensor.dtype not in WEIGHT_DTYPES:
            problems.append(f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}, not a plain float")
        else:
            slot.copy_(tensor)
    problems.extend(f"{name} is missing" for name in missing)
    if problems:
        raise CheckpointError(_summary(problems, len(slots)))


def init_dummy(decoder: Decoder, seed: int = 0) -> None:
    """Random weights at the speed of a copy; matrices scaled by 1/sqrt(inputs), norms 1, biases small."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(DUMMY_PERIOD, generator=generator).to(decoder.dtype).to(decoder.device)
    start = 0
    for name, slot in checkpoint_slots(decoder).items():
        if name.endswith("norm.weight"):
            slot.fill_(1.0)
            continue
        _fill_repeating(slot, numbers, start)
        slot.mul_(slot.shape[-1] ** -0.5)
        start = (start + slot.numel()) % DUMMY_PERIOD


def _layer_slots(decoder: Decoder, layer: DecoderLayer) -> dict[str, torch.Tensor]:
    """Names below `model.layers.N`, and the views that they fill."""
    config = decoder.config
    q_size, kv_size = config.num_qo_heads * config.head_dim, config.num_kv_heads * config.head_dim
    fused = {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): (layer.qkv, (q_size, kv_size, kv_size)),
        ("self_attn.o_proj",): (layer.attention_out, (config.hidden_size,)),
        ("mlp.gate_proj", "mlp.up_proj"): (layer.gate_up, (config.intermediate_size,) * 2),
        ("mlp.down_proj",): (layer.down, (config.hidden_size,)),
    }
    slots = {
        "input_layernorm.weight": layer.input_norm.weight,
        "post_attention_layernorm.weight": layer.feed_forward_norm.weight,
    }
    if layer.qk_norms is not None:
        slots["self_attn.q_norm.weight"], slots["self_attn.k_norm.weight"] = (norm.weight for norm in layer.qk_norms)
    for names, (linear, sizes) in fused.items():
        assert not linear.is_packed, "weights are loaded before pack()"
        slots.update(zip((f"{name}.weight" for name in names), linear.weight.split_with_sizes(sizes), strict=True))
        if linear.bias is not None:
            slots.update(zip((f"{name}.bias" for name in names), linear.bias.split_with_sizes(sizes), strict=True))
    return slots


def _is_ignored(decoder: Decoder, name: str) -> bool:
    tied_head = decoder.config.tie_word_embeddings and name == "lm_head.weight"
    return tied_head or name.endswith(RECOMPUTED_SUFFIXES)


def _summary(problems: list[str], num_expected: int) -> str:
    named = "\n  ".join(problems[:MAX_NAMED_PROBLEMS])
    hidden = len(problems) - MAX_NAMED_PROBLEMS
    more = f"\n  and {hidden} more" if hidden > 0 else ""
    return (
        f"the checkpoint does not fit its configuration: {len(problems)} problems, {num_expected} tensors expected\n"
        f"  {named}{more}\nUse the config.json that was saved with these weights."
    )


def _fill_repeating(slot: torch.Tensor, numbers: torch.Tensor, start: int) -> None:
    """Fill a contiguous tensor with `numbers`, repeated, from `start` on."""
    flat = slot.view(-1)
    done = 0
    while done < flat.numel():
        part = numbers[start : start + flat.numel() - done]
        flat[done : done + part.numel()] = part
        done, start = done + part.numel(), 0

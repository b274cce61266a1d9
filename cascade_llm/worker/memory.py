"""How many pages of K/V fit."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from cascade_llm.config import EngineOptions, ModelConfig
from cascade_llm.device.devices import resolve_device
from cascade_llm.device.ranks import Ranks
from cascade_llm.device.start_errors import memory_for
from cascade_llm.errors import CapacityError
from cascade_llm.models.decoder import Decoder
from cascade_llm.worker.pool_sizes import PoolShape

__all__ = ["available_bytes", "check_sizes", "pool_pages", "step_bytes"]

CGROUP = Path("/sys/fs/cgroup")
GRAPH_BYTES = 1 << 30
"""An estimate of all graphs' memory: 5 to 15 MB each."""

LANE_BYTES = 512
"""At least, of a sequence that may run, on device and host."""


def available_bytes(device: torch.device) -> int:
    """Memory that a new allocation can count on: free on the GPU; on the CPU what neither system nor cgroup holds."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return min([int(psutil.virtual_memory().available), *_cgroup_rooms(CGROUP)])


def available_bytes_of_rank(device: torch.device, ranks: Ranks) -> int:
    """What one rank may count on: ranks on CPUs share the memory."""
    free = available_bytes(device)
    return free if device.type == "cuda" else free // ranks.count


def check_sizes(
    options: EngineOptions,
    model: ModelConfig,
    dtype: torch.dtype,
    sequence_bytes: int,
    max_len: int,
    ranks: Ranks,
    file_bytes: int = 0,
) -> None:
    """Compare what must be held in any case with the free memory, before anything is built.

    Args:
        sequence_bytes: K and V of the longest sequence, over all layers, on this rank
        max_len: tokens of the longest sequence
        ranks: that share the weights
        file_bytes: what the weights take in their files, perhaps in fewer bits; 0 where there are none

    Raises:
        CapacityError: with the number and the limit
    """
    free = available_bytes_of_rank(resolve_device(options.device), ranks)
    heads = 2 * (model.num_qo_heads + model.num_kv_heads) * model.head_dim
    layers = model.hidden_size * (model.num_layers * heads + 3 * model.total_gate_size)
    vocabularies = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    num_weights = layers + vocabularies
    weight_bytes = num_weights // 2 if options.quantization else num_weights * dtype.itemsize
    needs = (
        (
            min(weight_bytes, file_bytes or weight_bytes) // ranks.count,
            f"the weights of {model.num_layers:,} layers, hidden size {model.hidden_size:,} and a vocabulary of "
            f"{model.vocab_size:,}",
            "take a smaller model, or end what else holds memory",
        ),
        (sequence_bytes, f"K and V of one sequence of max_model_len {max_len:,}", "set a smaller max_model_len"),
        (max_len * model.head_dim * 4, f"the rotary table of max_model_len {max_len:,}", "set a smaller max_model_len"),
        (
            options.max_num_seqs * LANE_BYTES,
            f"the state of max_num_seqs {options.max_num_seqs:,} sequences",
            "set a smaller max_num_seqs",
        ),
    )
    for num_bytes, what, cure in needs:
        if num_bytes > free:
            raise CapacityError(f"{what} takes {num_bytes:,} bytes, {free:,} are free: {cure}")


def step_bytes(decoder: Decoder, options: EngineOptions, *, has_graphs: bool) -> int:
    """Memory that steps take beside weights and KV pool, on CUDA: the measured peak of a forward pass over the largest
    step, and an estimate of what graphs keep."""
    device = decoder.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    rows = torch.zeros(options.max_num_batched_tokens, dtype=torch.int64, device=device)
    with memory_for(f"a step of {len(rows):,} tokens beside the weights: lower max_num_batched_tokens"):
        decoder.forward(rows, rows, lambda layer, q, k, v, sinks=None: torch.zeros_like(q))
        torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    graphs = GRAPH_BYTES if has_graphs else 0
    # logits in the model's dtype, and what the sampler makes of them in float32
    logits = options.max_num_seqs * decoder.config.vocab_size * (decoder.dtype.itemsize + 8 * 4)
    return peak + graphs + logits


def pool_pages(
    options: EngineOptions,
    shape: PoolShape,
    device: torch.device,
    ranks: Ranks,
    reserved_bytes: int = 0,
) -> tuple[int, ...]:
    """Pages of the KV pool, or of the pools of several attention kinds: what `kv_cache_bytes` says, else what the
    sequences could need and the memory gives.

    On the CPU the memory gives a quarter of what is free; on CUDA the share that `gpu_memory_utilization` names, less
    `reserved_bytes`, which steps need for themselves. Every rank holds a share of each page, and the one that has room
    for the fewest decides. Between several pools `PoolShape` shares out; where the longest sequence does not fit then,
    those of windows get no more than one sequence needs.

    Raises:
        CapacityError: not one sequence of `max_model_len` fits; says which number to change
    """
    free_bytes = available_bytes_of_rank(device, ranks)
    if options.kv_cache_bytes is not None:
        pool_bytes, cure = options.kv_cache_bytes // ranks.count, "raise kv_cache_bytes"
    else:
        share = options.gpu_memory_utilization if device.type == "cuda" else 0.25
        pool_bytes = max(0, int(free_bytes * share) - reserved_bytes)
        cure = "raise gpu_memory_utilization" if device.type == "cuda" else "give kv_cache_bytes"
    total, lean = ranks.least(shape.most(pool_bytes), device), False
    if total < shape.pages_per_sequence and shape.windows:
        total, lean = ranks.least(shape.most(pool_bytes, lean=True), device), True
    if total < shape.pages_per_sequence:
        raise CapacityError(
            f"the KV pool of {pool_bytes:,} bytes holds {total * options.page_size:,} tokens, one sequence of "
            f"max_model_len {shape.max_model_len:,} needs {shape.bytes_per_sequence:,} bytes: {cure}, or set "
            f"max_model_len to {total * options.page_size:,} or less"
        )
    pages = shape.with_windows(total, lean=lean)
    if shape.num_bytes(pages) > free_bytes:
        raise CapacityError(
            f"kv_cache_bytes asks for {shape.num_bytes(pages):,} bytes, {free_bytes:,} are free: lower it, or "
            "max_num_seqs or max_model_len"
        )
    return pages


def _cgroup_rooms(root: Path) -> list[int]:
    """What the cgroup (version 2, then 1) lets this process take beside what is used; nothing without a limit."""
    rooms = []
    for limit_file, used_file in (
        (root / "memory.max", root / "memory.current"),
        (root / "memory" / "memory.limit_in_bytes", root / "memory" / "memory.usage_in_bytes"),
    ):
        try:
            rooms.append(max(0, int(limit_file.read_text()) - int(used_file.read_text())))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return rooms

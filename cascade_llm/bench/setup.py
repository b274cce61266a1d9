"""From a model, a workload and options to what is measured; everything that can be wrong is wrong here, in seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cascade_llm.bench.load import Load
from cascade_llm.bench.machine_limits import MachineLimits, machine_limits
from cascade_llm.bench.own_memory import forget_peak
from cascade_llm.bench.step_work import ModelShape
from cascade_llm.bench.workloads import Vocabulary, Workload
from cascade_llm.config import EngineOptions, ModelConfig
from cascade_llm.device.devices import compute_capability, resolve_device, resolve_dtype, resolve_page_dtype
from cascade_llm.engine.tokenizer import load_tokenizer
from cascade_llm.engine.weight_support import held_matrix
from cascade_llm.errors import CapacityError
from cascade_llm.kv_cache.page_dtypes import bytes_per_number
from cascade_llm.llm import LLM
from cascade_llm.loader.checkpoint import Checkpoint
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.models.decoder import head_options
from cascade_llm.weights.format import StoredTensor, WeightOptions
from cascade_llm.worker.memory import available_bytes
from cascade_llm.worker.pool_sizes import PoolShape

__all__ = ["BenchModel", "open_model", "options_for"]

DEFAULT_LANES = 256
SAMPLE_ROWS = 128
HEADS = ("lm_head.weight", "model.embed_tokens.weight")
POOL_SHARE = 0.2
"""Of the free memory that each engine's pool may take where its size is not given: two of them fit beside weights."""


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """A model whose weights have not been read."""

    name: str
    checkpoint: Checkpoint
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    options: Mapping[str, Any]
    """Of every engine, as the user gave them."""

    @property
    def context_len(self) -> int:
        """Tokens that a sequence may have."""
        limit = self.config.max_position_embeddings
        return min(int(self.options.get("max_model_len") or limit), limit)

    def load(self, workload: Workload, *, temperature: float | None = None, top_p: float = 1.0) -> Load:
        """The requests of a workload, which fit the context; else `ConfigError`."""
        vocabulary = Vocabulary(self.config.vocab_size, lambda: load_tokenizer(self.checkpoint.tokenizer_source))
        load = workload.load(vocabulary, temperature=temperature, top_p=top_p)
        load.check(self.context_len)
        return load

    def open(self, *loads: Load, **changes: Any) -> LLM:
        """An engine with room for each of these loads."""
        return LLM(self.name, progress=False, **{**options_for(self, *loads), **changes})  # a bar may be drawn already

    def limits(self) -> MachineLimits:
        """What this machine can do at most with the model's dtype, and with integers where its weights are such."""
        is_quantized = any(stored.codes is not None for _, stored in self.checkpoint.stored_tensors())
        limits = machine_limits(
            self.device,
            self.dtype,
            num_threads=self.options.get("num_threads"),
            with_integers=is_quantized or self.options.get("quantization") is not None,
        )
        forget_peak()  # a gigabyte was read and copied, which is no engine's
        return limits

    @property
    def kv_dtype(self) -> torch.dtype:
        """What K and V are stored in."""
        return resolve_page_dtype(
            EngineOptions(**self.options), self.dtype, self.device, self.checkpoint.main_type
        ).dtype

    def shape(self) -> ModelShape:
        """What a step's work depends on."""
        layers, head = self._weight_bytes()
        return ModelShape.of(
            self.config,
            layer_weight_bytes=layers,
            head_weight_bytes=head,
            kv_dtype_bytes=bytes_per_number(self.kv_dtype, self.config.head_dim),
        )

    def _weight_bytes(self) -> tuple[float, float]:
        """Per weight of the layers and of the head, as an engine keeps them: some rows of each kind are asked."""
        options = WeightOptions(
            dtype=self.dtype,
            device=self.device,
            quantization=self.options.get("quantization"),
            arch=compute_capability(self.device),
        )
        of_head = head_options(options)
        known: dict[tuple[object, ...], float] = {}
        sums = {False: (0.0, 0), True: (0.0, 0)}
        for name, stored in self.checkpoint.stored_tensors():
            if len(stored.shape) != 2:
                continue
            is_head, num_weights = name in HEADS, math.prod(stored.shape)
            kind = (is_head, stored.format, stored.dtype, stored.shape[1])
            if kind not in known:
                known[kind] = _bytes_per_weight(stored, of_head if is_head else options)
            num_bytes, count = sums[is_head]
            sums[is_head] = num_bytes + known[kind] * num_weights, count + num_weights
        layers, head = (num_bytes / count if count else self.dtype.itemsize for num_bytes, count in sums.values())
        return layers, head


def _bytes_per_weight(stored: StoredTensor, options: WeightOptions) -> float:
    some = stored.rows(slice(SAMPLE_ROWS))
    with torch.inference_mode():
        return held_matrix(some, options).num_bytes / math.prod(some.shape)


def open_model(model: str, options: Mapping[str, Any]) -> BenchModel:
    """Read a model's headers; raises what `LLM` would, for options, device and files."""
    checked = EngineOptions(**options)
    device = resolve_device(checked.device)
    checkpoint = open_checkpoint(model, load_format=checked.load_format, revision=checked.revision)
    config = model_config_from_hf(checkpoint.hf_config(), checkpoint.generation_config())
    return BenchModel(
        name=model,
        checkpoint=checkpoint,
        config=config,
        device=device,
        dtype=resolve_dtype(checked.dtype, config.dtype, device),
        options=options,
    )


def options_for(model: BenchModel, *loads: Load) -> dict[str, Any]:
    """The user's options; context, lanes and pool are the largest that a load needs, where they are not given.

    Every engine gets pools of the same size, whatever memory the one before has left. Where kinds with windows have
    pools of their own, each is asked for as large as the first: how far it can be smaller depends on what is shared.

    Raises `CapacityError` where the given pool does not hold the longest sequence.
    """
    checked = EngineOptions(**model.options)
    number_bytes = bytes_per_number(model.kv_dtype, model.config.head_dim)
    lanes = min(max(load.num_sequences for load in loads), DEFAULT_LANES)
    options: dict[str, Any] = {
        "max_model_len": max(load.longest for load in loads),
        "max_num_seqs": lanes,
        "max_num_batched_tokens": max(checked.max_num_batched_tokens, lanes),
        **model.options,
    }
    held = model.config.held_by_ranks(checked.tensor_parallel_size)
    shape = PoolShape.of(EngineOptions(**options), held, options["max_model_len"], number_bytes)
    longest_bytes = shape.bytes_per_sequence
    if checked.kv_cache_bytes is None and model.device.type == "cpu":
        wanted = max(load.pool_pages(checked.page_size) for load in loads) * sum(shape.page_bytes)
        given = int(available_bytes(model.device) * POOL_SHARE)
        options["kv_cache_bytes"] = min(max(wanted, longest_bytes), given)
    if (pool := options.get("kv_cache_bytes")) is not None and pool < longest_bytes:
        raise CapacityError(
            f"a KV pool of {pool:,} bytes does not hold the workload's longest sequence, {longest_bytes:,} bytes: "
            "raise kv_cache_bytes, or make its prompts or outputs shorter"
        )
    return options

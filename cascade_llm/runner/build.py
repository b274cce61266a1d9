"""From options and a checkpoint to a model runner."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.select import BackendChoice, select_backend
from cascade_llm.config import EngineOptions, ModelConfig
from cascade_llm.errors import ConfigError
from cascade_llm.kv_cache.paged_kv_cache import PagedKVCache
from cascade_llm.loader.checkpoint import Checkpoint
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.models.decoder import Decoder
from cascade_llm.models.weights import init_dummy, load_weights
from cascade_llm.runner.device import DTYPES, resolve_device, resolve_dtype, thread_limit
from cascade_llm.runner.lanes import LaneState
from cascade_llm.runner.memory import pool_pages
from cascade_llm.runner.model_runner import ModelRunner

__all__ = ["RunnerFacts", "build_runner"]


@dataclass(frozen=True, kw_only=True)
class RunnerFacts:
    """What was found out at start; never changed afterwards."""

    model: ModelConfig
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    total_pages: int
    max_model_len: int
    backend: BackendChoice

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token over all layers."""
        return self.model.kv_bytes_per_token(self.kv_dtype.itemsize)


def build_runner(options: EngineOptions, checkpoint: Checkpoint) -> tuple[ModelRunner, RunnerFacts]:
    """Load the weights, size the KV pool, choose the backend."""
    model = model_config_from_hf(checkpoint.hf_config(), checkpoint.generation_config())
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, model.dtype, device)
    kv_dtype = dtype if options.kv_cache_dtype == "auto" else DTYPES[options.kv_cache_dtype]
    if kv_dtype != dtype:
        raise ConfigError(f"kv_cache_dtype {options.kv_cache_dtype} differs from dtype {dtype}: set both the same")
    max_model_len = _max_model_len(options, model)
    spec = AttentionSpec(
        num_layers=model.num_layers,
        num_qo_heads=model.num_qo_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        sm_scale=model.sm_scale,
        dtype=dtype,
        device=device,
    )
    choice = select_backend(options.attention_backend, spec)
    with torch.inference_mode(), thread_limit(options.num_threads):
        decoder = Decoder(model, dtype, device, max_positions=max_model_len)
        if checkpoint.is_dummy:
            init_dummy(decoder, options.seed)
        else:
            load_weights(decoder, checkpoint.tensors())
        decoder.pack()
    bytes_per_page = model.kv_bytes_per_token(kv_dtype.itemsize) * options.page_size
    total_pages = pool_pages(options, max_model_len, bytes_per_page, device)
    kv_cache = PagedKVCache(
        num_layers=model.num_layers,
        num_pages=total_pages,
        page_size=options.page_size,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=kv_dtype,
        device=device,
        layout=choice.backend.preferred_layout(device),
    )
    runner = ModelRunner(
        decoder,
        choice.backend(spec, kv_cache),
        kv_cache,
        LaneState(options.max_num_seqs, model.vocab_size, device),
        num_threads=options.num_threads,
        debug=options.debug,
    )
    facts = RunnerFacts(
        model=model,
        device=device,
        dtype=dtype,
        kv_dtype=kv_dtype,
        total_pages=total_pages,
        max_model_len=max_model_len,
        backend=choice,
    )
    return runner, facts


def _max_model_len(options: EngineOptions, model: ModelConfig) -> int:
    wanted = options.max_model_len
    if wanted is None:
        return model.max_position_embeddings
    if wanted > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len is {wanted}: the model was made for {model.max_position_embeddings} positions, "
            "use that or less"
        )
    return wanted

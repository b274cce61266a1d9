"""Everything that is validated of one model on one machine, in order."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from cascade_llm import __version__
from cascade_llm.config import CascadeConfig, EngineOptions, ModelConfig
from cascade_llm.device.devices import (
    KV_DTYPES,
    resolve_device,
    resolve_dtype,
    thread_count,
    thread_limit,
)
from cascade_llm.engine.assembly import start_executor
from cascade_llm.engine.tokenizer import load_tokenizer
from cascade_llm.errors import ConfigError
from cascade_llm.kv_cache.page_dtypes import bytes_per_number
from cascade_llm.loader.checkpoint import Checkpoint
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.validation.attention_check import check_attention
from cascade_llm.validation.engine_check import BATCH, EngineLoad, check_engine
from cascade_llm.validation.options import OPTIONS
from cascade_llm.validation.report import Check, Progress, Section, ValidationReport
from cascade_llm.validation.text import text_token_ids
from cascade_llm.validation.transformers_check import check_transformers
from cascade_llm.worker.executor import Executor, LocalExecutor
from cascade_llm.worker.pool_sizes import PoolShape
from cascade_llm.worker.worker import WorkerFacts

__all__ = ["FULL", "QUICK", "Effort", "validate"]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is validated."""

    cases_per_family: int
    load: EngineLoad
    prompt_lens: tuple[int, ...]
    """Of the comparison with transformers."""
    num_new: int


QUICK = Effort(
    cases_per_family=8,
    load=EngineLoad(prefix_len=64, num_places=24, num_settling=12, num_observed=8),
    prompt_lens=(3, 40),
    num_new=12,
)
FULL = Effort(
    cases_per_family=64,
    load=EngineLoad(prefix_len=512, num_places=64, num_settling=16, num_observed=8),
    prompt_lens=(1, 5, 17, 64, 200, 450),
    num_new=32,
)


def validate(
    model: str | os.PathLike[str],
    options: Mapping[str, Any],
    *,
    effort: Effort = FULL,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> ValidationReport:
    """Compare backends, engine and model with their references; see the modules of this package for the rules.

    Args:
        model: as in `LLM`
        options: those of `options.OPTIONS`
        seed: of the generated plans, and of the text where there is no tokenizer

    Raises:
        CascadeError: the model cannot be loaded, or an option is wrong; a comparison that fails is no error
    """
    _check_names(options)
    checkpoint = open_checkpoint(model, load_format=str(options.get("load_format", "auto")))
    config = model_config_from_hf(checkpoint.hf_config(), checkpoint.generation_config())
    engine_options = _engine_options(options, config, effort)
    device = resolve_device(engine_options.device)
    progress(f"loading {checkpoint.name}", 0, 1)

    def on_start(stage: str, done: int, total: int) -> None:
        progress(f"{checkpoint.name}: {stage}", done, total)

    # first: what cannot be served is known at once
    with closing(start_executor(engine_options, checkpoint, on_start)) as executor:
        facts = executor.facts
        sections: list[Section] = []

        def add(title: str, make: Callable[[], list[Check]]) -> None:
            start = time.perf_counter()
            with thread_limit(engine_options.num_threads):
                checks = make()
            sections.append(Section(title, checks, time.perf_counter() - start))

        add(
            "attention backends against float64",
            lambda: check_attention(
                config,
                device,
                cases_per_family=effort.cases_per_family,
                seed=seed,
                progress=progress,
                kv_dtype=KV_DTYPES.get(engine_options.kv_cache_dtype),
            ),
        )
        token_ids = text_token_ids(load_tokenizer(checkpoint.tokenizer_source), config.vocab_size, seed)
        page_size, max_levels = engine_options.page_size, max(2, engine_options.cascade_max_levels)
        add(
            "engine against itself",
            lambda: _check_engine(executor, token_ids, effort.load, page_size, max_levels, progress),
        )
        room = facts.max_model_len - effort.num_new
        prompts = [token_ids[: min(length, room)] for length in effort.prompt_lens]
        add(
            "model against transformers",
            lambda: check_transformers(
                executor, checkpoint, prompts, page_size=page_size, num_new=effort.num_new, progress=progress
            ),
        )
        return ValidationReport(_subject(checkpoint, facts, engine_options, seed), sections)


def _check_engine(
    executor: Executor, token_ids: Sequence[int], load: EngineLoad, page_size: int, max_levels: int, progress: Progress
) -> list[Check]:
    if isinstance(executor, LocalExecutor):
        runner, facts = executor.runner, executor.facts
        return check_engine(
            runner, facts, token_ids, load, page_size=page_size, max_levels=max_levels, progress=progress
        )
    note = "whole distributions do not come out of ranks in processes of their own: validate once with one rank"
    return [Check(name="the engine against itself", passed=None, note=note)]


def _check_names(options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in OPTIONS:
            raise ConfigError(f"validation sets {name} itself, to what it reads: leave it out")


def _engine_options(options: Mapping[str, Any], config: ModelConfig, effort: Effort) -> EngineOptions:
    """The user's options, and pools that hold one sequence more than `BATCH`, which share nothing."""
    wanted = max(effort.load.max_model_len, max(effort.prompt_lens) + effort.num_new)
    if wanted > config.max_position_embeddings:
        raise ConfigError(
            f"validation reads {wanted} tokens, the model was made for {config.max_position_embeddings}: "
            "use quick validation, which reads fewer"
        )
    given = EngineOptions(**options)
    dtype = resolve_dtype(given.dtype, config.dtype, resolve_device(given.device))
    number_bytes = bytes_per_number(KV_DTYPES.get(given.kv_cache_dtype, dtype), config.head_dim)
    engine_options = EngineOptions(
        **{
            **options,
            "dtype": str(dtype).removeprefix("torch."),
        },  # named, it is that of pages too unless they are asked for
        max_model_len=wanted,
        max_num_seqs=BATCH + 1,
        exact_activations=True,  # what rounding costs is no error of an engine: transformers does not round
    )
    shape = PoolShape.of(engine_options, config.held_by_ranks(given.tensor_parallel_size), wanted, number_bytes)
    pages = shape.with_windows(shape.max_num_seqs * shape.pages_per_sequence)
    return replace(engine_options, kv_cache_bytes=shape.num_bytes(pages))


def _subject(checkpoint: Checkpoint, facts: WorkerFacts, options: EngineOptions, seed: int) -> dict[str, Any]:
    cascade: CascadeConfig = options.cascade
    return {
        "cascade_llm": __version__,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "model": checkpoint.name,
        "device": str(facts.device),
        "dtype": str(facts.dtype).removeprefix("torch."),
        "kv_cache_dtype": str(facts.kv_dtype).removeprefix("torch."),
        "attention_backend": facts.backend.name,
        "page_size": options.page_size,
        "cascade_max_levels": cascade.max_levels,
        "num_threads": thread_count(options.num_threads),
        "tensor_parallel_size": options.tensor_parallel_size,
        "seed": seed,
    }

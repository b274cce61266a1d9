"""The one place where an engine is put together: checkpoint, executor, scheduler, text, recording."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace

from cascade_llm import __version__
from cascade_llm.config import CascadeConfig, EngineOptions, SchedulerConfig
from cascade_llm.device.devices import KV_DTYPES
from cascade_llm.engine.cost_setup import choose_cost_model
from cascade_llm.engine.engine import Engine, StepEvent, StepObserver
from cascade_llm.engine.input_processor import InputProcessor
from cascade_llm.engine.tokenizer import Tokenizer, load_tokenizer
from cascade_llm.loader.checkpoint import Checkpoint
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.plan_file import PlanFileHeader, PlanFileWriter
from cascade_llm.scheduler.cascade.choice import SegmentCosts
from cascade_llm.scheduler.scheduler import FlashInferScheduler
from cascade_llm.worker.executor import Executor, LocalExecutor
from cascade_llm.worker.process_executor import ProcessExecutor
from cascade_llm.worker.rank_options import check_ranks, options_of_rank
from cascade_llm.worker.start_progress import OnStart
from cascade_llm.worker.worker import WorkerFacts, build_worker

__all__ = ["EngineParts", "assemble", "build_scheduler", "start_executor"]


@dataclass(frozen=True)
class EngineParts:
    """An engine, and what stands beside it."""

    engine: Engine
    input_processor: InputProcessor
    tokenizer: Tokenizer | None
    facts: WorkerFacts
    model_name: str
    cost_source: str
    """Where the cost model's constants come from."""
    resources: ExitStack
    """What is closed with the engine, after it."""


def assemble(model: str | os.PathLike[str], options: EngineOptions, *, on_start: OnStart | None = None) -> EngineParts:
    """Load a model and build all that serves it.

    Args:
        model: a folder, a .gguf file, a hub id, or "smollm2"
        options: the user's
        on_start: told how far loading and capturing CUDA graphs are

    Raises:
        ConfigError, ModelError, CapacityError, BackendError: see `LLM`
    """
    checkpoint = open_checkpoint(model, load_format=options.load_format, revision=options.revision)
    with ExitStack() as resources:
        writer = _open_recording(options, resources)  # before the weights: a wrong path is known at once
        tokenizer = load_tokenizer(checkpoint.tokenizer_source)
        executor = start_executor(options, checkpoint, on_start)
        resources.callback(executor.close)
        facts = executor.facts
        num_threads = options_of_rank(options, 0).num_threads
        costs, cost_source = choose_cost_model(facts.attention, facts.backend.name, num_threads=num_threads)
        scheduler = build_scheduler(
            facts,
            costs,
            page_size=options.page_size,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            cascade=options.cascade,
            enable_prefix_caching=options.enable_prefix_caching,
            cache_salt=checkpoint.name.encode(),
        )
        lag = options.schedule_lag
        engine = Engine(
            scheduler,
            executor,
            tokenizer,
            lag=int(facts.device.type == "cuda") if lag is None else lag,
            on_step=[] if writer is None else [_begin_recording(writer, options, checkpoint.name, facts)],
        )
        processor = InputProcessor(
            tokenizer,
            vocab_size=facts.model.vocab_size,
            max_model_len=facts.max_model_len,
            ending_token_ids=facts.model.ending_token_ids | (tokenizer.eos_token_ids if tokenizer else frozenset()),
            seed=options.seed,
        )
        return EngineParts(
            engine, processor, tokenizer, facts, checkpoint.name, cost_source, resources=resources.pop_all()
        )


def build_scheduler(
    facts: WorkerFacts,
    costs: SegmentCosts,
    *,
    page_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    cascade: CascadeConfig | None = None,
    enable_prefix_caching: bool = True,
    cache_salt: bytes = b"",
) -> FlashInferScheduler:
    """A scheduler over the pool of a worker; the arguments are those of `SchedulerConfig`."""
    config = SchedulerConfig(
        page_size=page_size,
        total_pages=facts.total_pages,
        max_model_len=facts.max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=enable_prefix_caching,
        cascade=cascade or CascadeConfig(),
        cache_salt=cache_salt,
        attention_kinds=facts.model.attention_kinds,
        layer_kinds=facts.model.layer_kinds,
        window_pages=facts.window_pages,
    )
    return FlashInferScheduler(config, costs)


def start_executor(options: EngineOptions, checkpoint: Checkpoint, on_start: OnStart | None = None) -> Executor:
    """Load a model into this process, or into ranks of their own; raises what `assemble` does."""
    if options.distributed_executor_backend == "mp" or options.tensor_parallel_size > 1:
        check_ranks(options, model_config_from_hf(checkpoint.hf_config(), checkpoint.generation_config()))
        # by path: asked for the name again, a hub might give what was pushed meanwhile
        assert checkpoint.path is not None
        return ProcessExecutor(checkpoint.path, replace(options, revision=None), on_start=on_start)
    return LocalExecutor(*build_worker(options, checkpoint, on_start=on_start))


def _open_recording(options: EngineOptions, resources: ExitStack) -> PlanFileWriter | None:
    """The file that `record_plans` names, if it names one. Raises `ConfigError` where it cannot be written."""
    if options.record_plans is None:
        return None
    writer = PlanFileWriter(options.record_plans, token_ids=options.record_token_ids)
    resources.callback(writer.close)
    return writer


def _page_dtype_name(facts: WorkerFacts) -> str:
    """As `PlanFileHeader` has it."""
    name = next(name for name, dtype in KV_DTYPES.items() if dtype == facts.kv_dtype)
    return "auto" if facts.kv_dtype == facts.dtype else name


def _begin_recording(
    writer: PlanFileWriter, options: EngineOptions, model_name: str, facts: WorkerFacts
) -> StepObserver:
    """Write down what was found out at start; returns the observer that writes the steps."""
    model = facts.model
    header = PlanFileHeader(
        cascade_llm=__version__,
        model=model_name,
        num_layers=model.num_layers,
        num_qo_heads=model.num_qo_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        sm_scale=model.sm_scale,
        dtype=str(facts.dtype).removeprefix("torch."),
        page_size=options.page_size,
        pool_pages=list(facts.pool_pages),
        max_model_len=facts.max_model_len,
        max_num_seqs=options.max_num_seqs,
        token_ids=options.record_token_ids,
        kv_cache_dtype=_page_dtype_name(facts),
        attention_soft_cap=model.attention_soft_cap,
    )
    writer.begin(header)

    def record(event: StepEvent) -> None:
        if event.result is None:
            writer.write_step(event.plan)
        else:
            writer.write_result(event.result)

    return record

"""One rank: from options and a checkpoint to a model runner on a device."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial

import torch

from cascade_llm.attention.backend import AttentionBackend, AttentionSpec
from cascade_llm.attention.flashinfer.backend import FlashInferAttentionBackend, GpuPlatform
from cascade_llm.attention.flashinfer.workspace import float_workspace_bytes
from cascade_llm.attention.select import BackendChoice, select_backend
from cascade_llm.config import EngineOptions, ModelConfig
from cascade_llm.device.devices import (
    compute_capability,
    resolve_device,
    resolve_dtype,
    resolve_page_dtype,
    thread_limit,
)
from cascade_llm.device.huge_pages import collect_into_huge_pages
from cascade_llm.device.ranks import Ranks
from cascade_llm.device.start_errors import compiled_kernels, memory_for
from cascade_llm.errors import ConfigError
from cascade_llm.kv_cache.paged_kv_cache import KVLayout, KVScale, PagedKVCache
from cascade_llm.layers.flashinfer_layer_ops import FlashInferLayerOps
from cascade_llm.layers.rope import max_context_len
from cascade_llm.loader.checkpoint import Checkpoint
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.models.decoder import Decoder
from cascade_llm.models.loading import KVScaleReader, check_shapes, init_dummy, load_weights
from cascade_llm.sampling.lane_tables import UsageCounts
from cascade_llm.sampling.lanes import LaneState
from cascade_llm.weights.format import WeightOptions
from cascade_llm.weights.select import describe_weights
from cascade_llm.worker import memory
from cascade_llm.worker.cuda_graphs import CaptureReport, CudaGraphs
from cascade_llm.worker.graph_shapes import GraphShape, graph_shapes
from cascade_llm.worker.memory import available_bytes, check_sizes, step_bytes
from cascade_llm.worker.model_runner import ModelRunner
from cascade_llm.worker.pool_sizes import PoolShape
from cascade_llm.worker.recorded_steps import RecordedSteps
from cascade_llm.worker.start_progress import CAPTURING, OnStart, told_tensors

__all__ = ["WorkerFacts", "build_worker"]

log = logging.getLogger("cascade_llm")

BESIDE_THE_POOL = "lanes and workspaces beside the KV pool: lower gpu_memory_utilization or max_num_seqs"


@dataclass(frozen=True, kw_only=True)
class WorkerFacts:
    """What was found out at start; never changed afterwards."""

    model: ModelConfig
    attention: AttentionSpec
    total_pages: int
    """Of the pool of the first attention kind, or of all kinds."""
    max_model_len: int
    backend: BackendChoice
    window_pages: tuple[int, ...] = ()
    """Of the pools of their own that the other kinds have; empty where all kinds have one."""
    capture: CaptureReport | None = None
    """What capturing graphs took; None where there are none."""

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.attention.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.attention.dtype

    @property
    def kv_dtype(self) -> torch.dtype:
        """What K and V are stored in."""
        return self.attention.page_dtype

    @property
    def pool_pages(self) -> tuple[int, ...]:
        """Of all pools."""
        return self.total_pages, *self.window_pages

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token over all layers."""
        return self.model.kv_bytes_per_token(self.attention.kv_number_bytes)


def build_worker(
    options: EngineOptions,
    checkpoint: Checkpoint,
    *,
    ranks: Ranks | None = None,
    platform: GpuPlatform | None = None,
    on_start: OnStart | None = None,
    pool_pages: tuple[int, ...] | None = None,
) -> tuple[ModelRunner, WorkerFacts]:
    """Load the weights, size the KV pool, choose the backend, capture graphs.

    Args:
        options: the user's
        checkpoint: the model's files
        ranks: that share the model; default this one alone
        platform: the GPU and FlashInfer, taken without asking; default the CUDA device where FlashInfer can serve
        on_start: told how far loading and capturing are
        pool_pages: of each pool, whatever the memory; default what `memory.pool_pages` says
    """
    ranks = ranks or Ranks()
    model = model_config_from_hf(checkpoint.hf_config(), checkpoint.generation_config())
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, model.dtype, device)
    pages = resolve_page_dtype(options, dtype, device, checkpoint.main_type)
    log.info("pages of K and V: %s (%s)", *pages)
    max_model_len = _max_model_len(options, model)
    spec = AttentionSpec.for_model(model, dtype, device, pages.dtype, ranks)
    own_part = replace(model, num_kv_heads=spec.num_kv_heads)
    pools = PoolShape.of(options, own_part, max_model_len, spec.kv_number_bytes)
    check_sizes(options, model, dtype, pools.least_bytes, max_model_len, ranks, checkpoint.num_bytes)
    choice, platform = _backend_choice(options, spec, platform)
    with torch.inference_mode(), thread_limit(options.num_threads), compiled_kernels(), memory_for(BESIDE_THE_POOL):
        decoder, scales = _decoder(options, checkpoint, model, dtype, device, max_model_len, ranks, platform, on_start)
        padding = 0 if platform is None else 1  # the padding rows of graphs have a page and a lane of their own
        num_lanes = options.max_num_seqs + padding
        has_graphs = platform is not None and not options.enforce_eager and not options.debug
        if has_graphs and (refused := decoder.reason_against_capture):
            log.warning("every step is launched anew, without CUDA graphs: %s", refused)
            has_graphs = False
        shapes: list[GraphShape] = []
        if has_graphs:
            shapes = graph_shapes(options.max_num_seqs, spec.group_size, options.cascade.max_shared_levels)
        reserved = 0 if device.type == "cpu" else step_bytes(decoder, options, has_graphs=has_graphs)
        if platform is not None:
            reserved += float_workspace_bytes(spec, platform.num_processors, shapes)
        if has_graphs:
            reserved += UsageCounts.bytes_needed(num_lanes, model.vocab_size, max_model_len)
        total_pages, *window_pages = pool_pages or memory.pool_pages(options, pools, device, ranks, reserved)
        layout = choice.backend.preferred_layout(device)
        kind_pages = [pages + padding for pages in (total_pages, *window_pages)]
        kv_cache = _kv_cache(options, model, spec, kind_pages, layout, scales)
        lanes = LaneState(
            num_lanes,
            model.vocab_size,
            device,
            max_model_len=max_model_len,
            upload=platform.stream.upload if platform else None,
            in_graphs=has_graphs,
        )
        backend: AttentionBackend
        graphs = report = None
        if platform is None:
            backend = choice.backend(spec, kv_cache)
        else:
            backend = FlashInferAttentionBackend(spec, kv_cache, platform, graph_shapes=shapes)
            if has_graphs:
                most_rows = options.max_num_batched_tokens
                graphs, report = _capture(decoder, backend, lanes, shapes, max_model_len, most_rows, ranks, on_start)
    runner = ModelRunner(
        decoder,
        backend,
        kv_cache,
        lanes,
        num_threads=options.num_threads,
        debug=options.debug,
        ranks=ranks,
        stream=platform.stream if platform else None,
        graphs=graphs,
        recorded=_recorded_steps(options, decoder, backend, ranks),
    )
    facts = WorkerFacts(
        model=model,
        attention=spec,
        total_pages=total_pages,
        window_pages=tuple(window_pages),
        max_model_len=max_model_len,
        backend=choice,
        capture=report,
    )
    return runner, facts


def _recorded_steps(
    options: EngineOptions, decoder: Decoder, backend: AttentionBackend, ranks: Ranks
) -> RecordedSteps | None:
    """What a CPU has in the place of graphs; None where every step is to run as Python says."""
    if options.enforce_eager or options.debug:
        return None
    if reasons := RecordedSteps.reasons_against(decoder, backend, ranks):
        log.info("steps are run by Python, call by call: %s", "; ".join(reasons))
        return None
    return RecordedSteps(decoder, backend)


def _backend_choice(
    options: EngineOptions, spec: AttentionSpec, platform: GpuPlatform | None
) -> tuple[BackendChoice, GpuPlatform | None]:
    """The backend, and the GPU where it is FlashInfer's; a platform that is given is taken without asking."""
    if platform is not None:
        return BackendChoice(name="flashinfer", backend=FlashInferAttentionBackend, refused=()), platform
    choice = select_backend(options.attention_backend, spec)
    is_slow = spec.device.type == "cuda" and choice.name != "flashinfer" and options.attention_backend == "auto"
    log.log(logging.WARNING if is_slow else logging.INFO, choice.describe())
    return choice, GpuPlatform.cuda(spec.device) if choice.name == "flashinfer" else None


def _decoder(
    options: EngineOptions,
    checkpoint: Checkpoint,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    ranks: Ranks,
    platform: GpuPlatform | None,
    on_start: OnStart | None,
) -> tuple[Decoder, list[KVScale] | None]:
    """The model with its weights, and the scales of pages of 8-bit floats."""
    free = available_bytes(device)
    with memory_for(f"the weights: {free:,} bytes were free; take a smaller model, or end what else holds memory"):
        scales = KVScaleReader(model.num_layers)
        ops = None
        if platform is not None:
            ops = FlashInferLayerOps(platform.ops, device, options.max_num_batched_tokens)
        weights = WeightOptions(
            dtype=dtype,
            device=device,
            quantization=options.quantization,
            exact_activations=options.exact_activations,
            on_stream=platform is not None,
            arch=platform.arch if platform is not None else compute_capability(device),
        )
        decoder = Decoder(model, weights, max_positions=max_model_len, ops=ops, ranks=ranks)
        if checkpoint.is_dummy:
            init_dummy(decoder, options.seed)
        else:
            check_shapes(decoder, checkpoint.shapes(), checkpoint.stored_name)
            load_weights(decoder, scales.without_scales(told_tensors(checkpoint, on_start)))
        num_huge = collect_into_huge_pages(part for linear in decoder.linears for part in linear.matrix.memory)
        _tell_weights(decoder, num_huge)
    return decoder, scales.scales() if options.kv_cache_dtype == "fp8_e4m3" else None


def _tell_weights(decoder: Decoder, num_huge: int) -> None:
    """What the matrices are kept as, and what is slower and larger than in its file.

    `num_huge`: bytes of them that lie in huge pages.
    """
    linears, dtype = decoder.linears, str(decoder.dtype).removeprefix("torch.")
    log.info(describe_weights(linear.matrix for linear in linears))
    log.info("weights: %d MB lie in huge pages of 2 MiB", num_huge // 10**6)
    if decoded := sorted(frozenset[str]().union(*(linear.decoded for linear in linears))):
        log.warning(
            "%s of the checkpoint %s no kernel here: decoded to %s, %d bits a weight that every step reads; "
            "`cascade-llm env --models` lists the types that are kept as they are",
            ", ".join(decoded),
            "has" if len(decoded) == 1 else "have",
            dtype,
            8 * decoder.dtype.itemsize,
        )
    for note in sorted({note for linear in linears if (note := linear.matrix.note)}):
        log.warning("weights: %s", note)


def _kv_cache(
    options: EngineOptions,
    model: ModelConfig,
    spec: AttentionSpec,
    kind_pages: list[int],
    layout: KVLayout,
    scales: list[KVScale] | None,
) -> PagedKVCache:
    """The pools; memory that was free a moment ago may have gone to another process."""
    pages = " + ".join(f"{count:,}" for count in kind_pages)
    with memory_for(
        f"the KV pool of {pages} pages: another process has taken memory since it was measured; lower "
        "gpu_memory_utilization, or give kv_cache_bytes"
    ):
        return PagedKVCache(
            num_layers=spec.num_layers,
            num_pages=kind_pages,
            page_size=options.page_size,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=spec.page_dtype,
            device=spec.device,
            layout=layout,
            scales=scales,
            layer_kinds=model.layer_kinds,
        )


def _capture(
    decoder: Decoder,
    backend: FlashInferAttentionBackend,
    lanes: LaneState,
    shapes: list[GraphShape],
    max_model_len: int,
    max_num_batched_tokens: int,
    ranks: Ranks,
    on_start: OnStart | None,
) -> tuple[CudaGraphs, CaptureReport]:
    """Capture the decode steps, and the pieces of mixed ones."""
    with backend.device.stream.active():
        graphs = CudaGraphs(
            decoder,
            backend,
            lanes,
            shapes=shapes,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            ranks=ranks,
        )
        report = graphs.capture(None if on_start is None else partial(on_start, CAPTURING))
    log.info(
        "captured %d graphs in %.1f s, %.0f MiB; %.0f MiB of token counts for penalties",
        report.num_graphs,
        report.seconds,
        report.num_bytes / (1 << 20),
        report.usage_bytes / (1 << 20),
    )
    return graphs, report


def _max_model_len(options: EngineOptions, model: ModelConfig) -> int:
    wanted = options.max_model_len
    longest = max_context_len(model)
    if wanted is not None and wanted > longest:
        raise ConfigError(f"max_model_len is {wanted}: the model was made for {longest} positions, use that or less")
    return longest if wanted is None else wanted

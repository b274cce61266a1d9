"""`python -m benchmarks serve`: our server and another engine's, one after the other, by the same requests."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cascade_llm.cli.bench_latency import several_arrivals_options
from cascade_llm.cli.bench_serve import loads_by_number, service_level, show_sweep, slo_options
from cascade_llm.cli.bench_throughput import load_options
from cascade_llm.cli.bench_workloads import WorkloadGroup
from cascade_llm.cli.console import run_bar
from cascade_llm.cli.field_options import model_option, stacked
from cascade_llm.cli.output_files import Outputs, output_options

if TYPE_CHECKING:
    from benchmarks.servers import ServerNeeds
    from cascade_llm.bench.setup import BenchModel
    from cascade_llm.bench.workloads import Workload

__all__ = ["serve"]

serve_options = stacked(
    model_option,
    several_arrivals_options,
    load_options,
    slo_options,
    output_options,
    click.option("--against", type=click.Choice(["vllm", "llama.cpp"]), help="The other engine; default: ours alone."),
    click.option(
        "--program",
        type=click.Path(path_type=Path, exists=True),
        help="The interpreter with vLLM, or llama-server.",
    ),
    click.option("--dtype", default="bfloat16", show_default=True, help="Of ours, and of vLLM."),
    click.option("--num-threads", type=click.IntRange(min=1), help="Of each engine; default: the physical cores."),
    click.option("--max-num-seqs", type=click.IntRange(min=1), default=64, show_default=True, help="Of each server."),
    click.option("--kv-cache-gib", type=click.IntRange(min=1), default=2, show_default=True, help="Ours and vLLM's."),
)
"""All options of a workload's command."""


def _run(
    workload: Workload,
    *,
    out: Outputs,
    model: str,
    against: str | None,
    program: Path | None,
    arrivals: Any,
    history: Any,
    temperature: float | None,
    top_p: float,
    repeat: int,
    slo_ttft: float | None,
    slo_tpot: float | None,
    dtype: str,
    **sizes: Any,
) -> None:
    if (against is None) != (program is None):
        raise click.UsageError("--against and --program belong together: name the engine and where it is.")
    out.check()
    from benchmarks.servers import started_server
    from cascade_llm.bench.serve_sweep import ServeSweep
    from cascade_llm.bench.setup import open_model

    bench = open_model(model, {"dtype": dtype})
    loads = loads_by_number(
        workload, lambda numbered: bench.load(numbered, temperature=temperature, top_p=top_p), history
    )
    sweep = ServeSweep(model, loads, arrivals, repeat=repeat, slo=service_level(slo_ttft, slo_tpot))
    names = ["cascade-llm", *([] if against is None else [against])]
    with ExitStack() as stack, run_bar(len(names) * sweep.num_requests) as on_run:
        path = _model_path(bench, against, stack)
        for name in names:
            needs = _needs(path, None if name == "cascade-llm" else program, loads(0).longest, dtype, **sizes)
            with started_server(name, needs) as server:
                sweep.measure({name: server}, lambda name=name: on_run(name))  # type: ignore[misc]
            if sweep.is_interrupted:
                break
    show_sweep(sweep, out)


def _needs(
    model: Path,
    program: Path | None,
    longest: int,
    dtype: str,
    *,
    num_threads: int | None,
    max_num_seqs: int,
    kv_cache_gib: int,
) -> ServerNeeds:
    import torch

    from benchmarks.servers import ServerNeeds

    return ServerNeeds(
        model=model,
        program=program,
        max_model_len=-(-(longest + 1) // 64) * 64,
        max_num_seqs=max_num_seqs,
        num_threads=num_threads or torch.get_num_threads(),
        kv_cache_gib=kv_cache_gib,
        dtype=dtype,
    )


def _model_path(bench: BenchModel, against: str | None, stack: ExitStack) -> Path:
    """One folder or file for both servers: a .gguf file where llama.cpp is one of them, a copy in `dtype` for vLLM."""
    from cascade_llm.errors import ConfigError
    from cascade_llm.loader.hf_folder import HuggingFaceCheckpoint, write_hf_folder

    source = bench.checkpoint.tokenizer_source
    if isinstance(bench.checkpoint, HuggingFaceCheckpoint) and against != "llama.cpp":
        return bench.checkpoint.folder
    if against != "vllm":
        if source is None or not source.is_file():
            raise ConfigError("llama.cpp reads .gguf files: give one by --model")
        return source
    from cascade_llm.engine.tokenizer import load_tokenizer

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cascade-llm-")))
    write_hf_folder(bench.checkpoint, folder, bench.dtype)
    if (tokenizer := load_tokenizer(source)) is not None:
        tokenizer.save(folder)
    return folder


@click.group(cls=WorkloadGroup, run=_run, options=serve_options)
def serve() -> None:
    """Our server and another engine's, one after the other, each started for it: latency, throughput, goodput."""

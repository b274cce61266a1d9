"""`cascade-llm bench serve`: latency and throughput of a server that speaks OpenAI's protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cascade_llm.cli.bench_latency import arrival_options, with_history
from cascade_llm.cli.bench_throughput import load_options
from cascade_llm.cli.bench_workloads import WorkloadGroup
from cascade_llm.cli.console import run_bar
from cascade_llm.cli.field_options import stacked
from cascade_llm.cli.output_files import Outputs, output_options
from cascade_llm.errors import BackendError

if TYPE_CHECKING:
    from cascade_llm.bench.load import History, Load
    from cascade_llm.bench.online import Arrivals
    from cascade_llm.bench.workloads import Workload

__all__ = ["serve"]

serve_options = stacked(
    arrival_options,
    load_options,
    output_options,
    click.option("--url", default="http://localhost:8000", show_default=True, help="Of the server."),
    click.option("--served-model", help="The model's name at the server; default: its first."),
    click.option("--api-key", envvar="OPENAI_API_KEY", help="Sent as a bearer token."),
    click.option("--tokenizer", help="A model whose tokenizer reads texts: a folder, .gguf file or hub id."),
    click.option(
        "--vocab-size", type=click.IntRange(min=1), default=10_000, show_default=True, help="Token ids are below it."
    ),
    click.option("--ignore-eos/--no-ignore-eos", default=True, help="Ask for outputs of full length."),
)
"""All options of a workload's command."""


def _run(
    workload: Workload,
    *,
    out: Outputs,
    url: str,
    served_model: str | None,
    api_key: str | None,
    tokenizer: str | None,
    vocab_size: int,
    ignore_eos: bool,
    arrivals: Arrivals,
    history: History,
    temperature: float | None,
    top_p: float,
    repeat: int,
) -> None:
    out.check()
    from cascade_llm.bench.latency import LatencyReport, LatencyRun
    from cascade_llm.bench.reading import Reading
    from cascade_llm.bench.serve_client import CompletionsServer, run_against_server

    load = with_history(_load(workload, tokenizer, vocab_size, temperature, top_p), history)
    load.check(1 << 62)
    server = CompletionsServer(url, model=served_model, api_key=api_key)
    report = LatencyReport(server.model, load, arrivals)
    report.sides[url] = {"model": server.model, "ignore_eos": ignore_eos}
    errors: list[str] = []
    with run_bar(repeat * len(load.requests)) as on_run:
        for turn in range(repeat):
            try:
                run = run_against_server(
                    server,
                    load,
                    arrivals,
                    ignore_eos=ignore_eos,
                    on_end=lambda turn=turn: on_run(f"run {turn + 1}"),  # type: ignore[misc]
                )
            except KeyboardInterrupt:
                report.interrupted = True
                break
            errors += run.errors
            if run.succeeded:
                timings = [answer.timing for answer in run.succeeded]
                num_generated = sum(answer.num_generated for answer in run.succeeded)
                reading = Reading(run.elapsed_s, num_generated, {"failed": len(run.errors)})
                report.runs.setdefault(url, []).append(LatencyRun.of(timings, reading))
            if "interrupted" in run.errors:
                report.interrupted = True
                break
    if not report.runs:
        raise BackendError(f"no request succeeded; the first error: {errors[0] if errors else 'interrupted'}")
    from cascade_llm.cli.latency_report import charts, print_latency, title

    record = {**report.as_dict(), "errors": errors}
    out.deliver(record, lambda: print_latency(report, errors), lambda: charts(report.runs), caption=title(report))
    if report.interrupted:
        raise click.Abort


def _load(workload: Workload, tokenizer: str | None, vocab_size: int, temperature: float | None, top_p: float) -> Load:
    from cascade_llm.bench.workloads import Vocabulary

    if tokenizer is None:
        return workload.load(Vocabulary(vocab_size), temperature=temperature, top_p=top_p)
    from cascade_llm.engine.tokenizer import load_tokenizer
    from cascade_llm.loader.resolve import open_checkpoint

    checkpoint = open_checkpoint(tokenizer, load_format="dummy")
    size = int(checkpoint.hf_config().get("vocab_size") or vocab_size)
    vocabulary = Vocabulary(size, lambda: load_tokenizer(checkpoint.tokenizer_source))
    return workload.load(vocabulary, temperature=temperature, top_p=top_p)


@click.group(cls=WorkloadGroup, run=_run, options=serve_options)
def serve() -> None:
    """Measure a server that speaks OpenAI's protocol: time to first token, between tokens, to the end."""

"""`cascade-llm bench serve`: latency and throughput of a server that speaks OpenAI's protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from cascade_llm.cli.bench_latency import several_arrivals_options, with_history
from cascade_llm.cli.bench_throughput import load_options
from cascade_llm.cli.bench_workloads import WorkloadGroup
from cascade_llm.cli.console import run_bar
from cascade_llm.cli.field_options import stacked
from cascade_llm.cli.output_files import Outputs, output_options

if TYPE_CHECKING:
    from cascade_llm.bench.load import History, Load
    from cascade_llm.bench.online import Arrivals
    from cascade_llm.bench.serve_sweep import ServeSweep
    from cascade_llm.bench.slo import ServiceLevel
    from cascade_llm.bench.workloads import Vocabulary, Workload

__all__ = ["loads_by_number", "serve", "service_level", "show_sweep", "slo_options"]

slo_options = stacked(
    click.option("--slo-ttft", type=float, help="Milliseconds to the first token that count as in time."),
    click.option("--slo-tpot", type=float, help="Milliseconds between a request's tokens, in the mean, that do."),
)
"""What the goodput is counted by."""

serve_options = stacked(
    several_arrivals_options,
    load_options,
    slo_options,
    output_options,
    click.option("--url", default="http://localhost:8000", show_default=True, help="Of the server."),
    click.option("--against", multiple=True, help="URL of another server to take turns with; may be repeated."),
    click.option("--served-model", help="The model's name at the servers; default: the first of each."),
    click.option("--api-key", envvar="OPENAI_API_KEY", help="Sent as a bearer token."),
    click.option("--tokenizer", help="A model whose tokenizer reads texts: a folder, .gguf file or hub id."),
    click.option(
        "--vocab-size", type=click.IntRange(min=1), default=10_000, show_default=True, help="Token ids are below it."
    ),
    click.option("--ignore-eos/--no-ignore-eos", default=True, help="Ask for outputs of full length."),
)
"""All options of a workload's command."""


def service_level(slo_ttft: float | None, slo_tpot: float | None) -> ServiceLevel | None:
    """The bounds of the options; None where neither is given, no bound for one that is not."""
    from cascade_llm.bench.slo import ServiceLevel

    if slo_ttft is None and slo_tpot is None:
        return None
    return ServiceLevel(*(float("inf") if ms is None else ms / 1e3 for ms in (slo_ttft, slo_tpot)))


def loads_by_number(workload: Workload, make: Callable[[Workload], Load], history: History) -> Callable[[int], Load]:
    """The load of the run of that number: other token ids where the workload has a seed, the same lengths."""

    def load(number: int) -> Load:
        seed = getattr(workload, "seed", None)
        numbered = workload if seed is None else replace(workload, seed=seed + number)  # type: ignore[type-var]
        made = with_history(make(numbered), history)
        made.check(1 << 62)
        return made

    return load


def _run(
    workload: Workload,
    *,
    out: Outputs,
    url: str,
    against: Sequence[str],
    served_model: str | None,
    api_key: str | None,
    tokenizer: str | None,
    vocab_size: int,
    ignore_eos: bool,
    arrivals: Sequence[Arrivals],
    history: History,
    temperature: float | None,
    top_p: float,
    repeat: int,
    slo_ttft: float | None,
    slo_tpot: float | None,
) -> None:
    out.check()
    from cascade_llm.bench.serve_client import CompletionsServer
    from cascade_llm.bench.serve_sweep import ServeSweep

    vocabulary = _vocabulary(tokenizer, vocab_size)
    loads = loads_by_number(
        workload, lambda numbered: numbered.load(vocabulary, temperature=temperature, top_p=top_p), history
    )
    loads(0)
    slo = service_level(slo_ttft, slo_tpot)
    servers = {each: CompletionsServer(each, model=served_model, api_key=api_key) for each in (url, *against)}
    sweep = ServeSweep(servers[url].model, loads, arrivals, repeat=repeat, slo=slo, ignore_eos=ignore_eos)
    with run_bar(len(servers) * sweep.num_requests) as on_run:
        sweep.measure(servers, lambda: on_run("requests"))
    show_sweep(sweep, out)


def show_sweep(sweep: ServeSweep, out: Outputs) -> None:
    """Deliver what was measured; aborts where that was interrupted."""
    if not any(report.runs for report in sweep.reports):
        raise click.Abort
    from cascade_llm.cli.serve_report import print_sweep, sweep_charts, sweep_title

    out.deliver(
        sweep.as_dict(), lambda: print_sweep(sweep), lambda: sweep_charts(sweep), caption=sweep_title(sweep), columns=2
    )
    if sweep.is_interrupted:
        raise click.Abort


def _vocabulary(tokenizer: str | None, vocab_size: int) -> Vocabulary:
    from cascade_llm.bench.workloads import Vocabulary

    if tokenizer is None:
        return Vocabulary(vocab_size)
    from cascade_llm.engine.tokenizer import load_tokenizer
    from cascade_llm.loader.resolve import open_checkpoint

    checkpoint = open_checkpoint(tokenizer, load_format="dummy")
    size = int(checkpoint.hf_config().get("vocab_size") or vocab_size)
    return Vocabulary(size, lambda: load_tokenizer(checkpoint.tokenizer_source))


@click.group(cls=WorkloadGroup, run=_run, options=serve_options)
def serve() -> None:
    """Measure servers that speak OpenAI's protocol: time to first token, between tokens, to the end; goodput."""

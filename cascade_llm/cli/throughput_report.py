"""A throughput measurement in words, tables and charts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from cascade_llm.bench.load import Load
from cascade_llm.bench.throughput import ThroughputReport
from cascade_llm.cli.charts import Bars, Stacks
from cascade_llm.cli.console import format_bytes

__all__ = [
    "charts",
    "limit_lines",
    "load_line",
    "machine_line",
    "parts_table",
    "ratio_lines",
    "saved_lines",
    "setting_lines",
    "speeds_table",
]

MEANINGS = {
    "cold": "from an empty prefix cache, prefill included",
    "warm": "prompts cached, time to the first token included",
    "decode": "prompts cached, after the first token",
}


def load_line(model: str, load: Load) -> str:
    """What was run."""
    sampling = "greedy" if load.temperature == 0 else f"temperature {load.temperature:g}, top_p {load.top_p:g}"
    return (
        f"{model}, {load.name}: {load.num_sequences:,} sequences of {len(load.requests):,} prompts, "
        f"{load.num_prompt_tokens:,} prompt tokens, {load.num_generated:,} generated, {sampling}"
    )


def speeds_table(report: ThroughputReport) -> Table:
    """One row per side and quantity."""
    table = Table()
    table.add_column("engine")
    table.add_column("run")
    for heading in (
        "output tok/s",
        "lowest to highest",
        "share of limit",
        "KV read",
        "KV saved",
        "prefilled",
        "cached",
    ):
        table.add_column(heading, justify="right")
    for side, readings in report.readings.items():
        for name in report.quantities():
            spread, share = report.tokens_per_s(side, name), report.share_of_limit(side, name)
            counters = readings["cold" if name == "cold" else "warm"][0].counters if name != "decode" else {}
            table.add_row(
                side,
                name,
                f"{spread.median:,.1f}",
                f"{spread.low:,.1f} to {spread.high:,.1f}",
                "" if share is None else f"{share:.0%}",
                *(
                    format_bytes(counters[key]) if key in counters else ""
                    for key in ("kv_bytes_read", "kv_bytes_saved")
                ),
                *(f"{counters[key]:,}" if key in counters else "" for key in ("prefilled_tokens", "cached_tokens")),
            )
    return table


def ratio_lines(report: ThroughputReport) -> Iterator[str]:
    """The main side against each other one."""
    for other in list(report.readings)[1:]:
        for name in report.compared(other):
            ratio, paired = report.ratio(other, name), report.paired.get(other) if name == "decode" else None
            spread = f"{ratio.low:.2f} to {ratio.high:.2f}"
            if paired is not None:
                spread = f"quartiles {spread} of {len(paired.step_s)} pairs of short turns"
            if report.has_equal_plans(other, name):
                spread += "; equal plans"
            yield f"{name} ({MEANINGS[name]}): {report.main} is {ratio.median:.2f} times as fast as {other} ({spread})"


def limit_lines(report: ThroughputReport) -> Iterator[str]:
    """The machine's limit and what it makes of this work."""
    limits = report.limits
    integers = f", {limits.linear_flops_per_s / 1e9:,.0f} with quantized weights"
    yield (
        f"limit: {format_bytes(limits.bytes_per_s)}/s from memory, {limits.flops_per_s / 1e9:,.0f} GFLOP/s in "
        f"{limits.dtype} products{integers if limits.linear_flops_per_s > limits.flops_per_s else ''}, measured with "
        f"{limits.num_threads} threads"
    )
    if _above_limit(report):
        yield "  a speed is above the limit: the machine was busier when it was measured, and no share of it is right"
    for run, floor in report.floors.items():
        readings = report.readings.get(report.main, {}).get(run)
        if run == "first" or not readings:
            continue
        work, seconds = floor.work, min(reading.elapsed_s for reading in readings)
        yield (
            f"  {run}: {work.num_steps:,} steps need {format_bytes(work.weight_bytes)} of weights, "
            f"{format_bytes(work.kv_bytes)} of K/V and {work.flops / 1e9:,.1f} GFLOP at least: {floor.seconds:.3g} s; "
            f"measured {seconds:.3g} s, {seconds / floor.seconds:.2f} times that"
        )


def _above_limit(report: ThroughputReport) -> bool:
    shares = [report.share_of_limit(side, name) for side in report.readings for name in report.quantities()]
    return any(share is not None and share > 1 for share in shares)


def saved_lines(report: ThroughputReport) -> Iterator[str]:
    """What cascade attention did."""
    for run in ("cold", "warm"):
        readings = report.readings.get(report.main, {}).get(run)
        if not readings:
            continue
        counters = readings[0].counters
        read, saved = counters["kv_bytes_read"], counters["kv_bytes_saved"]
        share = saved / (read + saved) if read + saved else 0.0
        yield (
            f"cascade, {run}: {counters['cascade_steps']} of {counters['steps']} steps shared prefixes; "
            f"{format_bytes(read)} of K/V read instead of {format_bytes(read + saved)} ({share:.0%} saved)"
        )
    for reason, num_steps in report.unshared_steps.items():
        yield f"{num_steps} steps of {report.main} shared nothing: {reason}"


def parts_table(report: ThroughputReport) -> Table:
    """Where a warm step's time goes."""
    table = Table(title="a warm step, milliseconds", title_justify="left")
    table.add_column("part")
    for side in report.step_parts_s:
        table.add_column(side, justify="right")
        table.add_column("share", justify="right")
    for part in dict.fromkeys(part for of_side in report.step_parts_s.values() for part in of_side):
        cells = []
        for of_side in report.step_parts_s.values():
            seconds = of_side.get(part, 0.0)
            cells += [f"{seconds * 1e3:.2f}", f"{seconds / max(1e-12, sum(of_side.values())):.0%}"]
        table.add_row(part, *cells)
    totals = [cell for of_side in report.step_parts_s.values() for cell in (f"{sum(of_side.values()) * 1e3:.2f}", "")]
    table.add_row("total", *totals, style="bold")
    return table


def setting_lines(
    sides: Mapping[str, Mapping[str, Any]], machine: Mapping[str, Any], *, interrupted: bool = False
) -> Iterator[str]:
    """Flags of every side, and the machine."""
    if interrupted:
        yield "interrupted: what was measured until then"
    for side, flags in sides.items():
        yield f"{side}: {', '.join(f'{name}={value}' for name, value in flags.items())}"
    yield machine_line(machine)


def machine_line(machine: Mapping[str, Any]) -> str:
    """Versions and processor in short."""
    versions, cpu = machine["versions"], machine["cpu"]
    devices = ", ".join(device["model"] for device in machine["devices"])
    return (
        f"cascade-llm {versions['cascade-llm']}, torch {versions['torch']}, {devices or cpu['name']}, "
        f"{cpu['torch_threads']} threads of {cpu['usable_cores']} cores"
    )


def charts(report: ThroughputReport) -> list[Bars | Stacks]:
    """Speeds, the ratios to each other side, and the parts of a step."""
    names = report.quantities()
    spreads = {side: [report.tokens_per_s(side, name) for name in names] for side in report.readings}
    drawn: list[Bars | Stacks] = [
        Bars(
            title="output tokens per second",
            y_label="tok/s",
            groups=names,
            values={side: [spread.median for spread in of_side] for side, of_side in spreads.items()},
            ranges={side: [(spread.low, spread.high) for spread in of_side] for side, of_side in spreads.items()},
            marks=[report.floor_tokens_per_s(name) for name in names],
            mark_label="machine's limit",
        )
    ]
    others = list(report.readings)[1:]
    if others:
        ratios = {other: [report.ratio(other, name) for name in names] for other in others}
        drawn.append(
            Bars(
                title=f"{report.main} over the others",
                y_label="times as fast",
                groups=names,
                values={other: [ratio.median for ratio in of_other] for other, of_other in ratios.items()},
                ranges={other: [(r.low, r.high) for r in of_other] for other, of_other in ratios.items()},
                marks=[1.0] * len(names),
            )
        )
    if report.step_parts_s:
        bars = {side: {p: s * 1e3 for p, s in parts.items()} for side, parts in report.step_parts_s.items()}
        drawn.append(Stacks(title="where a warm step's time goes", y_label="ms", bars=bars))
    return drawn

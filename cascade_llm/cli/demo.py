"""`cascade-llm demo`: many questions on one long system prompt, with cascade attention on and off."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from cascade_llm.cli.console import format_bytes, open_llm, result_console, run_bar
from cascade_llm.cli.field_options import SectionedCommand, engine_options, take_engine
from cascade_llm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from cascade_llm.bench.reading import Reading, Spread
    from cascade_llm.llm import LLM
    from cascade_llm.outputs import RequestOutput

__all__ = ["QUESTIONS", "demo", "demo_conversations", "demo_system_prompt"]

MODEL = "smollm2"
MAX_TOKENS = 32
MAX_MODEL_LEN = 2048
MEANINGS = {"cold": "prefill and decode", "warm": "prompts cached, so nearly all decode"}

Runs = Mapping[tuple[str, str], "Sequence[Reading]"]
"""By cascade attention ("on", "off") and kind ("cold", "warm")."""

QUESTIONS = (
    "Who founded Harrow Fell Observatory in 1961?",
    "In which year was the observatory founded?",
    "How high above the sea is the observatory?",
    "What is the nearest village?",
    "Who is the director of the observatory?",
    "Who is the head of the workshop?",
    "What is the Lantern?",
    "How often does the Lantern take a picture of the sun?",
    "What does the Wren look for?",
    "What colour are the torches?",
    "Which days are visitors welcome?",
    "When does a tour begin?",
    "How long does a tour take?",
    "What does a tour cost for adults?",
    "What is the observatory cat called?",
    "What is Bruno Halvorsen known for?",
    "How many beds are there in the sleeping house?",
    "How much do guests pay for a night?",
    "When is bed linen changed?",
    "How are the glass plates handled?",
    "Who is the nearest doctor?",
    "How high is the weather mast?",
    "When are proposals due?",
    "After how many months are data open to all?",
)


def demo_system_prompt() -> str:
    """The handbook that all questions are about."""
    return (files("cascade_llm.cli") / "demo_prompt.txt").read_text(encoding="utf-8")


def demo_conversations() -> list[list[dict[str, str]]]:
    """One per question."""
    system = {"role": "system", "content": demo_system_prompt()}
    return [[system, {"role": "user", "content": question}] for question in QUESTIONS]


@click.command(cls=SectionedCommand)
@click.option("--repeat", type=click.IntRange(min=1), default=2, show_default=True, help="Runs per engine.")
@engine_options(only=("dtype", "num_threads", "tensor_parallel_size"))
def demo(repeat: int, **arguments: Any) -> None:
    """Ask 24 questions on one long system prompt, with cascade attention on and off; about a minute."""
    start_s = time.perf_counter()
    console = result_console()
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    options = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": len(QUESTIONS), **take_engine(arguments)}
    with (
        open_llm(MODEL, {**options, "enable_cascade_attention": True}) as on,
        open_llm(MODEL, {**options, "enable_cascade_attention": False}) as off,
    ):
        from cascade_llm.bench.plan_tree import plan_tree
        from cascade_llm.bench.reading import measure
        from cascade_llm.cli.plan_drawing import draw_tree

        assert on.tokenizer is not None
        prompts = [on.tokenizer.encode_chat(messages) for messages in demo_conversations()]
        _heading(console, f"{on.model_name}: {len(prompts)} questions on one system prompt")
        console.print(draw_tree(plan_tree(prompts, on.facts.model, on.options, tokenizer=on.tokenizer)))
        answers, _ = measure(on, prompts, params, progress=True)
        _heading(console, "Answers")
        _print_answers(console, answers)
        with run_bar(1 + 4 * repeat) as on_run:
            on_run("cascade off, not counted")
            answers_off, _ = measure(off, prompts, params)
            runs = _take_turns({"on": on, "off": off}, prompts, params, repeat, on_run)
        _print_runs(console, runs, answers, answers_off)
        _print_machine(console, on)
    console.print(f"The whole demo took {time.perf_counter() - start_s:.0f} s.", style="dim")


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(text, style="bold")


def _print_answers(console: Console, answers: list[RequestOutput]) -> None:
    for question, answer in zip(QUESTIONS, answers, strict=True):
        console.print(question, style="cyan")
        console.print(f"  {answer['text'].strip()}", soft_wrap=True)
    console.print(
        f"(135 million parameters, greedy, {MAX_TOKENS} tokens at most: not every answer is right, on or off)",
        style="dim",
    )


def _print_runs(console: Console, runs: Runs, answers: list[RequestOutput], answers_off: list[RequestOutput]) -> None:
    _heading(console, "Cascade attention on and off")
    console.print(_runs_table(runs))
    for kind, meaning in MEANINGS.items():
        ratio = _speed(runs["on", kind]).median / _speed(runs["off", kind]).median
        console.print(f"{kind} ({meaning}): on is {ratio:.2f} times as fast as off")
    num_equal = sum(a["token_ids"] == b["token_ids"] for a, b in zip(answers, answers_off, strict=True))
    console.print(
        f"{num_equal} of {len(answers)} answers have the same tokens on and off; rounding decides where two tokens are "
        "almost equally likely"
    )


def _take_turns(
    engines: Mapping[str, LLM],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    repeat: int,
    on_run: Callable[[str], None],
) -> Runs:
    """A cold and a warm run on each engine, `repeat` times, so that what else the machine does meets both."""
    from cascade_llm.bench.reading import measure

    runs: dict[tuple[str, str], list[Reading]] = {(name, kind): [] for name in engines for kind in MEANINGS}
    for _ in range(repeat):
        for name, llm in engines.items():
            llm.reset_prefix_cache()
            for kind in MEANINGS:
                on_run(f"cascade {name}, {kind}")
                runs[name, kind].append(measure(llm, prompts, params)[1])
    return runs


def _speed(readings: Sequence[Reading]) -> Spread:
    from cascade_llm.bench.reading import Spread

    return Spread.of([reading.tokens_per_s for reading in readings])


def _runs_table(runs: Runs) -> Table:
    """One row per engine and kind: tokens per second, and the counters of its first run."""
    table = Table("cascade", "run")
    for heading in ("tok/s", "lowest to highest", "KV read", "KV saved", "prefilled", "cached", "generated"):
        table.add_column(heading, justify="right")
    for (engine, kind), readings in runs.items():
        speed, gained = _speed(readings), readings[0].counters
        kv_bytes = [format_bytes(gained[name]) for name in ("kv_bytes_read", "kv_bytes_saved")]
        tokens = [f"{gained[name]:,}" for name in ("prefilled_tokens", "cached_tokens", "generated_tokens")]
        table.add_row(engine, kind, f"{speed.median:.1f}", f"{speed.low:.1f} to {speed.high:.1f}", *kv_bytes, *tokens)
    return table


def _print_machine(console: Console, llm: LLM) -> None:
    facts = llm.facts
    dtype = str(facts.dtype).removeprefix("torch.")
    console.print(f"backend {facts.backend.name} on {facts.device}, {dtype}", style="dim")
    for name, reason in facts.backend.refused:
        console.print(f"backend {name} not used: {reason}", style="dim")

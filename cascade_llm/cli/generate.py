"""`cascade-llm generate`: complete prompts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cascade_llm.cli.console import (
    error_console,
    format_bytes,
    open_llm,
    print_json,
    result_console,
)
from cascade_llm.cli.field_options import (
    SectionedCommand,
    engine_options,
    model_option,
    sampling_options,
    stacked,
    take_engine,
    take_sampling,
)
from cascade_llm.cli.prompt_files import PromptInput, read_prompts, take_template, template_options
from cascade_llm.cli.remote import RemoteModel, asked_model, remote_options, take_remote
from cascade_llm.errors import GenerationError, PromptError
from cascade_llm.outputs import CompletionOutput, RequestOutput, TokenLogprob
from cascade_llm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from cascade_llm.llm import LLM

__all__ = ["generate", "prompt_options"]


prompt_options = stacked(
    click.option(
        "--system-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="A text placed before each prompt: as the system message of conversations, else as it is.",
    ),
    click.option("--chat", "as_chat", is_flag=True, help="Send each prompt through the model's chat template."),
)
"""As every command with prompts takes them."""


@click.command(cls=SectionedCommand)
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option(
    "-f",
    "--file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='One prompt per line; a .jsonl file holds {"prompt": ...} or {"messages": [...]} per line.',
)
@prompt_options
@template_options
@model_option
@remote_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per prompt.")
@click.option(
    "--on-error",
    type=click.Choice(["raise", "return"]),
    default="raise",
    show_default=True,
    help="raise: refuse all prompts if one cannot be served; return: run the others.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress bar and no summary.")
@sampling_options
@engine_options()
def generate(
    prompts: tuple[str, ...],
    file: Path | None,
    system_file: Path | None,
    as_chat: bool,
    model: str,
    as_json: bool,
    on_error: str,
    quiet: bool,
    **arguments: Any,
) -> None:
    """Complete PROMPTs; without any, and without --file, each line of standard input is one."""
    params, options, template = take_sampling(arguments), take_engine(arguments), take_template(arguments)
    server = take_remote(arguments, options)
    inputs = read_prompts(prompts, file, system_file, as_chat=as_chat)
    if template and not inputs[0].is_chat:
        raise PromptError(f"--{next(iter(template)).replace('_', '-')} does nothing to plain prompts: add --chat")
    if server is not None:
        remote = RemoteModel(server, asked_model(), params, template)
        outputs = remote.complete([item.content for item in inputs], as_chat=inputs[0].is_chat)
        _print_outputs(outputs, as_json=as_json)
        _raise_refused(outputs)
        return
    with open_llm(model, options) as llm:
        start_s = time.perf_counter()
        failure: GenerationError | None = None
        try:
            outputs = _run(llm, inputs, params, on_error, template, progress=not quiet)
        except GenerationError as error:  # what was computed by then is printed all the same
            outputs, failure = [o for o in error.outputs if isinstance(o, RequestOutput)], error
        elapsed_s = time.perf_counter() - start_s
        _print_outputs(outputs, as_json=as_json)
        if not quiet:
            error_console().print(_summary(llm.stats(), elapsed_s), style="dim")
    if failure is not None:
        raise failure
    _raise_refused(outputs)


def _raise_refused(outputs: list[RequestOutput]) -> None:
    if refused := [index for index, output in enumerate(outputs) if output.error is not None]:
        raise GenerationError(f"{len(refused)} of {len(outputs)} prompts failed: {', '.join(map(str, refused))}")


def _run(
    llm: LLM,
    inputs: list[PromptInput],
    params: SamplingParams,
    on_error: Any,
    template: dict[str, Any],
    progress: bool,
) -> list[RequestOutput]:
    contents: list[Any] = [item.content for item in inputs]
    if inputs[0].is_chat:
        return llm.chat(contents, params, on_error=on_error, progress=progress, **template)
    return llm.generate(contents, params, on_error=on_error, progress=progress)


def _print_outputs(outputs: list[RequestOutput], *, as_json: bool) -> None:
    if as_json:
        for index, output in enumerate(outputs):
            print_json(_record(index, output))
        return
    console = result_console()
    for index, output in enumerate(outputs):
        if len(outputs) > 1:
            console.print(f"[{index}]", style="bold")
        if output.error is not None:
            error_console().print(f"prompt {index}: {output.error}", style="red", soft_wrap=True)
        for sample in output.outputs:
            if len(output.outputs) > 1:
                console.print(f"({sample.index})", style="bold", end=" ")
            click.echo(sample.text)


def _record(index: int, output: RequestOutput) -> dict[str, Any]:
    """What `--json` prints for one prompt; the first sample's fields, and all samples where there are several."""
    record = {
        "index": index,
        "prompt": output.prompt,
        **_sample(output.outputs[0]),
        "num_cached_tokens": output.num_cached_tokens,
        "error": None if output.error is None else str(output.error),
    }
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = [logprob and _logprob(logprob) for logprob in output.prompt_logprobs]
    if len(output.outputs) > 1:
        record["outputs"] = [{"index": sample.index, **_sample(sample)} for sample in output.outputs]
    return record


def _sample(output: CompletionOutput) -> dict[str, Any]:
    record: dict[str, Any] = {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }
    if output.logprobs is not None:
        record["logprobs"] = [_logprob(logprob) for logprob in output.logprobs]
        record["cumulative_logprob"] = output.cumulative_logprob
    return record


def _logprob(logprob: TokenLogprob) -> dict[str, Any]:
    return logprob._asdict()


def _summary(stats: dict[str, int], elapsed_s: float) -> str:
    read, saved = stats["kv_bytes_read"], stats["kv_bytes_saved"]
    share = f" ({saved / (read + saved):.0%})" if saved else ""
    return (
        f"{stats['requests']} requests, {stats['generated_tokens']} tokens in {elapsed_s:.2f} s "
        f"({stats['generated_tokens'] / elapsed_s:.1f} tok/s)\n"
        f"prompt tokens: {stats['prompt_tokens']}, of which {stats['prefilled_tokens']} prefilled, "
        f"{stats['cached_tokens']} cached\n"
        f"steps: {stats['steps']}, of which {stats['cascade_steps']} with shared levels; "
        f"KV read {format_bytes(read)}, saved {format_bytes(saved)}{share}"
    )

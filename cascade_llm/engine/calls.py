"""One call for many prompts: all of them read and checked, and what is said of those that failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from cascade_llm.engine.call_arguments import SharingArguments, one_per_prompt
from cascade_llm.engine.input_processor import InputProcessor, ReadPrompt
from cascade_llm.engine.requests import RequestState
from cascade_llm.errors import ConfigError, GenerationError, RequestError
from cascade_llm.outputs import CompletionOutput, RequestOutput
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.sequence import Request
from cascade_llm.scheduler.sessions import SessionUse

__all__ = ["Admission", "CallReader", "OnError", "Reader", "call_outputs"]

OnError = Literal["raise", "return"]
Reader = Callable[[SamplingParams], ReadPrompt]
Admission = tuple[Request, str | None]
"""A request, and its prompt's text where there is one."""


class CallReader:
    """Makes requests of the prompts of a call."""

    def __init__(self, input_processor: InputProcessor, *, has_prefix_cache: bool) -> None:
        self._input, self._has_prefix_cache = input_processor, has_prefix_cache

    def read(
        self,
        readers: Sequence[Reader],
        params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int | Sequence[int],
        sharing: SharingArguments,
        on_error: OnError,
    ) -> list[Admission | RequestError]:
        """One request per prompt, in their order, or with `on_error="return"` what is wrong with it.

        Args:
            readers: each reads one prompt
            params: one for all, or one per prompt
            priority: likewise
            sharing: with whom they share pages
            on_error: "raise" raises one error that names every bad prompt

        Raises:
            ConfigError: `on_error` is another word
            RequestError: prompts or arguments that cannot be served
        """
        if on_error not in ("raise", "return"):
            raise ConfigError(f"on_error is {on_error!r}: it must be 'raise' or 'return'")
        params = SamplingParams() if params is None else params
        all_params = one_per_prompt("params", params, SamplingParams, len(readers))
        priorities = one_per_prompt("priority", priority, int, len(readers))
        prompts = [self._read(*item) for item in zip(readers, all_params, priorities, strict=True)]
        if on_error == "raise":
            _raise_bad(prompts)
        all_sharing = sharing.read(all_params, has_prefix_cache=self._has_prefix_cache)
        return [
            prompt if isinstance(prompt, RequestError) else self._admission(prompt, *own)
            for prompt, own in zip(prompts, zip(all_params, priorities, all_sharing, strict=True), strict=True)
        ]

    def read_one(
        self, reader: Reader, params: SamplingParams | None, priority: int, sharing: SharingArguments
    ) -> Admission:
        """The request of one prompt. Raises `RequestError` for what cannot be served."""
        params = SamplingParams() if params is None else params
        prompt = self._read(reader, params, priority)
        if isinstance(prompt, RequestError):
            raise prompt
        (own_sharing,) = sharing.read([params], has_prefix_cache=self._has_prefix_cache)
        return self._admission(prompt, params, priority, own_sharing)

    def _admission(
        self, prompt: ReadPrompt, params: SamplingParams, priority: int, sharing: tuple[SessionUse | None, bytes]
    ) -> Admission:
        return self._input.request(prompt, params, priority, *sharing), prompt.text

    def _read(self, reader: Reader, params: SamplingParams, priority: int) -> ReadPrompt | RequestError:
        """One prompt, with everything about its request checked; or what is wrong with it, whatever it is."""
        try:
            self._input.check(params, priority)
            return reader(params)
        except RequestError as error:
            return error
        except Exception as error:
            wrapped = RequestError(f"the prompt cannot be read ({type(error).__name__}: {error})")
            wrapped.__cause__ = error
            return wrapped


def _raise_bad(prompts: Sequence[ReadPrompt | RequestError]) -> None:
    """One error for all bad prompts, of their type where they have one."""
    bad = [(index, prompt) for index, prompt in enumerate(prompts) if isinstance(prompt, RequestError)]
    if not bad:
        return
    if len(prompts) == 1:
        raise bad[0][1]
    kind = type(bad[0][1]) if len({type(error) for _, error in bad}) == 1 else RequestError
    listed = "; ".join(f"prompt {index}: {error}" for index, error in bad)
    raise kind(f"{len(bad)} of {len(prompts)} prompts cannot be served (nothing has run): {listed}")


def call_outputs(states: Sequence[RequestState | RequestError], on_error: OnError) -> list[RequestOutput]:
    """One output per prompt. Raises `GenerationError` with `on_error="raise"` where a request ended early."""
    outputs = [_output_of(state, index) for index, state in enumerate(states)]
    if on_error == "raise":
        _raise_first_failure(outputs)
    return outputs


def _output_of(state: RequestState | RequestError, index: int) -> RequestOutput:
    if isinstance(state, RequestState):
        return state.output
    return RequestOutput(f"refused-{index}", None, [], [CompletionOutput(0, finish_reason="error")], error=state)


def _raise_first_failure(outputs: list[RequestOutput]) -> None:
    failed = [(index, output.error) for index, output in enumerate(outputs) if output.error is not None]
    if failed:
        listed = "; ".join(f"prompt {index}: {error}" for index, error in failed)
        raise GenerationError(
            f"{len(failed)} of {len(outputs)} requests ended early (this error's `outputs` has all that was generated; "
            f'on_error="return" returns it): {listed}',
            outputs,
        ) from failed[0][1]

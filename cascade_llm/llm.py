"""`LLM`: what a user of the library holds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from types import TracebackType
from typing import Any, ClassVar, NoReturn, Self, cast

from cascade_llm.config import EngineOptions
from cascade_llm.engine.assembly import assemble
from cascade_llm.engine.call_arguments import (
    CacheSalts,
    Messages,
    SessionIds,
    SharingArguments,
    as_conversations,
    as_many,
    template_arguments,
)
from cascade_llm.engine.calls import CallReader, OnError, Reader, call_outputs
from cascade_llm.engine.engine import Engine
from cascade_llm.engine.input_processor import Prompt
from cascade_llm.engine.process_lock import ProcessLock, forked
from cascade_llm.engine.progress_bars import StartBars, request_bar
from cascade_llm.engine.requests import RequestState
from cascade_llm.engine.token_stream import TokenStream
from cascade_llm.errors import BackendError, EngineClosedError, RequestError
from cascade_llm.outputs import RequestOutput
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.sequence import Request
from cascade_llm.scheduler.sessions import SessionInfo, SessionName

__all__ = ["LLM"]


class LLM:
    """A model, ready to generate.

    Args:
        model: a folder, a .gguf file, a hub's ORG/NAME, or "smollm2"; all forms in `cascade_llm.loader.resolve`
        progress: draw progress bars of what takes longer than a second on standard error, where that is a terminal
        options: see `cascade_llm.config.EngineOptions`

    Raises:
        ConfigError: an option is unknown or out of range
        ModelError: the model is not found, broken, or not implemented
        CapacityError: it does not fit
    """

    _first_process: ClassVar[int | None] = None

    def __init__(self, model: str | os.PathLike[str], *, progress: bool = True, **options: Any) -> None:
        self.options = EngineOptions(**options)
        self._check_process()
        with ExitStack() as bars:
            on_start = StartBars(bars) if progress else None
            parts = assemble(model, self.options, on_start=on_start)
        self.tokenizer, self.facts = parts.tokenizer, parts.facts
        self.model_name, self.cost_source = parts.model_name, parts.cost_source
        self._engine, self._input, self._resources = parts.engine, parts.input_processor, parts.resources
        self._calls = CallReader(self._input, has_prefix_cache=self.options.enable_prefix_caching)
        self._lock = ProcessLock()
        LLM._first_process = os.getpid()
        self._closed = False

    # -- generation -------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        session_id: SessionIds = None,
        fork_of: SessionIds = None,
        cache_salt: CacheSalts = None,
        on_error: OnError = "raise",
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Complete one prompt or many; returns one output per prompt, in their order.

        Args:
            prompts: a text or a list of token ids is one prompt; a list of these is many
            params: one for all, or one per prompt; default `SamplingParams()`
            priority: lower runs earlier; one for all, or one per prompt
            session_id: the conversation, whose pages stay held until its next turn; a list for many prompts
            fork_of: the conversation begins on the pages of this one, as a branch of it
            cache_salt: pages are shared only with requests that give the same; one for all, or one per prompt
            on_error: "raise" checks all prompts first and names every bad one in one error, before anything runs;
                "return" puts the error in that output's place and runs the rest
            progress: draw a progress bar on standard error, where that is a terminal

        Raises:
            RequestError: prompts or parameters that cannot be served
            GenerationError: a request ended early; the others were finished, see its `outputs`
        """
        readers = [partial(self._input.read_prompt, prompt) for prompt in as_many(prompts)]
        sharing = SharingArguments(session_id, fork_of, cache_salt)
        return self._serve(readers, params, priority, sharing, on_error, progress)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        session_id: SessionIds = None,
        fork_of: SessionIds = None,
        cache_salt: CacheSalts = None,
        on_error: OnError = "raise",
        progress: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, each a list of {"role": ..., "content": ...}; otherwise as `generate`.

        Args:
            messages: one conversation, or a list of them
            params: as for `generate`, as are `priority`, `session_id`, `fork_of`, `cache_salt`, `on_error`, `progress`
            tools: JSON schemas of functions that the model may call
            chat_template: the text of another template than the model's, or the name of one of the model's
            chat_template_kwargs: what else the template reads, such as Qwen3's {"enable_thinking": False}
            add_generation_prompt: end the prompt where the assistant's turn begins
            continue_final_message: go on with the last message instead of beginning a new one
        """
        arguments = template_arguments(
            tools, chat_template, chat_template_kwargs, add_generation_prompt, continue_final_message
        )
        read = self._input.read_chat
        readers = [partial(read, conversation, arguments) for conversation in as_conversations(messages)]
        sharing = SharingArguments(session_id, fork_of, cache_salt)
        return self._serve(readers, params, priority, sharing, on_error, progress)

    def stream(
        self,
        prompt: Prompt | Messages,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        session_id: str | None = None,
        fork_of: str | None = None,
        cache_salt: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> TokenStream:
        """Yield what one prompt, or a conversation as `chat` takes it, gains. Closing the stream aborts the request."""
        arguments = template_arguments(
            tools, chat_template, chat_template_kwargs, add_generation_prompt, continue_final_message
        )
        if isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping):
            reader = partial(self._input.read_chat, cast(Messages, prompt), arguments)
        else:
            reader = partial(self._input.read_prompt, cast(Prompt, prompt))
        sharing = SharingArguments(session_id, fork_of, cache_salt)
        with self._lock:
            self._check_open()
            request, text = self._calls.read_one(reader, params, priority, sharing)
            with self._abandoned_on_error([request]):
                return TokenStream(self._engine.add(request, text), self.step, self._abort, self._engine.abandon)

    def _serve(
        self,
        readers: Sequence[Reader],
        params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int | Sequence[int],
        sharing: SharingArguments,
        on_error: OnError,
        progress: bool,
    ) -> list[RequestOutput]:
        with self._lock:
            self._check_open()
            admitted = self._calls.read(readers, params, priority, sharing, on_error)
            with self._abandoned_on_error([item[0] for item in admitted if isinstance(item, tuple)]):
                states = [item if isinstance(item, RequestError) else self._engine.add(*item) for item in admitted]
                self._run([state for state in states if isinstance(state, RequestState)], progress)
        return call_outputs(states, on_error)

    # -- the engine's own state --------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The loop itself, for measurements and checks; not to be stepped beside `generate`."""
        return self._engine

    def stats(self) -> dict[str, int]:
        """What the engine did since it started, and where its pages are.

        Bytes are of K and V over all layers; `kv_bytes_saved` is what one-level plans of the same steps would have
        read beside. free_pages + held_pages + cached_pages = total_pages; the same with window_1024_ before it of the
        pool that layers with a window of 1,024 tokens have of their own. With CUDA graphs, also how steps were run.
        """
        with self._lock:
            if not self._closed:
                self._engine.settle()
            scheduler = self._engine.scheduler
            counts = scheduler.counters.as_dict(self.facts.kv_bytes_per_token)
            for number, (window_len, pages) in enumerate(scheduler.pools):
                prefix = f"window_{window_len}_" if number else ""
                counts.update({f"{prefix}{name}": count for name, count in asdict(pages).items()})
            counts["running_sequences"] = scheduler.num_running
            counts["waiting_sequences"] = scheduler.num_waiting
            return {**counts, **self._engine.executor.counters()}

    def plan_report(self) -> dict[str, Any]:
        """What the last step shared, and how many steps shared nothing for which reason.

        Returns:
            {"last_step": the fields of `CascadeReport`, None before the first step, "unshared_steps": {reason: steps}}
        """
        with self._lock:
            return self._engine.scheduler.counters.sharing()

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix that no running request holds."""
        with self._lock:
            self._check_open()
            self._engine.reset_prefix_cache()

    def sessions(self) -> list[SessionInfo]:
        """The conversations that hold pages, the least recently used first; those whose time is over end."""
        with self._lock:
            self._check_open()
            return self._engine.sessions()

    def drop_session(self, session_id: str) -> bool:
        """Let go of what a conversation holds; returns whether there was anything."""
        with self._lock:
            self._check_open()
            return self._engine.drop_session(SessionName("", session_id))

    def __reduce__(self) -> NoReturn:
        raise BackendError(
            "an LLM cannot be pickled or copied: hand on the model's name and the options, and make an LLM there"
        )

    def _check_process(self) -> None:
        """Threads that the first engine of a process has started do not live in its forks."""
        if LLM._first_process not in (None, os.getpid()):
            raise forked(f"an LLM was made in process {LLM._first_process}")

    def close(self) -> None:
        """End what still runs and free the memory; a second call does nothing, nor does one in a forked process."""
        if self._lock.is_foreign:
            return
        with self._lock:
            if not self._closed:
                self._closed = True
                with self._resources:
                    self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self) -> None:
        """Make one step, for callers that open several streams and `poll` them; does nothing where nothing is due."""
        with self._lock:
            self._check_open()
            self._engine.step()

    def _abort(self, request_id: str) -> None:
        if self._lock.is_foreign:
            return
        with self._lock:
            if not self._closed:
                self._engine.abort(request_id)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed: create another LLM")

    def _run(self, states: Sequence[RequestState], progress: bool) -> None:
        """Step until these requests have ended."""
        with request_bar(len(states), enabled=progress) as advance:
            num_unfinished = len(states)
            while num_unfinished:
                self._engine.step()
                now = sum(not state.output.finished for state in states)
                advance(num_unfinished - now, self._engine.scheduler.counters.generated_tokens)
                num_unfinished = now

    @contextmanager
    def _abandoned_on_error(self, requests: Sequence[Request]) -> Iterator[None]:
        """Whatever is raised meanwhile, an interruption too, leaves none of these requests behind."""
        try:
            yield
        except BaseException:
            for request in requests:
                self._engine.abandon(request.request_id)
            self._engine.settle()
            raise

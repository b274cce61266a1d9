"""`TokenStream`: what one request gains, as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from cascade_llm.engine.requests import RequestState
from cascade_llm.outputs import CompletionDelta, RequestOutput

__all__ = ["TokenStream"]


class TokenStream:
    """An iterator over what a request gains: `CompletionDelta`s, as tokens come.

    `output` is the whole so far. Leaving it early (`close()`, or the end of a `with` block) aborts the request and
    frees its pages.
    """

    def __init__(
        self,
        state: RequestState,
        step: Callable[[], None],
        abort: Callable[[str], None],
        abandon: Callable[[str], None],
    ) -> None:
        """A stream of a request that was added.

        Args:
            state: the request's
            step: makes one step of the engine
            abort: ends a request, by its id
            abandon: has a request ended later, by its id; may be called in the middle of a step
        """
        self._state, self._step, self._abort, self._abandon = state, step, abort, abandon
        self._ready: list[CompletionDelta] = []

    @property
    def output(self) -> RequestOutput:
        """Everything generated so far."""
        return self._state.output

    def __iter__(self) -> Iterator[CompletionDelta]:
        return self

    def __next__(self) -> CompletionDelta:
        while not self._ready:
            self._ready = self._state.take_deltas()[::-1]
            if self._ready:
                break
            if self.output.finished:
                if self.output.error is not None:
                    raise self.output.error
                raise StopIteration
            self._step()
        return self._ready.pop()

    def poll(self) -> list[CompletionDelta]:
        """What has come since the last delta, without making a step; see `LLM.step`."""
        ready, self._ready = self._ready[::-1], []
        return ready + self._state.take_deltas()

    def close(self) -> None:
        """Abort the request unless it has ended."""
        self._abort(self._state.request.request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # the garbage collector may call this in the middle of a step, so it only leaves a note
        self._abandon(self._state.request.request_id)

"""A file of requests through an engine of this process, so ordered that those with the same beginning run together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cascade_llm.engine.output_queue import RequestGain
from cascade_llm.engine.token_stream import TokenStream
from cascade_llm.errors import CascadeError
from cascade_llm.llm import LLM
from cascade_llm.server.answer_forms import AnswerForm
from cascade_llm.server.api_errors import ApiError, api_error
from cascade_llm.server.batch_lines import (
    BatchError,
    BatchLine,
    answer_record,
    error_record,
    numbered_lines,
    read_line,
)
from cascade_llm.server.batch_output import BatchOutput
from cascade_llm.server.messages import EngineFacts
from cascade_llm.server.options import ServerOptions
from cascade_llm.server.reading import ReadBody, RequestReader
from cascade_llm.server.schema import ChatBody, CompletionBody, refuse_other_models, refuse_unknown_fields

__all__ = ["BatchCounts", "run_batch"]


@dataclass(slots=True)
class BatchCounts:
    """Lines of this run, by what became of them."""

    answered: int = 0
    failed: int = 0
    found_done: int = 0
    """In the file of answers when the run began."""


@dataclass(frozen=True)
class _Read:
    """A request that is checked."""

    line: BatchLine
    body: ReadBody


@dataclass(frozen=True)
class _Running:
    """A request in flight, one stream a prompt."""

    read: _Read
    streams: Sequence[TokenStream]

    @property
    def is_over(self) -> bool:
        """Whether all its prompts have ended."""
        return all(stream.output.finished for stream in self.streams)


def run_batch(
    llm: LLM,
    requests: Path,
    output: BatchOutput,
    *,
    names: Sequence[str],
    strict: bool = False,
    window: int = 4096,
    in_order: bool = False,
    on_line: Callable[[BatchCounts], None] = lambda counts: None,
) -> BatchCounts:
    """Answer every line that has no answer yet. What is raised meanwhile, Ctrl-C too, leaves the answers so far.

    Args:
        llm: nobody else may use it meanwhile
        requests: the file, in OpenAI's batch format
        output: gets one record per line, in the order in which they end
        names: what a body may call the model; the first is what answers call it
        strict: refuse unknown fields of bodies instead of ignoring them
        window: lines that are read ahead and ordered by their token ids
        in_order: keep the file's order instead, for comparison
        on_line: called after each line
    """
    return _BatchRun(llm, output, names, strict, on_line).run(requests, window, in_order)


class _BatchRun:
    """One file."""

    def __init__(
        self,
        llm: LLM,
        output: BatchOutput,
        names: Sequence[str],
        strict: bool,
        on_line: Callable[[BatchCounts], None],
    ) -> None:
        self._llm, self._output, self._names, self._strict, self._on_line = llm, output, names, strict, on_line
        self._reader = RequestReader(llm.tokenizer, EngineFacts.of(llm), ServerOptions())
        self._most_samples = 2 * llm.options.max_num_seqs  # as many wait as run: the next are there when some end
        self._running: list[_Running] = []
        self._ids: set[str] = set()
        self.counts = BatchCounts()

    def run(self, requests: Path, window: int, in_order: bool) -> BatchCounts:
        """Through the whole file."""
        lines = numbered_lines(requests)
        while ahead := list(islice(lines, window)):
            read = list(self._read_all(ahead))
            for item in read if in_order else sorted(read, key=_beginning):
                self._start(item)
                while self._num_samples >= self._most_samples:
                    self._step()
        while self._running:
            self._step()
        return self.counts

    @property
    def _num_samples(self) -> int:
        return sum(item.read.body.num_samples for item in self._running)

    def _read_all(self, lines: Sequence[tuple[int, bytes]]) -> Iterator[_Read]:
        """The requests of these lines that are to run; the others are counted, or answered with their errors."""
        for number, text in lines:
            try:
                line = self._read_line(number, text)
                if line.custom_id in self._output.answered:
                    self._count_done()
                    continue
                yield _Read(line, self._read_body(line))
            except BatchError as failure:
                self._fail(failure, is_known=self._output.has_error(failure.number, failure.custom_id))

    def _read_line(self, number: int, text: bytes) -> BatchLine:
        """A line whose custom_id is its own, or the `BatchError` of one."""
        try:
            line = read_line(number, text)
        except BatchError as failure:
            if failure.custom_id is not None:
                self._claim(number, failure.custom_id)
            raise
        self._claim(number, line.custom_id)
        return line

    def _claim(self, number: int, custom_id: str) -> None:
        if custom_id in self._ids:
            message = f"line {number}: custom_id {custom_id!r:.80} was there before: give each line its own"
            raise BatchError(number, None, ApiError(400, message, param="custom_id", code="duplicate_custom_id"))
        self._ids.add(custom_id)

    def _read_body(self, line: BatchLine) -> ReadBody:
        try:
            refuse_other_models(line.body, self._names)
            if self._strict:
                refuse_unknown_fields(line.body)
            if isinstance(line.body, ChatBody):
                return self._reader.read_chat(line.body)
            assert isinstance(line.body, CompletionBody)
            return self._reader.read_completion(line.body)
        except ApiError as error:
            raise BatchError(line.number, line.custom_id, error) from None
        except CascadeError as error:
            raise BatchError(line.number, line.custom_id, api_error(error)) from None

    def _start(self, read: _Read) -> None:
        body = read.body
        prompts = zip(body.prompts, body.all_params, strict=True)
        salt = read.line.body.cache_salt
        streams = [
            self._llm.stream(prompt, params, priority=body.priority, cache_salt=salt) for prompt, params in prompts
        ]
        self._running.append(_Running(read, streams))

    def _step(self) -> None:
        self._llm.step()
        running, self._running = self._running, []
        over: list[_Running] = []
        for item in running:
            (over if item.is_over else self._running).append(item)
        for item in over:
            self._finish(item)

    def _finish(self, item: _Running) -> None:
        line, body = item.read.line, item.read.body
        request_id = f"req_{line.number}"
        gains = [_whole_gain(stream) for stream in item.streams]
        for gain in gains:
            if gain.error is not None:
                error = ApiError(500, gain.error, code="generation_failed")
                self._fail(BatchError(line.number, line.custom_id, error), is_known=False)
                return
        form: AnswerForm = line.url.form(
            f"{line.url.prefix}-{line.number}",
            self._names[0],
            body,
            self._llm.tokenizer,
            with_token_ids=bool(line.body.return_token_ids),
        )
        for place, gain in enumerate(gains):
            form.tally.add(place, gain)
        self._output.write(answer_record(line.custom_id, request_id, form.whole(gains)))
        self.counts.answered += 1
        self._on_line(self.counts)

    def _fail(self, failure: BatchError, is_known: bool) -> None:
        """Answer a line with its error, unless a run before has."""
        if is_known:
            self._count_done()
            return
        self._output.write(error_record(failure))
        self.counts.failed += 1
        self._on_line(self.counts)

    def _count_done(self) -> None:
        self.counts.found_done += 1
        self._on_line(self.counts)


def _beginning(read: _Read) -> tuple[bytes, list[int]]:
    """What neighbours in the order share."""
    return read.body.cache_salt, list(read.body.prompts[0])


def _whole_gain(stream: TokenStream) -> RequestGain:
    output = stream.output
    return RequestGain(
        output.request_id,
        stream.poll(),
        output.num_cached_tokens,
        output.prompt_logprobs,
        output.metrics,
        finished=True,
        error=None if output.error is None else str(output.error),
    )

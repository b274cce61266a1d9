"""A request on its way: what was generated, detokenized, and handed out."""

from __future__ import annotations

from contextlib import suppress

from cascade_llm.engine.text import IncrementalDetokenizer
from cascade_llm.engine.tokenizer import Tokenizer
from cascade_llm.errors import GenerationError
from cascade_llm.outputs import CompletionDelta, CompletionOutput, RequestMetrics, RequestOutput
from cascade_llm.scheduler.scheduler import SequenceUpdate
from cascade_llm.scheduler.sequence import Request, SequenceSharing

__all__ = ["RequestState"]


class RequestState:
    """Turns the scheduler's updates of one request into its output."""

    def __init__(
        self, request: Request, prompt: str | None, tokenizer: Tokenizer | None, kv_bytes_per_token: int
    ) -> None:
        params, self._kv_bytes_per_token = request.params, kv_bytes_per_token
        self.request = request
        self.output = RequestOutput(
            request.request_id,
            prompt,
            list(request.prompt_token_ids),
            [CompletionOutput(index) for index in range(params.n)],
        )
        if params.logprobs is not None:
            for output in self.output.outputs:
                output.logprobs, output.cumulative_logprob = [], 0.0
        if params.prompt_logprobs is not None:
            self.output.prompt_logprobs = [None] * max(1, params.prompt_logprobs_start)
        self._detokenizers = [
            IncrementalDetokenizer(tokenizer, params, request.prompt_token_ids) if tokenizer else None
            for _ in range(params.n)
        ]
        self._handed_out = [(0, 0, False)] * params.n  # characters, tokens, end

    def apply(self, update: SequenceUpdate) -> str | None:
        """Take in one update. Returns the stop string that has just ended the sample's text, if one did."""
        if update.sample_index == 0 and not self.output.outputs[0].token_ids:
            self.output.num_cached_tokens = update.num_cached_tokens
        if update.prompt_logprobs is not None:
            assert self.output.prompt_logprobs is not None
            self.output.prompt_logprobs.extend(update.prompt_logprobs)
            return None
        self.add_sharing(update.sharing)
        output = self.output.outputs[update.sample_index]
        if self.request.params.max_tokens == 0:  # only its prompt was asked about
            output.finish_reason = "length" if update.finish_reason is not None else None
            return None
        if update.token_id is not None:
            output.token_ids.append(update.token_id)
        if update.logprob is not None and output.logprobs is not None:
            output.logprobs.append(update.logprob)
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + update.logprob.logprob
        stopped_by = self._detokenize(update, output)
        output.stop_reason = update.stop_token_id if stopped_by is None else stopped_by
        output.finish_reason = update.finish_reason if stopped_by is None else "stop"  # last: then all of it is there
        return stopped_by

    def add_sharing(self, sharing: SequenceSharing | None) -> None:
        """Count what a sample that ended had shared; None while it has not."""
        if sharing is None:
            return
        width, metrics = self._kv_bytes_per_token, self.output.metrics or RequestMetrics()
        metrics.add(
            RequestMetrics(
                sharing.num_steps,
                sharing.num_shared_steps,
                sharing.num_levels,
                sharing.group_size,
                round(sharing.kv_tokens_read * width),
                round(sharing.kv_tokens_saved * width),
            )
        )
        self.output.metrics = metrics

    def end(self, reason: str, error: GenerationError | None = None) -> None:
        """End every sample that has not ended by itself."""
        if error is not None and self.output.error is None:
            self.output.error = error
        for output, detokenizer in zip(self.output.outputs, self._detokenizers, strict=True):
            if output.finish_reason is None:
                if detokenizer is not None:
                    with suppress(*(() if error is None else (Exception,))):  # it may be the text that failed
                        output.text += detokenizer.finish()
                output.finish_reason = reason

    @property
    def num_unfinished(self) -> int:
        """Samples that have not ended."""
        return sum(output.finish_reason is None for output in self.output.outputs)

    def take_deltas(self) -> list[CompletionDelta]:
        """What each sample gained since the last call."""
        deltas = []
        for index, output in enumerate(self.output.outputs):
            num_characters, num_tokens, ended = self._handed_out[index]
            now = (len(output.text), len(output.token_ids), output.finish_reason is not None)
            if now == (num_characters, num_tokens, ended):
                continue
            self._handed_out[index] = now
            logprobs = output.logprobs[num_tokens:] if output.logprobs is not None else None
            deltas.append(
                CompletionDelta(
                    index,
                    output.text[num_characters:],
                    output.token_ids[num_tokens:],
                    output.finish_reason,
                    logprobs,
                    output.stop_reason,
                )
            )
        return deltas

    def _detokenize(self, update: SequenceUpdate, output: CompletionOutput) -> str | None:
        detokenizer = self._detokenizers[update.sample_index]
        if detokenizer is None:
            return None
        new_ids = [] if update.token_id is None else [update.token_id]
        delta = detokenizer.push(
            new_ids,
            finished=update.finish_reason is not None,
            ended_by_token=update.finish_reason == "stop",  # the scheduler knows of no other stop
        )
        output.text += delta.text
        return delta.stopped_by

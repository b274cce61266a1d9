"""Takes in what a step produced: committed lengths, tokens, published pages, ends."""

from __future__ import annotations

from itertools import repeat

from cascade_llm.metrics import SchedulerCounters
from cascade_llm.outputs import TokenLogprob
from cascade_llm.plan import StepResult
from cascade_llm.scheduler.cascade.tree import PlannedRows
from cascade_llm.scheduler.roster import Roster
from cascade_llm.scheduler.sequence import Sequence, SequenceStatus, SequenceUpdate
from cascade_llm.scheduler.sharing import SharingLedger
from cascade_llm.scheduler.step import InFlightStep

__all__ = ["StepCommitter"]


class StepCommitter:
    """Moves the committed lengths of a roster's sequences on, and ends those that are at their end."""

    def __init__(self, page_size: int, roster: Roster, counters: SchedulerCounters, sharing: SharingLedger) -> None:
        """For the roster's pages as they are now: after a restart of it, make another."""
        self._page_size, self._roster, self._counters, self._sharing = page_size, roster, counters, sharing
        self._tables = roster.tables

    def commit(self, step: InFlightStep, result: StepResult) -> list[SequenceUpdate]:
        """Take in the result of the oldest step in flight. Rows of sequences that have ended since are dropped."""
        if step.mixed_rows is None and step.version == self._tables.cache.version and not result.failed_samples:
            return self._commit_decode(step, result)
        updates: list[SequenceUpdate] = []
        sample = 0
        prompt_logprobs, accepted_counts = iter(result.prompt_logprobs), iter(result.accepted_counts)
        for row, epoch in zip(step.rows(), step.plan.sequence_epochs, strict=True):
            reported = row.sequence.take_prompt_logprobs(row.start_len, row.num_new, prompt_logprobs)
            alive = epoch == row.sequence.epoch and row.sequence.status is SequenceStatus.RUNNING
            if row.drafts:
                num_accepted = next(accepted_counts)
                if alive:
                    updates += self._commit_draft(row, num_accepted, result, sample)
                sample += row.num_new
                continue
            if alive:
                self._commit_rows(row.sequence, row.start_len + row.num_new)
            if reported and alive:
                updates.append(row.sequence.update(prompt_logprobs=reported))
            for sampled in row.samples:
                if sampled.status is SequenceStatus.RUNNING and sampled.num_unresolved:
                    updates.append(self._commit_sample(sampled, result, sample))
                sample += 1
        return updates

    def _commit_decode(self, step: InFlightStep, result: StepResult) -> list[SequenceUpdate]:
        """The same for a decode step whose sequences all run on."""
        size = self._page_size
        for sequence, end in zip(step.sequences, step.plan.sample_positions, strict=True):
            if end % size:
                sequence.committed_len = end
            else:
                self._commit_rows(sequence, end)
        logprobs = result.logprobs or repeat(None, len(step.sequences))
        return [
            self._commit_token(sequence, token_id, logprob)
            for sequence, token_id, logprob in zip(step.sequences, result.token_ids, logprobs, strict=True)
        ]

    def _commit_draft(
        self, row: PlannedRows, num_accepted: int, result: StepResult, first_sample: int
    ) -> list[SequenceUpdate]:
        """The same for proposed tokens: a decode step for each that was accepted, and one more; the rest never was."""
        sequence, updates = row.sequence, list[SequenceUpdate]()
        sequence.num_unresolved = num_accepted + 1
        sequence.planned_len = row.start_len + num_accepted + 1
        self._tables.truncate(sequence, sequence.planned_len)
        self._counters.drafted_tokens += len(row.drafts)
        self._counters.accepted_tokens += num_accepted
        for i in range(num_accepted + 1):
            self._commit_rows(sequence, row.start_len + i + 1)
            updates.append(self._commit_sample(sequence, result, first_sample + i))
            if updates[-1].finish_reason is not None:
                break
        return updates

    def _commit_rows(self, sequence: Sequence, committed_len: int) -> None:
        sequence.committed_len = committed_len
        self._tables.publish_committed(sequence, min(committed_len, len(sequence.token_ids)))

    def _commit_sample(self, sequence: Sequence, result: StepResult, sample: int) -> SequenceUpdate:
        if sample in result.failed_samples:
            self._roster.end_turn(sequence, "error")
            self._tables.discard(sequence)
            self._roster.finish(sequence, "error")
            return sequence.update(finish_reason="error")
        logprob = result.logprobs[sample] if result.logprobs else None
        return self._commit_token(sequence, result.token_ids[sample], logprob)

    def _commit_token(self, sequence: Sequence, token_id: int, logprob: TokenLogprob | None) -> SequenceUpdate:
        self._counters.generated_tokens += 1
        reason = sequence.resolve_token(token_id)
        update = SequenceUpdate(
            sequence.request.request_id, sequence.sample_index, sequence.num_cached_tokens, token_id, logprob, reason
        )
        if reason is not None:
            if reason == "stop" and token_id in (sequence.request.params.stop_token_ids or ()):
                update.stop_token_id = token_id
            update.sharing = self._sharing.of(sequence)
            self._roster.finish(sequence, reason)
        elif sequence.mask is not None:
            update.failure = sequence.advance_mask()
            if update.failure is not None:
                update.finish_reason = "error"
                self._roster.finish(sequence, "error")
        return update

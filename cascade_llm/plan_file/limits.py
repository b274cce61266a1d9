"""What a recorded plan must keep to beside its own invariants: the pool, the lanes and the vocabulary of its header."""

from __future__ import annotations

from collections.abc import Iterable

from cascade_llm.errors import PlanError
from cascade_llm.plan import CascadePlan, StepPlan
from cascade_llm.plan_file.header import PlanFileHeader

__all__ = ["PlanLimits"]


class PlanLimits:
    """Checks the plans of one file in their order, and remembers which sequences have entered a lane."""

    def __init__(self, header: PlanFileHeader) -> None:
        self._header = header
        self._epochs: dict[int, int] = {}

    def check(self, plan: StepPlan) -> None:
        """Raise `PlanError` where a plan leaves the pool, the lanes, the context or the vocabulary."""
        for cascade in plan.cascades:
            self._check_pages(cascade)
        for copy in plan.page_copies:
            if not 0 <= copy.source < self._header.total_pages > copy.target >= 0:
                raise PlanError(f"it copies page {copy.source} to {copy.target}, {self._pool}")
        if any(position >= self._header.max_model_len for position in plan.positions):
            raise PlanError(f"a position is beyond max_model_len {self._header.max_model_len}")
        self._check_lanes(plan)
        self.check_token_ids("the step", plan.token_ids)
        self.check_token_ids("prompt_logprob_token_ids", plan.prompt_logprob_token_ids)
        if any(count < 0 for count in plan.prompt_logprob_counts):
            raise PlanError("prompt_logprob_counts has a negative count")

    def check_token_ids(self, what: str, token_ids: Iterable[object]) -> None:
        """Raise `PlanError` for one that is none of the vocabulary's."""
        for token_id in token_ids:
            if not isinstance(token_id, int) or not 0 <= token_id < self._header.vocab_size:
                raise PlanError(f"{what} has the token id {token_id!r}, the vocabulary has {self._header.vocab_size}")

    @property
    def _pool(self) -> str:
        return f"the pool has {self._header.total_pages} pages"

    def _check_pages(self, cascade: CascadePlan) -> None:
        if cascade.page_size != self._header.page_size:
            raise PlanError(f"its page_size is {cascade.page_size}, the header's {self._header.page_size}")
        for depth, level in enumerate(cascade.levels):
            largest = max(level.kv_page_indices, default=0)
            if largest >= self._header.total_pages:
                raise PlanError(f"level {depth} reads page {largest}, {self._pool}")

    def _check_lanes(self, plan: StepPlan) -> None:
        for start in plan.lane_starts:
            if not 0 <= start.lane < self._header.max_num_seqs:
                raise PlanError(f"a sequence enters lane {start.lane}, there are {self._header.max_num_seqs}")
            if not start.prompt_token_ids:
                raise PlanError(f"the sequence that enters lane {start.lane} has no prompt")
            for what in ("prompt_token_ids", "output_token_ids", "params.logit_bias"):
                ids = start.params.logit_bias or () if what == "params.logit_bias" else getattr(start, what)
                self.check_token_ids(f"lane {start.lane}, {what}", ids)
            self._epochs[start.lane] = start.epoch
        for lane in plan.sample_lanes:
            if lane not in self._epochs:
                raise PlanError(f"it samples in lane {lane}, which no sequence has entered")
        for lane, epoch in zip(plan.sequence_lanes, plan.sequence_epochs, strict=True):
            if self._epochs.get(lane) != epoch:
                raise PlanError(f"a sequence is in use {epoch} of lane {lane}, the last to enter began another")

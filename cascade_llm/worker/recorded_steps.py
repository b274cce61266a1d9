"""Forward passes on a CPU, recorded once for each number of rows and replayed with new integers in fixed memory.

A forward pass of a small model is some ten calls of compiled code a layer, and for one request Python takes a quarter
of the time to make them; in a replay C makes them from a list. It is what CUDA graphs are to a GPU, and it needs no
shapes in advance: a step whose number of rows comes again is recorded then.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cascade_llm.attention.backend import AttentionBackend, PreparedAttention, StepAttention
from cascade_llm.device.arena import Arena
from cascade_llm.device.native_calls import replay_function
from cascade_llm.device.ranks import Ranks
from cascade_llm.device.recording import NotRecordable, Recording
from cascade_llm.errors import BackendError
from cascade_llm.models.decoder import Decoder

__all__ = ["ForwardInputs", "RecordedSteps"]

log = logging.getLogger("cascade_llm")

MOST_ROWS = 256
"""Steps of more rows are long enough for Python not to matter, and their memory would be kept."""
STEPS_BEFORE = 2
"""Steps of a number of rows that run without being recorded: while a batch drains, each number comes once."""
MOST_RECORDINGS = 64
"""That are kept, those used last; 160 bytes a call each."""

Key = tuple[int, int, int, int, tuple[int, ...]]
"""Rows, threads, attention kinds, columns of slots, and the kind of each layer."""


@dataclass(frozen=True)
class ForwardInputs:
    """What a forward pass reads."""

    token_ids: torch.Tensor
    """[rows] int64"""
    positions: torch.Tensor
    """[rows] int64"""
    slots: Sequence[torch.Tensor]
    """As `StepAttention` takes them."""
    prepared: Sequence[PreparedAttention]
    """One per attention kind."""
    layer_kinds: Sequence[int]
    """As `StepAttention` takes them."""

    def attention(self, backend: AttentionBackend) -> StepAttention:
        """What the layers call."""
        return StepAttention(self.prepared, backend, self.slots, self.layer_kinds)


class RecordedSteps:
    """The recordings of one runner, and the memory that they share."""

    def __init__(self, decoder: Decoder, backend: AttentionBackend) -> None:
        """Such as `reasons_against` has nothing to say of."""
        self._decoder, self._backend = decoder, backend
        self._arena = Arena()
        self._steps_before: Counter[Key] = Counter()
        self._recorded: OrderedDict[Key, _RecordedStep] = OrderedDict()
        self.refused: str | None = None
        """Why nothing is recorded any more."""
        self.num_replayed = 0
        """Steps."""

    @staticmethod
    def reasons_against(decoder: Decoder, backend: AttentionBackend, ranks: Ranks) -> list[str]:
        """Why steps of these would not be replayed; empty where they are."""
        reasons = []
        if decoder.device.type != "cpu" or not backend.can_be_recorded:
            reasons.append("attention is not the native backend's")
        if decoder.ops.name != "native":
            reasons.append("elementwise operations are torch's")
        try:
            replay_function()
        except BackendError as error:
            reasons.append(str(error))
        if ranks.count > 1:
            reasons.append("ranks exchange values within a step")
        return reasons

    @property
    def num_recordings(self) -> int:
        """That are kept."""
        return len(self._recorded)

    def forward(self, inputs: ForwardInputs) -> torch.Tensor | None:
        """Hidden states [rows, hidden], valid until the next call; None where the step is to be run without recording.

        Raises:
            CapacityError: there was no memory for a product
        """
        rows = len(inputs.token_ids)
        if self.refused is not None or rows > MOST_ROWS:
            return None
        num_kinds, num_columns = len(inputs.prepared), len(inputs.slots)
        key = (rows, torch.get_num_threads(), num_kinds, num_columns, tuple(inputs.layer_kinds))
        if (recorded := self._recorded.get(key)) is not None:
            self._recorded.move_to_end(key)
            self.num_replayed += 1
            return recorded.replay(inputs)
        self._steps_before[key] += 1
        return self._record(key, inputs) if self._steps_before[key] > STEPS_BEFORE else None

    def _record(self, key: Key, inputs: ForwardInputs) -> torch.Tensor | None:
        try:
            recorded = _RecordedStep(self._decoder, self._backend, self._arena, inputs)
        except NotRecordable as reason:
            self.refused = str(reason)
            log.info("steps are not recorded: %s", reason)
            return None
        self._recorded[key] = recorded
        if len(self._recorded) > MOST_RECORDINGS:
            forgotten, _ = self._recorded.popitem(last=False)
            del self._steps_before[forgotten]
        return recorded.hidden


class _RecordedStep:
    """One number of rows: the inputs that a replay reads, and the hidden states that it leaves."""

    def __init__(self, decoder: Decoder, backend: AttentionBackend, arena: Arena, inputs: ForwardInputs) -> None:
        """Run the step of `inputs`, and record it."""
        self._inputs = own = ForwardInputs(
            inputs.token_ids.clone(),
            inputs.positions.clone(),
            [slots.clone() for slots in inputs.slots],
            inputs.prepared,
            inputs.layer_kinds,
        )
        self._recording = Recording(arena)
        attention = own.attention(backend)
        self.hidden = self._recording.record(lambda: decoder.forward(own.token_ids, own.positions, attention))

    def replay(self, inputs: ForwardInputs) -> torch.Tensor:
        """Run another step of as many rows."""
        own = self._inputs
        own.token_ids.copy_(inputs.token_ids)
        own.positions.copy_(inputs.positions)
        for slots, new in zip(own.slots, inputs.slots, strict=True):
            slots.copy_(new)
        for prepared, other in zip(own.prepared, inputs.prepared, strict=True):
            prepared.take_over(other)
        self._recording.replay()
        return self.hidden

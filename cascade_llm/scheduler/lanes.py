"""Lanes: which sequence has which fixed place in the device's state."""

from __future__ import annotations

import heapq

from cascade_llm.plan import LaneStart
from cascade_llm.scheduler.sequence import Sequence

__all__ = ["LanePool"]


class LanePool:
    """Lanes 0 to num_lanes - 1; the lowest free one is entered first. A lane's epoch counts its uses."""

    def __init__(self, num_lanes: int) -> None:
        self._free = list(range(num_lanes))
        self._epochs = [0] * num_lanes

    @property
    def num_free(self) -> int:
        """Lanes without a sequence."""
        return len(self._free)

    def enter(self, sequence: Sequence) -> LaneStart:
        """Give a sequence a free lane; returns what the device has to set up in it."""
        lane = heapq.heappop(self._free)
        self._epochs[lane] += 1
        sequence.lane, sequence.epoch = lane, self._epochs[lane]
        request = sequence.request
        return LaneStart(
            lane=lane,
            epoch=sequence.epoch,
            params=request.params,
            seed=request.seed,
            sample_index=sequence.sample_index,
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=sequence.token_ids[sequence.prompt_len :],
            ending_token_ids=request.ending_token_ids,
        )

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence's lane back; rows that were planned for it in this use of the lane are told by the epoch."""
        heapq.heappush(self._free, sequence.lane)
        sequence.epoch = 0

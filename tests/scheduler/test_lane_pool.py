"""Lanes are entered lowest first, and each use has an epoch of its own."""

from __future__ import annotations

from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.prefix_cache import root_key
from cascade_llm.scheduler.sequence import Request, Sequence
from cascade_llm.scheduler.step import LanePool


def test_lanes_and_epochs() -> None:
    request = Request(request_id="a", prompt_token_ids=[5, 6], params=SamplingParams(), seed=3)
    first, second, third = (Sequence(request, index, 0, 4, root_key()) for index in range(3))
    lanes = LanePool(2)
    starts = [lanes.enter(first), lanes.enter(second)]
    assert [(start.lane, start.epoch) for start in starts] == [(0, 1), (1, 1)]
    assert lanes.num_free == 0
    lanes.leave(first)
    assert (lanes.num_free, first.epoch) == (1, 0)
    third.token_ids.append(7)
    start = lanes.enter(third)
    assert (start.lane, start.epoch, start.sample_index, start.seed) == (0, 2, 2, 3)
    assert (list(start.prompt_token_ids), list(start.output_token_ids)) == ([5, 6], [7])
    assert start.ending_token_ids is request.ending_token_ids

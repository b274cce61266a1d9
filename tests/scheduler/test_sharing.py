"""What each sequence shared, against a count of every segment of every step."""

from __future__ import annotations

from collections import defaultdict

import pytest

from cascade_llm.plan import StepPlan
from cascade_llm.scheduler.sequence import SequenceSharing
from tests.scheduler.generated import RandomLoad, random_engine
from tests.scheduler.simulated_engine import SimulatedEngine

Name = tuple[str, int]


class SlowLedger:
    """Adds up each step when it is planned."""

    def __init__(self) -> None:
        self.known: defaultdict[Name, SequenceSharing] = defaultdict(SequenceSharing)

    def count(self, engine: SimulatedEngine, plan: StepPlan) -> None:
        lanes = {s.lane: (s.request.request_id, s.sample_index) for s in engine.scheduler._roster.running}
        kinds = plan.layer_kinds or (0,)
        weights = [kinds.count(kind) / len(kinds) for kind in range(len(plan.cascades))]
        paths = [list(cascade.paths()) for cascade in plan.cascades]
        for sequence, lane in enumerate(plan.sequence_lanes):
            read = saved = 0.0
            most_levels = group_size = 1
            for weight, cascade, all_paths in zip(weights, plan.cascades, paths, strict=True):
                num_levels = 1
                for depth, level in enumerate(cascade.levels):
                    segment = all_paths[sequence][depth]
                    num_readers = sum(path[depth] == segment for path in all_paths)
                    num_tokens = level.kv_len(segment, cascade.page_size)
                    read += weight * num_tokens / num_readers
                    saved += weight * (num_tokens - num_tokens / num_readers)
                    if num_tokens and num_readers > 1:
                        num_levels, group_size = num_levels + 1, max(group_size, num_readers)
                most_levels = max(most_levels, num_levels)
            before = self.known[lanes[lane]]
            self.known[lanes[lane]] = SequenceSharing(
                before.num_steps + 1,
                before.num_shared_steps + (group_size > 1),
                max(before.num_levels, most_levels),
                max(before.group_size, group_size),
                before.kv_tokens_read + read,
                before.kv_tokens_saved + saved,
            )


def assert_equal(found: SequenceSharing | None, expected: SequenceSharing) -> None:
    assert found is not None
    for name in SequenceSharing.__dataclass_fields__:
        assert getattr(found, name) == pytest.approx(getattr(expected, name)), name


@pytest.mark.parametrize("seeds", [range(14), pytest.param(range(14, 60), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("lag", [0, 1])
def test_random_loads(lag: int, seeds: range) -> None:
    num_ended = num_shared = 0
    for seed in seeds:
        engine, rng = random_engine(seed, lag=lag, all_features=True)
        load, twin = RandomLoad(rng, engine.config), SlowLedger()
        for step in range(60):
            if step % 8 == 0 and step < 40:
                load.add_to(engine, 3)
            plan, engine.updates = engine.schedule(), []
            if plan is not None:
                twin.count(engine, plan)
            if engine.pending and (plan is None or len(engine.pending) > lag):
                engine.commit()
            if rng.random() < 0.05 and (running := engine.scheduler._roster.running):
                stopped = rng.choice(running)
                name = stopped.request.request_id, stopped.sample_index
                assert_equal(engine.scheduler.finish(*name, "stop"), twin.known[name])
                assert engine.scheduler.finish(*name, "stop") is None
            for update in engine.updates:
                assert (update.sharing is None) == (update.finish_reason is None)
                if update.sharing is not None:
                    assert_equal(update.sharing, twin.known[update.request_id, update.sample_index])
                    num_ended, num_shared = num_ended + 1, num_shared + (update.sharing.group_size > 1)
    assert num_ended > 7.5 * len(seeds)
    assert num_shared > 2.5 * len(seeds)


def test_parts_of_all_sequences_make_what_the_engine_counts() -> None:
    engine, sharing = SimulatedEngine(), list[SequenceSharing]()
    for own in range(5):
        engine.add([*range(20), 100 + own, *range(4 * own)], max_tokens=3 + 5 * own)
    while engine.scheduler.has_unfinished:
        engine.step()
        sharing += [update.sharing for update in engine.updates if update.sharing is not None]
    assert len(sharing) == 5
    assert sum(s.kv_tokens_read for s in sharing) == pytest.approx(engine.counters.kv_tokens_read)
    assert sum(s.kv_tokens_saved for s in sharing) == pytest.approx(engine.counters.kv_tokens_saved)
    assert max(s.group_size for s in sharing) == 5
    assert min(s.num_levels for s in sharing) == 2

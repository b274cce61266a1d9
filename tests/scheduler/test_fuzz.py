"""Random loads on random limits: each request produces what it must, no page is lost, nobody starves."""

from __future__ import annotations

import pytest
import xxhash

from cascade_llm.plan import StepPlan
from cascade_llm.scheduler.sequence import Request, Sequence, SequenceStatus, SequenceUpdate
from cascade_llm.scheduler.sessions import SessionLimits, SessionName
from tests.scheduler.generated import RandomLoad, random_engine
from tests.scheduler.simulated_engine import Output, SimulatedEngine


class Fuzz:
    """Drives one random load to its end, with aborts, failed samples and failed steps, and checks what came of it."""

    def __init__(
        self,
        seed: int,
        *,
        lag: int,
        num_requests: int,
        trouble: float,
        salts: tuple[bytes, ...] = (b"", b"salt"),
        tenants: tuple[str, ...] = ("", "b"),
    ) -> None:
        self.now_s = 0.0
        self.engine, self.rng = random_engine(seed, lag=lag, all_features=True, clock=lambda: self.now_s)
        self.lag, self.num_requests, self.trouble, self.drafts = lag, num_requests, trouble, seed % 5 == 0
        self.load = RandomLoad(
            self.rng, self.engine.config, salts, tenants, masks=seed % 7 == 0, sessions=seed % 3 != 1
        )
        self.spoiled: set[str] = set()
        """Requests that were ended by trouble."""
        self.num_steps = 0
        self.oldest: Sequence | None = None
        self.num_skips = 0
        """Calls in a row that did not plan it."""

    def run(self) -> None:
        engine = self.engine
        while len(engine.requests) < self.num_requests or engine.scheduler.has_unfinished:
            if len(engine.requests) < self.num_requests and self.rng.random() < 0.4:
                self.load.add_to(engine, self.rng.choice((1, 1, 1, 4)))
            self.use_sessions()
            if engine.requests and self.happens(2 * self.trouble):
                self.end(self.rng.choice(list(engine.requests)))
            self.step()
        counts = engine.scheduler.page_counts
        assert counts.held_pages == counts.session_pages
        for request_id in self.spoiled:
            del engine.requests[request_id]
        engine.check_outputs()

    def use_sessions(self) -> None:
        """Time passes; sometimes a session is dropped, or what they may hold is another share of the pool."""
        scheduler, names = self.engine.scheduler, ("a", "b", "c", "d")
        self.now_s += 1.0
        if self.happens(0.02):
            scheduler.drop_session(SessionName(self.rng.choice(self.load.tenants), self.rng.choice(names)))
        if self.happens(0.02):
            shares = {tenant: self.rng.choice((0.1, 0.3)) for tenant in self.load.tenants if self.happens(0.5)}
            share = self.rng.choice((0.1, 0.5, 1.0))
            scheduler.limit_sessions(SessionLimits(share=share, ttl_s=50.0, tenant_shares=shares))
        assert {info.session_id for info in scheduler.sessions.infos()} <= {*names}
        assert scheduler.page_counts.session_pages <= scheduler.config.total_pages
        self.engine.check()

    def happens(self, probability: float) -> bool:
        return self.rng.random() < probability

    def end(self, request_id: str) -> None:
        """Abort a request; one that has ended already is not spoiled by it."""
        if any(s.request.request_id == request_id for s in self.engine.scheduler.sequences()):
            self.spoiled.add(request_id)
        self.engine.scheduler.abort(request_id)
        self.engine.check()

    def step(self) -> None:
        engine = self.engine
        self.num_steps += engine.scheduler.has_unfinished
        num_preempted = engine.counters.preemptions
        plan = engine.schedule()
        if plan is not None and engine.counters.preemptions > num_preempted:
            assert all(start.sample_index for start in plan.lane_starts), "nobody is admitted in somebody's place"
        self.check_progress(plan)
        engine.updates = []
        if engine.pending and (plan is None or len(engine.pending) > self.lag):
            if self.happens(self.trouble / 2):
                engine.fail()
            else:
                num_samples = len(engine.pending[0].sample_rows)
                engine.commit(frozenset(i for i in range(num_samples) if self.happens(self.trouble / 2)))
        for update in engine.updates:
            self.check_cached(update)
            if update.finish_reason == "error":
                self.spoiled.add(update.request_id)
                engine.scheduler.abort(update.request_id)

    def check_cached(self, update: SequenceUpdate) -> None:
        """What was found in the cache begins a text of the same tenant and salt, looked for in them all."""
        request = self.engine.requests[update.request_id]
        found = list(request.prompt_token_ids)[: update.num_cached_tokens]
        texts = [
            [*other.prompt_token_ids, *output.token_ids]
            for request_id, other in self.engine.requests.items()
            if is_beside(other, request) or (other is request and update.sample_index)
            for output in (self.engine.outputs.get((request_id, i), Output()) for i in range(other.params.n))
        ]
        assert not found or any(text[: len(found)] == found for text in texts), "of another tenant"

    def check_progress(self, plan: StepPlan | None) -> None:
        """The oldest running sequence is planned, or waits until no step is in flight; nobody waits for ever.

        One that drafts waits for its own token before that.
        """
        running = [s for s in self.engine.scheduler.sequences() if s.status is SequenceStatus.RUNNING]
        oldest = min(running, key=lambda s: s.precedence, default=None)
        planned = oldest is None or (plan is not None and oldest.lane in plan.sequence_lanes)
        self.num_skips = 0 if planned else self.num_skips + 1 if oldest is self.oldest else 1
        self.oldest = oldest
        assert self.num_skips <= (2 + self.drafts) * self.lag, "the oldest sequence does not advance"
        requests = self.engine.requests.values()
        most_rows = sum(r.params.n * (len(r.prompt_token_ids) + r.params.max_tokens) for r in requests)
        assert self.num_steps <= (1 + 2 * self.lag) * most_rows, "somebody starves"


def is_beside(other: Request, request: Request) -> bool:
    """Whether two requests may share pages."""
    return other is not request and (other.client.tenant, other.cache_salt) == (
        request.client.tenant,
        request.cache_salt,
    )


@pytest.mark.parametrize(
    "first_seed", [0, 50, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(100, 300, 50))]
)
def test_random_loads(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 50):
        Fuzz(seed, lag=seed % 2, num_requests=12, trouble=0.01 if seed % 4 < 2 else 0.0).run()


def test_random_loads_when_most_page_keys_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xxhash, "xxh3_128_digest", lambda data: bytes([sum(data) % 3]) * 16)
    for seed in range(300, 330):
        Fuzz(seed, lag=seed % 2, num_requests=12, trouble=0.01, salts=(b"",), tenants=("",)).run()  # in the keys alone


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 1])
def test_long_random_loads(lag: int) -> None:
    num_steps, seed = 0, 1000
    while num_steps < 10_000:
        fuzz = Fuzz(seed, lag=lag, num_requests=200, trouble=0.003)
        fuzz.run()
        num_steps += fuzz.num_steps
        seed += 1


def test_engine_of_this_suite_notices_a_wrong_page() -> None:
    engine = SimulatedEngine()
    engine.add(range(8))
    engine.add(range(100, 108))
    engine.step()
    first, second = engine.scheduler.sequences()
    first.pages[0], second.pages[0] = second.pages[0], first.pages[0]
    with pytest.raises(AssertionError):
        engine.step()

"""Random loads, and step plans made by running them through the scheduler."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from cascade_llm.config import CascadeConfig, SchedulerConfig, window_pages_needed
from cascade_llm.plan import StepPlan
from cascade_llm.scheduler.cascade.choice import SegmentCosts, TokensRead
from cascade_llm.scheduler.cascade.cost_model import AttentionShape, CostModel
from cascade_llm.scheduler.cascade.device_costs import DeviceCosts
from cascade_llm.scheduler.sequence import Client
from cascade_llm.scheduler.sessions import SessionUse
from tests.scheduler.simulated_engine import SimulatedEngine, every_third

__all__ = ["KINDS", "RandomLoad", "generated_steps", "random_config", "random_costs", "random_engine"]

VOCAB_SIZE = 4
"""Of prompts: so few that prompts which do not branch off each other begin alike too."""

KINDS: tuple[tuple[int | None, ...], ...] = (
    (None, 1),
    (9,),
    (None, 20, 6),
    (33, 2),
    (None, 37),
    (3,),
    (17,),
    (None, 12),
)
"""Windows of attention kinds, from a token to more than most sequences have."""


def generated_steps(
    seed: int,
    num_steps: int,
    *,
    config: SchedulerConfig | None = None,
    lag: int | None = None,
    drafts: bool = False,
    masks: bool = False,
) -> Iterator[tuple[StepPlan, list[list[int]]]]:
    """Plans of a random load, each with the page table of every sequence in the order of its leaf segments.

    The load has forests of prompts that share prefixes, n samples, chunked prefill mixed with decode, preemption and
    aborts. Each plan has passed `StepPlan.check(page_tables)`, and a simulated device has checked that its rows meet
    their own text. The same seed gives the same plans in every process.

    Args:
        seed: of the load, and of what is not given here
        num_steps: how many plans to yield
        config: limits and page size; random by default, with at most 200 pages of 1 to 16 tokens, so that page ids are
            below `config.total_pages` (200) and contexts at most 64 tokens
        lag: steps planned ahead of the last result, 0 or 1; random by default
        drafts: whether tokens are proposed
        masks: whether some requests have a mask, of words for a vocabulary of 1024
    """
    rng = random.Random(seed)
    config = config or random_config(rng)
    costs, lag = random_costs(rng), rng.choice((0, 1)) if lag is None else lag
    engine = SimulatedEngine(config, costs=costs, lag=lag, drafts=drafts)
    load = RandomLoad(rng, config, masks=masks)
    while num_steps:
        if rng.random() < 0.4 or not engine.scheduler.has_unfinished:
            load.add_to(engine, rng.choice((1, 2, 4, 8)))
        if rng.random() < 0.03:
            engine.scheduler.abort(rng.choice(list(engine.requests)))
        plan = engine.step()
        if plan is not None:
            yield plan, engine.page_tables
            num_steps -= 1


def random_config(rng: random.Random) -> SchedulerConfig:
    """Small limits: 1 to 16 lanes, at most 200 pages of 1 to 16 tokens, from one sequence's worth on."""
    page_size = rng.choice((1, 2, 4, 4, 8, 16))
    max_model_len = rng.choice((24, 48, 64))
    max_num_seqs = rng.choice((1, 2, 4, 8, 8, 16, 16))
    return SchedulerConfig(
        page_size=page_size,
        total_pages=-(-max_model_len // page_size) + rng.choice((0, 1, 3, 10, 50, 136, 136)),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.choice((0, 1, 5, 20, 100, 100)),
        enable_prefix_caching=rng.random() < 0.85,
        cascade=CascadeConfig(
            enabled=rng.random() < 0.97,
            max_levels=rng.choice((1, 2, 2, 3, 3, 3, 4, 4, 4, 4)),
            shared_prefix_len=rng.choice((None, None, 1, 1, 4, 8)),
        ),
    )


def random_costs(rng: random.Random) -> SegmentCosts:
    """Token counts, or a device whose levels are cheap enough to pay for short prefixes, sometimes."""
    shape = AttentionShape(num_qo_heads=8, num_kv_heads=2, head_dim=64, kv_dtype_bytes=2)
    device = DeviceCosts(
        shared_bytes_per_s=1e12,
        shared_flops_per_s=1e14,
        leaf_bytes_per_s=1e12,
        leaf_flops_per_s=2e13,
        segment_s=rng.choice((0.0, 1e-9, 1e-8)),
        level_s=rng.choice((0.0, 1e-9, 2e-8)),
        merge_bytes_per_s=1e15,
        tile_rows=rng.choice((1, 16)),
        num_processors=rng.choice((1, 1, 6, 16)),
        split_tokens=rng.choice((4, 16)),
    )
    return rng.choice((TokensRead(), CostModel(shape, device)))


def random_engine(
    seed: int, *, lag: int, all_features: bool = False, clock: Callable[[], float] = lambda: 0.0
) -> tuple[SimulatedEngine, random.Random]:
    """An engine with a vocabulary so small that texts meet by chance, and what to draw its load from.

    all_features: whether every third has attention kinds with windows, and every fifth drafts
    """
    rng = random.Random(seed)
    config = random_config(rng)
    costs, vocab_size = random_costs(rng), rng.choice((2, 4, 1000))
    if all_features and seed % 3 == 0:
        kinds = KINDS[seed // 3 % len(KINDS)]
        layer_kinds = tuple(i % len(kinds) for i in range(5))
        config = replace(config, attention_kinds=kinds, layer_kinds=layer_kinds)
        if kinds[0] is None and seed % 2:
            config = replace(config, window_pages=random_window_pages(rng, config))
    return SimulatedEngine(
        config, costs=costs, lag=lag, vocab_size=vocab_size, drafts=all_features and seed % 5 == 0, clock=clock
    ), rng


def random_window_pages(rng: random.Random, config: SchedulerConfig) -> tuple[int, ...]:
    """Pools of their own for kinds with windows: of what one sequence needs, or more."""
    size, longest, most_rows = config.page_size, config.max_model_len, rng.choice((1, 3, 8, 100))
    needed = [window_pages_needed(window or 0, size, longest, most_rows) for window in config.attention_kinds[1:]]
    return tuple(min(config.total_pages, pages + rng.choice((0, 0, 1, 4, 12))) for pages in needed)


class RandomLoad:
    """Requests whose prompts branch off earlier ones, at page boundaries more often than not."""

    def __init__(
        self,
        rng: random.Random,
        config: SchedulerConfig,
        salts: Sequence[bytes] = (b"", b"salt"),
        tenants: Sequence[str] = ("",),
        masks: bool = False,
        sessions: bool = False,
    ) -> None:
        """Each tenant has two clients.

        masks: whether one request in four has one
        sessions: whether half are turns of "a" to "d"
        """
        self.tenants = tenants
        self._masks, self._sessions = masks, sessions
        self._rng, self._config, self._salts = rng, config, salts
        self._prompts: list[list[int]] = []

    def add_to(self, engine: SimulatedEngine, count: int = 1) -> list[str]:
        """Queue `count` requests and return their ids."""
        rng = self._rng
        return [
            engine.add(
                self._prompt(engine),
                priority=rng.choice((0, 0, 0, 1)),
                client=self._client(),
                salt=rng.choice(self._salts),
                ending=rng.choice(((), (3,))),
                n=rng.choice((1, 1, 1, 2, 3, 5)),
                max_tokens=rng.randrange(1, 14),
                temperature=rng.choice((0.0, 1.0)),
                prompt_logprobs=rng.choice((None, None, None, None, 2)),
                stop_token_ids=rng.choice(((), (), (1,))),
                ignore_eos=rng.random() < 0.2,
                mask=every_third if self._masks and rng.random() < 0.25 else None,
                session=self._session() if self._sessions else None,
            )
            for _ in range(count)
        ]

    def _client(self) -> Client:
        if len(self.tenants) == 1:
            return Client(tenant=self.tenants[0])
        tenant, number = self._rng.choice(self.tenants), self._rng.choice((1, 2))
        return Client(name=f"{tenant}{number}", tenant=tenant, weight=number)

    def _session(self) -> SessionUse | None:
        rng = self._rng
        name, source = rng.choice("abcd"), rng.choice((None, None, *"abcd"))
        use = SessionUse(session_id=name, fork_of=source, drop_on_abort=rng.random() < 0.5)
        return use if rng.random() < 0.5 else None

    def _prompt(self, engine: SimulatedEngine) -> list[int]:
        rng, most = self._rng, self._config.max_model_len - 1
        texts = self._prompts
        if engine.outputs and rng.random() < 0.2:  # a conversation that goes on
            (request_id, _), output = rng.choice(list(engine.outputs.items()))
            texts = [[*engine.requests[request_id].prompt_token_ids, *output.token_ids]]
        start = rng.choice(texts[-6:]) if texts and rng.random() < 0.85 else []
        cut = rng.choice((len(start), rng.randrange(len(start) + 1)))
        cut -= cut % self._config.page_size if rng.random() < 0.6 else 0
        new = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice((0, 1, 2, 6, 12, rng.randrange(1, most + 1))))]
        prompt = (start[:cut] + new)[:most] or [rng.randrange(VOCAB_SIZE)]
        self._prompts.append(prompt)
        return prompt

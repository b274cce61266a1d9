"""An engine without a model: a device that keeps, for each slot, *which text* its K/V stand for.

The K/V of a token depend on the whole text before it. So a slot holds a number made of all tokens up to its own (and of
the request's tenant and salt), and every row of a step is checked to meet exactly its own text, token by token,
whatever pages the scheduler chose, shared, copied, evicted or gave away. Tokens are drawn by a pure function of the
request, so what each request has to produce is known beforehand (`expected_output`): batches, preemptions and lags must
not change it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Any

from cascade_llm.config import CascadeConfig, SchedulerConfig
from cascade_llm.outputs import TokenLogprob
from cascade_llm.plan import CascadeLevel, CascadePlan, IntColumn, LaneStart, StepPlan, StepResult, Tier, int_column
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.cascade.choice import SegmentCosts, TokensRead
from cascade_llm.scheduler.scheduler import Drafter, FlashInferScheduler, SequenceUpdate
from cascade_llm.scheduler.sequence import Client, Request, Sequence, SequenceStatus, TokenMask
from cascade_llm.scheduler.sessions import SessionUse

__all__ = [
    "Output",
    "SimulatedDevice",
    "SimulatedEngine",
    "check_report",
    "every_third",
    "expected_output",
    "small_config",
]

Text = tuple[str, bytes, int]
"""Tenant and salt, and a number that stands for a sequence of tokens."""


def small_config(*, cascade: CascadeConfig | None = None, **changes: Any) -> SchedulerConfig:
    """64 pages of 4 tokens, 8 lanes; levels for every shared page unless `cascade` says otherwise."""
    options: dict[str, Any] = {
        "page_size": 4,
        "total_pages": 64,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
    }
    return SchedulerConfig(**{**options, **changes}, cascade=cascade or CascadeConfig(shared_prefix_len=1))


def _text(before: int, token_id: int) -> int:
    return hash((before, token_id))


def _texts(token_ids: Tokens[int]) -> list[int]:
    """For each token the number of the text that it ends."""
    texts = [0]
    for token_id in token_ids:
        texts.append(_text(texts[-1], token_id))
    return texts[1:]


def _draw(
    request: Request, sample_index: int, text: int, position: int, vocab_size: int, mask: IntColumn | None
) -> int:
    """The next token of those allowed: a function of the text (greedy) or of (seed, sample, position)."""
    source = (text,) if request.params.greedy else (request.seed, sample_index, position)
    allowed = range(vocab_size)
    if mask is not None:
        allowed = [t for t in range(vocab_size) if mask[t // 32] >> t % 32 & 1]  # type: ignore[assignment]
    return allowed[(hash(source) >> 16) % len(allowed)]


def every_third(output: Tokens[int]) -> IntColumn:
    """A mask: any token but those that are, with the output's length and last token, multiples of 3."""
    shift = len(output) + (output[-1] if output else 0)
    return int_column([sum(1 << bit for bit in range(31) if (32 * w + bit + shift) % 3) for w in range(32)])


@dataclass
class Output:
    """What a sequence produced."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_token_id: int | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


def expected_output(request: Request, sample_index: int, max_model_len: int, vocab_size: int) -> Output:
    """What a sequence produces when nothing goes wrong, computed without a scheduler."""
    params, output, tokens = request.params, Output(), list(request.prompt_token_ids)
    if sample_index == 0 and params.prompt_logprobs is not None:
        output.prompt_logprobs = [TokenLogprob(t, float(-i), 1, ()) for i, t in enumerate(tokens)][1:]
    text = _texts(tokens)[-1]
    while output.finish_reason is None:
        mask = request.mask(output.token_ids) if request.mask else None
        token = _draw(request, sample_index, text, len(tokens), vocab_size, mask)
        tokens.append(token)
        text = _text(text, token)
        output.token_ids.append(token)
        if token in request.ending_token_ids and len(output.token_ids) > params.min_tokens:
            output.finish_reason = "stop"
            output.stop_token_id = token if token in (params.stop_token_ids or ()) else None
        elif len(output.token_ids) == params.max_tokens or len(tokens) == max_model_len:
            output.finish_reason = "length"
    return output


@dataclass
class _Lane:
    start: LaneStart
    request: Request
    token_ids: list[int]
    texts: list[int]

    @property
    def owner(self) -> tuple[str, bytes]:
        return self.request.client.tenant, self.request.cache_salt

    def append(self, token_id: int) -> None:
        self.texts.append(_text(self.texts[-1], token_id))
        self.token_ids.append(token_id)


class SimulatedDevice:
    """Lanes and a KV pool. Executes plans in order, and asserts that each finds what it needs."""

    def __init__(self, config: SchedulerConfig, requests: Mapping[int, Request], vocab_size: int) -> None:
        """`requests`: by their seed, which is how a lane knows whose it is."""
        self._config, self._requests, self._vocab_size = config, requests, vocab_size
        self._pools: list[list[Text | None]] = [
            [None] * (pages * config.page_size) for pages in (config.total_pages, *config.window_pages)
        ]
        self._other_tiers: dict[tuple[Tier, int], list[Text | None]] = {}
        self._lanes: dict[int, _Lane] = {}

    def execute(self, plan: StepPlan, failed_samples: frozenset[int] = frozenset()) -> StepResult:
        """Compute a step: enter lanes, copy pages, write rows, check what rows read, draw tokens."""
        for start in plan.lane_starts:
            self._enter_lane(start)
        self._copy_pages(plan)
        self._write_rows(plan)
        self._check_reads(plan)
        prompt_logprobs, drafts = (
            self._prompt_logprobs(plan),
            dict(zip(plan.draft_samples, plan.draft_lens, strict=True)),
        )
        token_ids, accepted_counts = list[int](), list[int]()
        for sample in range(len(plan.sample_rows)):
            if sample in drafts:
                accepted_counts.append(self._accepted(plan, sample, drafts[sample], token_ids))
            elif len(token_ids) == sample:
                token_ids.append(self._sample(plan, sample))
        result = StepResult(
            step_id=plan.step_id,
            prompt_logprobs=prompt_logprobs,
            token_ids=token_ids,
            accepted_counts=accepted_counts,
            failed_samples=failed_samples,
        )
        result.check(plan)
        return result

    def page(self, page: int) -> list[Text | None]:
        """What the slots of a page of the first pool stand for."""
        size = self._config.page_size
        return self._pools[0][page * size : (page + 1) * size]

    def ruin(self, plan: StepPlan) -> None:
        """A step that raised: nothing in the slots that it was to fill can be used."""
        for slots, pool in zip((plan.slots, *plan.window_slots), self._pools, strict=True):
            for slot in slots:
                pool[slot] = None

    def _enter_lane(self, start: LaneStart) -> None:
        request = self._requests[start.seed]
        assert start.prompt_token_ids == request.prompt_token_ids
        assert start.params is request.params
        assert start.ending_token_ids == request.ending_token_ids
        token_ids = [*start.prompt_token_ids, *start.output_token_ids]
        self._lanes[start.lane] = _Lane(start, request, token_ids, _texts(token_ids))

    def _copy_pages(self, plan: StepPlan) -> None:
        size = self._config.page_size
        sources = [
            self._other_tiers[copy.source_tier, copy.source]
            if copy.source_tier
            else self._pools[copy.pool][copy.source * size : (copy.source + 1) * size]
            for copy in plan.page_copies
        ]
        for copy, texts in zip(plan.page_copies, sources, strict=True):
            if copy.target_tier:
                self._other_tiers[copy.target_tier, copy.target] = texts
            else:
                self._pools[copy.pool][copy.target * size : (copy.target + 1) * size] = texts

    def _write_rows(self, plan: StepPlan) -> None:
        from_lane = set(plan.lane_rows)
        for sequence, rows, lane in self._sequences(plan):
            assert lane.start.epoch == plan.sequence_epochs[sequence]
            texts = self._row_texts(plan, rows, lane)
            for row in rows:
                position = plan.positions[row]
                if row in from_lane:
                    assert position == len(lane.token_ids) - 1, "a lane holds its last token only"
                elif position < len(lane.token_ids):
                    assert plan.token_ids[row] == lane.token_ids[position]
                for slots, pool in zip((plan.slots, *plan.window_slots), self._pools, strict=True):
                    pool[slots[row]] = (*lane.owner, texts[position])

    def _row_texts(self, plan: StepPlan, rows: range, lane: _Lane) -> list[int]:
        """A sequence's texts, up to those of its proposed tokens."""
        if plan.positions[rows[-1]] < len(lane.texts):
            return lane.texts
        texts = list(lane.texts)
        for row in rows:
            if plan.positions[row] == len(texts):
                texts.append(_text(texts[-1], plan.token_ids[row]))
        return texts

    def _check_reads(self, plan: StepPlan) -> None:
        size = self._config.page_size
        for kind, cascade in enumerate(plan.cascades):
            pool = self._pools[kind if plan.window_slots else 0]
            for (sequence, rows, lane), path in zip(self._sequences(plan), cascade.paths(), strict=True):
                zipped = zip(cascade.shared_levels, path, strict=False)
                shared = [page for level, segment in zipped for page in level.pages(segment)]
                own, end = list(cascade.leaf.pages(sequence)), plan.positions[rows[-1]] + 1
                num_read = cascade.path_len(path)
                assert num_read == end or cascade.window_len is not None
                first = end - num_read
                texts, owner = self._row_texts(plan, rows, lane)[:end], lane.owner
                met = self._met(pool, texts, owner, first, shared, own, 0)
                if cascade.window_len is not None:  # the shared pages may lie between those of the leaf
                    reached = max(first, plan.positions[rows[0]] + 1 - cascade.window_len)
                    inside = max(0, end - cascade.window_len)
                    met = any(
                        self._met(pool, texts, owner, first, shared, own, cut, skip=reached - first)
                        and (not shared or first + cut * size >= inside)
                        for cut in range(len(own))
                    )
                assert met, f"sequence {sequence} meets another text"

    def _met(
        self,
        pool: list[Text | None],
        texts: list[int],
        owner: tuple[str, bytes],
        first: int,
        shared: list[int],
        own: list[int],
        cut: int,
        skip: int = 0,
    ) -> bool:
        """Whether pages of a leaf, with the shared ones behind the first `cut`, hold a text from position `first` on,
        but for `skip` tokens that no row reads."""
        size = self._config.page_size
        pages = [*own[:cut], *shared, *own[cut:]]
        expected = [(*owner, text) for text in texts[first + skip :]]
        slots = [text for page in pages for text in pool[page * size : (page + 1) * size]]
        return slots[skip:][: len(expected)] == expected

    def _sample(self, plan: StepPlan, sample: int) -> int:
        row, position = plan.sample_rows[sample], plan.sample_positions[sample]
        source, target = self._lane_of_row(plan, row), self._lanes[plan.sample_lanes[sample]]
        assert source.request is target.request
        assert len(target.token_ids) == position
        assert source.texts[plan.positions[row]] == target.texts[-1]
        assert position < self._config.max_model_len, "planned past max_model_len"
        request = target.request
        assert position < len(request.prompt_token_ids) + request.params.max_tokens, "planned past max_tokens"
        mask = self._mask(plan, sample)
        expected = request.mask(target.token_ids[len(request.prompt_token_ids) :]) if request.mask else None
        assert mask == expected, "a sample has the mask of the tokens before it"
        token_id = _draw(request, target.start.sample_index, target.texts[-1], position, self._vocab_size, mask)
        target.append(token_id)
        return token_id

    def _mask(self, plan: StepPlan, sample: int) -> IntColumn | None:
        mask_row = plan.sample_mask_rows[sample] if plan.sample_mask_rows else -1
        return None if mask_row == -1 else plan.token_bitmasks[mask_row]

    def _accepted(self, plan: StepPlan, first: int, length: int, token_ids: list[int]) -> int:
        """Draw from the rows of a draft until a token is another than the proposed one; returns how many were not."""
        proposed = [plan.token_ids[plan.sample_rows[first] + i] for i in range(1, length + 1)]
        for i in range(length + 1):
            token_ids.append(self._sample(plan, first + i))
            if i == length or token_ids[-1] != proposed[i]:
                token_ids += [-1] * (length - i)
                return i
        raise AssertionError

    def _prompt_logprobs(self, plan: StepPlan) -> list[TokenLogprob]:
        reported = []
        for row, token_id in zip(plan.prompt_logprob_rows, plan.prompt_logprob_token_ids, strict=True):
            position = plan.positions[row] + 1
            assert self._lane_of_row(plan, row).request.prompt_token_ids[position] == token_id
            reported.append(TokenLogprob(token_id, float(-position), 1, ()))
        return reported

    def _sequences(self, plan: StepPlan) -> list[tuple[int, range, _Lane]]:
        leaf = plan.cascade.leaf
        return [(i, leaf.rows(i), self._lanes[lane]) for i, lane in enumerate(plan.sequence_lanes)]

    def _lane_of_row(self, plan: StepPlan, row: int) -> _Lane:
        return next(lane for _, rows, lane in self._sequences(plan) if row in rows)


class SimulatedEngine:
    """Scheduler and simulated device in the engine's loop; every step is checked in full."""

    def __init__(
        self,
        config: SchedulerConfig | None = None,
        *,
        costs: SegmentCosts | None = None,
        lag: int = 0,
        vocab_size: int = 1000,
        drafter: Drafter | None = None,
        drafts: bool = False,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`drafts`: tokens are proposed, by `drafter` or by the engine itself, which knows what is right."""
        self.config = config or small_config()
        drafter = self.draft if drafts and drafter is None else drafter
        self.scheduler = FlashInferScheduler(self.config, costs or TokensRead(), drafter, clock)
        self.requests: dict[str, Request] = {}
        self.outputs: dict[tuple[str, int], Output] = {}
        self.updates: list[SequenceUpdate] = []
        """Of the last step."""
        self.page_tables: list[list[int]] = []
        """Of the last plan's sequences."""
        self._by_seed: dict[int, Request] = {}
        self._device = SimulatedDevice(self.config, self._by_seed, vocab_size)
        self._lag, self._vocab_size = lag, vocab_size
        self.pending: deque[StepPlan] = deque()
        """Steps in flight, the oldest first."""

    @property
    def counters(self) -> Any:
        """The scheduler's counters."""
        return self.scheduler.counters

    def add(
        self,
        prompt: Tokens[int],
        *,
        request_id: str | None = None,
        priority: int = 0,
        client: Client | None = None,
        salt: bytes = b"",
        ending: Tokens[int] = (),
        mask: TokenMask | None = None,
        session: SessionUse | None = None,
        **params: Any,
    ) -> str:
        """Queue a request and return its id; `params` are sampling parameters."""
        request = Request(
            request_id=request_id or f"r{len(self.requests)}",
            prompt_token_ids=list(prompt),
            params=SamplingParams(**{"max_tokens": 4, **params}),
            seed=len(self.requests),
            priority=priority,
            client=client or Client(),
            cache_salt=salt,
            model_ending_token_ids=frozenset(ending),
            mask=mask,
            session=session,
        )
        self.requests[request.request_id] = self._by_seed[request.seed] = request
        self.scheduler.add(request)
        return request.request_id

    def schedule(self) -> StepPlan | None:
        """Plan a step and check it."""
        plan = self.scheduler.schedule()
        self.check()
        if plan is None:
            return None
        tables = {s.lane: list(s.pages) for s in self.scheduler.sequences() if s.status is SequenceStatus.RUNNING}
        self.page_tables = [tables[lane] for lane in plan.sequence_lanes]
        plan.check(self.page_tables)
        check_report(plan)
        check_order(plan)
        self.pending.append(plan)
        return plan

    def commit(self, failed_samples: frozenset[int] = frozenset()) -> list[SequenceUpdate]:
        """Execute the oldest step in flight and take its result in."""
        plan = self.pending.popleft()
        self.updates = self.scheduler.commit(plan, self._device.execute(plan, failed_samples))
        self._apply_updates()
        return self.updates

    def fail(self) -> None:
        """The oldest step in flight raises."""
        for plan in self.pending:
            self._device.ruin(plan)
        self.updates = self.scheduler.fail(self.pending[0])
        self.pending.clear()
        self._apply_updates()

    def step(self) -> StepPlan | None:
        """Plan a step, and commit the oldest one when it is due; returns the new plan."""
        plan = self.schedule()
        self.updates = []
        if self.pending and (plan is None or len(self.pending) > self._lag):
            self.commit()
        return plan

    def run(self, max_steps: int = 1000) -> list[StepPlan]:
        """Step until everything has ended; returns the plans."""
        plans = []
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished:
                return plans
            plan = self.step()
            plans += [plan] if plan else []
        raise AssertionError(f"not done after {max_steps} steps")

    def check(self) -> None:
        """Assert that no page, lane or sequence is lost."""
        self.scheduler.check()
        for _, each in self.scheduler.pools:
            assert each.free_pages + each.held_pages + each.cached_pages == each.total_pages
            assert self.scheduler.num_running or each.held_pages == each.session_pages

    def draft(self, sequence: Sequence, most: int) -> list[int]:
        """Proposals for the fuzz, a pure function of the text: none, or some right tokens and perhaps a wrong one."""
        num_right = (sequence.total_len + sequence.request.seed) % 4
        known = len(sequence.token_ids) - sequence.prompt_len
        right = self.expected(sequence.request.request_id, sequence.sample_index).token_ids[known : known + num_right]
        return [*right, *[0] * (sequence.total_len % 2)]

    def slots_of(self, page: int) -> list[Text | None]:
        """What the slots of a page of the device stand for."""
        return self._device.page(page)

    def expected(self, request_id: str, sample_index: int = 0) -> Output:
        """What a sequence has to produce."""
        request = self.requests[request_id]
        return expected_output(request, sample_index, self.config.max_model_len, self._vocab_size)

    def check_outputs(self) -> None:
        """Assert that each request that has ended by itself produced what it had to, all its samples."""
        for request_id, request in self.requests.items():
            found = [self.outputs.get((request_id, i)) for i in range(request.params.n)]
            assert found == [self.expected(request_id, i) for i in range(request.params.n)], request_id

    def _apply_updates(self) -> None:
        self.check()
        for update in self.updates:
            output = self.outputs.setdefault((update.request_id, update.sample_index), Output())
            assert output.finish_reason is None, "a sequence went on after its end"
            if update.token_id is not None:
                output.token_ids.append(update.token_id)
            output.prompt_logprobs.extend(update.prompt_logprobs or ())
            output.finish_reason, output.stop_token_id = update.finish_reason, update.stop_token_id


def check_report(plan: StepPlan) -> None:
    """Assert that a plan's report says what the plan does."""
    cascade, report = plan.cascade, plan.report
    above_leaf = [(level, i) for level in cascade.shared_levels for i in range(level.num_segments)]
    starts = set(cascade.leaf.qo_indptr[:-1])
    groups = [
        (level, i) for level, i in above_leaf if level.kv_last_page_len[i] and len(starts & set(level.rows(i))) > 1
    ]
    assert report.num_levels == len(cascade.levels)
    assert report.num_groups == len(groups)
    assert report.grouped_rows == len({row for level, i in groups for row in level.rows(i)})
    kinds = plan.layer_kinds or (0,)
    assert report.kv_tokens_read == sum(_tokens_read(plan.cascades[kind]) for kind in kinds) // len(kinds)
    one_level = [sum(plan.cascades[kind].path_len(path) for path in plan.cascades[kind].paths()) for kind in kinds]
    assert report.kv_tokens_one_level == sum(one_level) // len(kinds)
    if cascade.window_len is None:
        assert one_level[kinds.index(0)] == sum(plan.positions[end - 1] + 1 for end in cascade.leaf.qo_indptr[1:])
    assert (report.reason is None) == bool(groups)
    for level in cascade.shared_levels:
        assert any(level.kv_last_page_len), "a level without a segment"


def _tokens_read(cascade: CascadePlan) -> int:
    return sum(level.kv_len(i, cascade.page_size) for level in cascade.levels for i in range(level.num_segments))


def check_order(plan: StepPlan) -> None:
    """Assert that under each parent segment those with pages come first and at most one empty one after them."""
    above: CascadeLevel | None = None
    for level in plan.cascade.shared_levels if plan.cascade.window_len is None else ():
        starts = set(above.qo_indptr) if above else {0}
        had_empty = False
        for i, last_page_len in enumerate(level.kv_last_page_len):
            had_empty = had_empty and level.qo_indptr[i] not in starts
            assert not had_empty, "rows with nothing more to share must be neighbours, the last under their parent"
            had_empty = last_page_len == 0
        above = level

"""The engine against itself: cascade attention on and off, cold cache and warm, on the model's own weights and dtype.

Rounding makes any two ways of computing a model differ. How much of that a user accepts already is measured in the same
run: a sequence computed alone against the same sequence in a batch of 64, and the batch against attention in plain
torch, nothing shared in any. Where kernels give a row the same bits in every batch, the second alone tells what a model
makes of rounding: large activations, as Gemma's, make much of it. Cascade attention is held to the larger one.

Two figures are compared: the largest difference of a log-probability at each position, averaged over positions, and the
largest of all. In bfloat16 any difference, however small, has grown to one and the same level after some ten tokens
and stays there, so both comparisons are draws from nearly one distribution. The average of hundreds of positions then
hardly varies: over eight texts its ratio went from 1.03 to 1.12, so 1.25 is allowed. The largest of millions of
differences is a single draw from a long tail: over nineteen texts its ratio went from 0.82 to 1.48, so 2 is allowed.
One page of 16 tokens left out of a prefix of 64 makes the average 8 times as large as the yardstick's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from cascade_llm.attention.torch_backend import TorchAttentionBackend
from cascade_llm.config import CascadeConfig
from cascade_llm.errors import GenerationError
from cascade_llm.validation.graph_check import GraphReading, read_through_graphs
from cascade_llm.validation.report import Check, Progress
from cascade_llm.validation.teacher_forcing import ForcedReader, ForcedText, Reading
from cascade_llm.worker.model_runner import ModelRunner
from cascade_llm.worker.worker import WorkerFacts

__all__ = ["BATCH", "EngineLoad", "check_engine"]

BATCH = 64
TYPICAL_ALLOWANCE, LARGEST_ALLOWANCE = 1.25, 2.0
MAX_LISTED = 8
NUM_READINGS = 6
GRAPHS_RAN = "captured graphs ran"
Logprobs = Mapping[int, torch.Tensor]
"""By text: [positions, vocab], float32."""


@dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """How much is read."""

    prefix_len: int
    """Tokens that all sequences share."""
    num_places: int
    """Tokens that each reads beyond them."""
    num_settling: int
    """How many of these are read before differences are looked at: rounding needs some steps to spread."""
    num_observed: int
    """Sequences whose whole distributions are compared."""

    @property
    def max_model_len(self) -> int:
        """The context that it needs."""
        return self.prefix_len + self.num_places + 1

    def texts(self, token_ids: Sequence[int]) -> list[ForcedText]:
        """`BATCH` sequences: one prefix, and continuations from as many positions of the same text."""
        long_enough = list(token_ids) * (1 + 2 * self.max_model_len // len(token_ids))
        prefix = long_enough[: self.prefix_len]
        room = len(long_enough) - self.prefix_len - self.num_places
        starts = [self.prefix_len + index * 7 % room for index in range(BATCH)]
        return [ForcedText(prefix, long_enough[start : start + self.num_places]) for start in starts]


@dataclass(frozen=True, slots=True)
class Difference:
    """Two readings of the same texts."""

    typical: float
    """The largest difference of a log-probability at each position, averaged over positions."""
    largest: float
    """The largest of all."""

    @classmethod
    def between(cls, one: Logprobs, other: Logprobs, first_position: int) -> Difference:
        """Over the whole vocabulary, at all positions of `one`'s texts from `first_position` on."""
        per_place = torch.cat([(one[i][first_position:] - other[i][first_position:]).abs().amax(-1) for i in one])
        return cls(per_place.double().mean().item(), per_place.max().item())

    def widened(self, other: Difference) -> Difference:
        """The larger of both, figure by figure."""
        return Difference(max(self.typical, other.typical), max(self.largest, other.largest))

    def __str__(self) -> str:
        return f"average {self.typical:.2g}, largest {self.largest:.2g}"


ALWAYS_ALLOWED = {
    torch.float32: Difference(2e-5, 5e-5),
    torch.float16: Difference(0.03, 0.06),
    torch.bfloat16: Difference(0.25, 0.5),
}
"""A few roundings of a logit of 20: in a small model the batch may change next to nothing, and is no yardstick then."""


def check_engine(
    runner: ModelRunner,
    facts: WorkerFacts,
    token_ids: Sequence[int],
    load: EngineLoad,
    *,
    page_size: int,
    max_levels: int,
    progress: Progress,
) -> list[Check]:
    """All comparisons; `token_ids` is the text, read in many positions."""
    texts = load.texts(token_ids)
    observed = list(range(0, BATCH, BATCH // load.num_observed))

    def reader(share: CascadeConfig | None, max_num_seqs: int = BATCH, through: ModelRunner = runner) -> ForcedReader:
        return ForcedReader(through, facts, page_size=page_size, max_num_seqs=max_num_seqs, share=share)

    progress("one sequence at a time", 0, NUM_READINGS)
    alone = _read_alone(reader(None, 1), texts, observed)
    progress(f"{BATCH} sequences, nothing shared", 1, NUM_READINGS)
    batch = reader(None).read(texts, observed).logprobs
    noises = {f"batch 1 against {BATCH}": Difference.between(alone, batch, load.num_settling)}
    progress("attention in plain torch, nothing shared", 2, NUM_READINGS)
    if (in_torch := _with_torch_attention(runner, facts)) is not None:
        plain = _read_alone(reader(None, 1, in_torch), texts, observed)
        noises["another attention kernel"] = Difference.between(plain, batch, load.num_settling)
        del plain
    del alone, batch
    progress("prefixes stored once, cascade off", 3, NUM_READINGS)
    off = reader(CascadeConfig(enabled=False)).read(texts, observed)
    progress("cascade on, cold cache", 4, NUM_READINGS)
    sharing = reader(CascadeConfig(shared_prefix_len=page_size, max_levels=max_levels))
    cold = sharing.read(texts, observed)
    progress("cascade on, warm cache", 5, NUM_READINGS)
    num_cached = sharing.counters.cached_tokens
    warm = sharing.read(texts, observed)
    progress("captured graphs" if runner.graphs is not None else "done", NUM_READINGS, NUM_READINGS)

    limit = _limit(noises.values(), facts.dtype)
    checks = [
        *(_yardstick(name, noise, facts.dtype) for name, noise in noises.items()),
        _evidence(sharing, num_cached),
        _compare("cascade on against off", off, cold, load, limit),
        _compare("cold cache against warm", cold, warm, load, limit),
        _compare_greedy("greedy tokens, cascade on against off", off, cold, limit),
        _compare_greedy("greedy tokens, cold cache against warm", cold, warm, limit),
    ]
    if runner.graphs is not None:
        cascade = CascadeConfig(shared_prefix_len=page_size, max_levels=max_levels)
        try:
            found = read_through_graphs(runner, facts, texts, observed, page_size=page_size, cascade=cascade)
        except GenerationError as error:
            return [*checks, Check(name=GRAPHS_RAN, passed=False, found=str(error))]
        checks += _graph_checks(found, limit)
    return checks


def _read_alone(reader: ForcedReader, texts: Sequence[ForcedText], observed: Sequence[int]) -> Logprobs:
    """What the model thinks of the observed texts, read one by one."""
    return {index: reader.read([texts[index]], [0]).logprobs[0] for index in observed}


def _with_torch_attention(runner: ModelRunner, facts: WorkerFacts) -> ModelRunner | None:
    """The same model with attention in plain torch; None where its attention is that."""
    if isinstance(runner.backend, TorchAttentionBackend):
        return None
    return runner.with_attention(TorchAttentionBackend(facts.attention, runner.kv_cache))


def _yardstick(name: str, noise: Difference, dtype: torch.dtype) -> Check:
    return Check(
        name=f"yardstick: {name}, nothing shared",
        passed=True,
        found=str(noise),
        note=f"what rounding does without cascade attention; allowed below is {TYPICAL_ALLOWANCE:g} times the largest "
        f"average and {LARGEST_ALLOWANCE:g} times the largest; {ALWAYS_ALLOWED[dtype]} always is",
        figures={"typical": noise.typical, "largest": noise.largest},
    )


def _limit(noises: Iterable[Difference], dtype: torch.dtype) -> Difference:
    limit = ALWAYS_ALLOWED[dtype]
    for noise in noises:
        limit = limit.widened(Difference(TYPICAL_ALLOWANCE * noise.typical, LARGEST_ALLOWANCE * noise.largest))
    return limit


def _evidence(sharing: ForcedReader, num_cached_cold: int) -> Check:
    """That there was something to compare: levels were used, and the second reading found its prefixes."""
    counters = sharing.counters
    num_warm = counters.cached_tokens - num_cached_cold
    return Check(
        name="cascade attention ran, and the cache was used",
        passed=counters.cascade_steps > 0 and counters.kv_tokens_saved > 0 and num_warm > 0,
        found=f"{counters.cascade_steps} of {counters.steps} steps; K/V tokens: {counters.kv_tokens_read:,} read, "
        f"{counters.kv_tokens_saved:,} saved; {num_warm:,} found in the warm cache",
        allowed="more than 0",
        figures={
            "steps": counters.steps,
            "cascade_steps": counters.cascade_steps,
            "kv_tokens_read": counters.kv_tokens_read,
            "kv_tokens_saved": counters.kv_tokens_saved,
            "cached_tokens_warm": num_warm,
        },
    )


def _compare(name: str, one: Reading, other: Reading, load: EngineLoad, limit: Difference) -> Check:
    found = Difference.between(one.logprobs, other.logprobs, load.num_settling)
    return _difference_check(f"log-probabilities, {name}", found, limit)


def _difference_check(name: str, found: Difference, limit: Difference) -> Check:
    return Check(
        name=name,
        passed=found.typical <= limit.typical and found.largest <= limit.largest,
        found=str(found),
        allowed=str(limit),
        figures={
            "typical": found.typical,
            "largest": found.largest,
            "allowed_typical": limit.typical,
            "allowed_largest": limit.largest,
        },
    )


def _graph_checks(found: GraphReading, limit: Difference) -> list[Check]:
    """Captured graphs, as the whole engine replays them, against eager steps."""
    difference = Difference(sum(found.differences) / len(found.differences), max(found.differences))
    return [
        Check(
            name=GRAPHS_RAN,
            passed=found.graph_steps > 0,
            found=f"{found.graph_steps} steps, and {found.piecewise_steps} in pieces",
            allowed="more than 0",
            figures={"graph_steps": found.graph_steps, "piecewise_steps": found.piecewise_steps},
        ),
        _difference_check("log-probabilities, graphs against eager steps", difference, limit),
        _margin_check("greedy tokens, graphs against eager steps", found.margins, found.num_tokens, limit),
    ]


def _compare_greedy(name: str, one: Reading, other: Reading, limit: Difference) -> Check:
    differ = one.greedy != other.greedy
    return _margin_check(name, sorted(one.margins[differ].tolist(), reverse=True), differ.numel(), limit)


def _margin_check(name: str, margins: Sequence[float], total: int, limit: Difference) -> Check:
    """Where the most probable token differs, the two best must have been close in the first reading; largest first.

    Two logs of probability that both move by the yardstick's largest difference change places within twice of it.
    """
    listed = ", ".join(f"{margin:.2g}" for margin in margins[:MAX_LISTED]) + (
        " ..." if len(margins) > MAX_LISTED else ""
    )
    return Check(
        name=name,
        passed=not margins or margins[0] <= limit.largest,
        found=f"{len(margins)} of {total} differ ({len(margins) / total:.2%})"
        + (f", largest top-2 margin {margins[0]:.2g}" if margins else ""),
        allowed=f"margin {limit.largest:.2g}",
        note=f"margins: {listed}" if margins else "",
        figures={"differing": len(margins), "tokens": total, "margins": margins, "allowed_margin": limit.largest},
    )

"""Replayed graphs against eager steps: the whole engine generates, and the runner's `logits` reads the same texts.

Greedy continuations come with log-probabilities from captured graphs, one step planned ahead of the last result. The
eager runner then reads prompts and continuations by teacher forcing. Both attend shared prefixes, so what differs is
capture, padding, and what a replay finds in fixed buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cascade_llm.config import CascadeConfig
from cascade_llm.engine.assembly import build_scheduler
from cascade_llm.engine.engine import Engine
from cascade_llm.outputs import CompletionOutput
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.cascade.choice import TokensRead
from cascade_llm.scheduler.sequence import Request
from cascade_llm.validation.teacher_forcing import ForcedReader, ForcedText, Reading
from cascade_llm.worker.executor import LocalExecutor
from cascade_llm.worker.model_runner import ModelRunner
from cascade_llm.worker.worker import WorkerFacts

__all__ = ["GraphReading", "read_through_graphs"]

REPORTED = 5
"""Log-probabilities of the best tokens at each position, beside the chosen one's."""
OWN_TOKENS = 4
"""Of a prompt, beyond what all share."""


class GraphReading:
    """What graphs said at each position of their own continuations, and what the eager runner says there."""

    def __init__(
        self, outputs: Sequence[CompletionOutput], eager: Reading, *, graph_steps: int, piecewise_steps: int
    ) -> None:
        self.graph_steps = graph_steps
        """Steps that one graph ran."""
        self.piecewise_steps = piecewise_steps
        """Steps of which graphs ran all but attention."""
        self.differences = [
            max(abs(logprob - eager.logprobs[index][position, token_id].item()) for token_id, logprob in found.top)
            for index in eager.logprobs
            for position, found in enumerate(outputs[index].logprobs or ())
        ]
        """At each observed position, the largest difference of a reported log-probability."""
        tokens = torch.tensor([output.token_ids for output in outputs])
        self.margins = sorted(eager.margins[tokens != eager.greedy].tolist(), reverse=True)
        """Where graphs chose another token than the eager runner would, its margin there."""
        self.num_tokens = tokens.numel()


def read_through_graphs(
    runner: ModelRunner,
    facts: WorkerFacts,
    texts: Sequence[ForcedText],
    observed: Sequence[int],
    *,
    page_size: int,
    cascade: CascadeConfig,
) -> GraphReading:
    """Generate after the texts' prompts as many tokens as their continuations have, and read the outcome eagerly.

    Args:
        runner: with captured graphs, its pool free
        texts: a prompt is given the first tokens of its continuation, so that no two generate the same
        observed: texts whose log-probabilities are compared; of the others the tokens are
    """
    assert runner.graphs is not None
    num_places = len(texts[0].continuation)
    num_own = min(OWN_TOKENS, num_places // 2)
    prompts = [[*text.prompt_token_ids, *text.continuation[:num_own]] for text in texts]
    counters = runner.graphs.counters
    before = counters.as_dict()
    outputs = _generated(runner, facts, prompts, num_places - num_own, page_size=page_size, cascade=cascade)
    after = counters.as_dict()
    generated = [ForcedText(prompt, out.token_ids) for prompt, out in zip(prompts, outputs, strict=True)]
    reader = ForcedReader(runner, facts, page_size=page_size, max_num_seqs=len(texts), share=cascade)
    steps = {name: after[name] - before[name] for name in ("graph_steps", "piecewise_steps")}
    return GraphReading(outputs, reader.read(generated, observed), **steps)


def _generated(
    runner: ModelRunner,
    facts: WorkerFacts,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    page_size: int,
    cascade: CascadeConfig,
) -> list[CompletionOutput]:
    scheduler = build_scheduler(
        facts,
        TokensRead(),
        page_size=page_size,
        max_num_seqs=len(prompts),
        max_num_batched_tokens=max(1024, len(prompts)),
        cascade=cascade,
    )
    engine = Engine(scheduler, LocalExecutor(runner, facts), None, lag=1)
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=REPORTED)
    states = [
        engine.add(Request(request_id=f"text-{index}", prompt_token_ids=prompt, params=params, seed=index))
        for index, prompt in enumerate(prompts)
    ]
    while engine.has_unfinished:
        engine.step()
    for state in states:
        if state.output.error is not None:
            raise state.output.error
    return [state.output.outputs[0] for state in states]

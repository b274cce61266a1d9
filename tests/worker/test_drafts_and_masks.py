"""Proposed tokens and token masks through the whole engine: they change speed and choice, never the law of the text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cascade_llm import LLM, SamplingParams
from cascade_llm.plan import IntColumn, StepPlan, int_column
from cascade_llm.plan_file import PlanFileReader
from cascade_llm.scheduler.scheduler import Drafter, FlashInferScheduler
from cascade_llm.scheduler.sequence import Request
from cascade_llm.scheduler.sequence import Sequence as TokenStream
from cascade_llm.validation.replay_file import replay
from tests.engine.tiny_llm import assert_equal_outputs, save_tiny, tiny_llm

SHARED = [3 + (i * 7) % 80 for i in range(24)]
PROMPTS = [[*SHARED, 11], [*SHARED, 12, 13], [7, 8, 9], [*SHARED[:9], 2], [*SHARED, 14]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=0.9, seed=3, n=2, max_tokens=20, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=1.0, seed=5, top_p=0.8, max_tokens=25, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=0, max_tokens=18, ignore_eos=True, logprobs=2, repetition_penalty=1.3),
    SamplingParams(temperature=0, max_tokens=12, min_tokens=5, stop_token_ids=[75], logprobs=2),
]
VOCAB = 96
WORDS = VOCAB // 32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), vocab_size=VOCAB)


def with_drafter(llm: LLM, drafter: Drafter) -> LLM:
    scheduler = llm.engine.scheduler
    llm.engine.scheduler = FlashInferScheduler(scheduler.config, scheduler._costs, drafter)
    return llm


def knowing(texts: Sequence[Sequence[int]]) -> Drafter:
    """Proposes what was generated before, every fifth token wrong."""

    def drafter(sequence: TokenStream, most: int) -> Iterable[int]:
        so_far = sequence.token_ids.tolist()
        for text in texts:
            if list(text[: len(so_far)]) == so_far:
                for position in range(len(so_far), min(len(text), len(so_far) + 4)):
                    yield text[position] if position % 5 else (text[position] + 1) % VOCAB
                return

    return drafter


@pytest.mark.parametrize("lag", [0, 1])
def test_drafts_change_no_text(tiny: Path, lag: int) -> None:
    with tiny_llm(tiny) as llm:
        expected = llm.generate(PROMPTS, PARAMS)
    texts = [
        [*prompt, *sample.token_ids]
        for prompt, output in zip(PROMPTS, expected, strict=True)
        for sample in output.outputs
    ]
    with with_drafter(tiny_llm(tiny, schedule_lag=lag), knowing(texts)) as llm:
        found = llm.generate(PROMPTS, PARAMS)
        counters = llm.engine.scheduler.counters
        assert_equal_outputs(found, expected)
        assert counters.accepted_tokens > 40
        assert counters.drafted_tokens > counters.accepted_tokens
        llm.engine.scheduler.check()


def even_then_odd(output: Sequence[int]) -> IntColumn:
    """Even tokens at even positions, odd ones at odd positions; none below 10."""
    parity = len(output) % 2
    bits = sum(1 << token for token in range(10, VOCAB) if token % 2 == parity)
    words = ((bits >> (32 * i)) & 0xFFFFFFFF for i in range(WORDS))
    return int_column(word - (1 << 32) if word >= 1 << 31 else word for word in words)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_mask_is_obeyed_by_its_own_samples_alone(tiny: Path, lag: int) -> None:
    plans: list[StepPlan] = []
    with tiny_llm(tiny, schedule_lag=lag) as llm:
        (plain,) = llm.generate(PROMPTS[2], SamplingParams(temperature=0, max_tokens=15, ignore_eos=True))
        llm.engine.on_step.append(lambda event: plans.append(event.plan))
        states = [
            llm.engine.add(request_of(index, PROMPTS[index], params, mask))
            for index, (params, mask) in enumerate(
                [
                    (SamplingParams(temperature=0, max_tokens=15, ignore_eos=True), even_then_odd),
                    (SamplingParams(temperature=1.0, n=2, max_tokens=15, ignore_eos=True), even_then_odd),
                    (SamplingParams(temperature=0, max_tokens=15, ignore_eos=True), None),
                ]
            )
        ]
        while llm.engine.has_unfinished:
            llm.engine.step()
    for state in states[:2]:
        for sample in state.output.outputs:
            assert len(sample.token_ids) == 15
            assert all(token >= 10 and token % 2 == i % 2 for i, token in enumerate(sample.token_ids))
    assert states[2].output["token_ids"] == plain["token_ids"]
    assert any(plan.token_bitmasks for plan in plans)


def request_of(index: int, prompt: Sequence[int], params: SamplingParams, mask: Any) -> Request:
    return Request(request_id=f"masked-{index}", prompt_token_ids=prompt, params=params, seed=index, mask=mask)


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("a") + token_id % 26) for token_id in token_ids)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_stop_string_inside_accepted_tokens_ends_the_text_there(tiny: Path, lag: int) -> None:
    """What was accepted behind it is neither shown nor counted."""
    greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    with tiny_llm(tiny) as llm:
        tokens = llm.generate(PROMPTS[0], greedy)[0].outputs[0].token_ids
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop=Letters().decode(tokens[6:8]))
    found = []
    for drafter in (None, lambda sequence, most: tokens[len(sequence.token_ids) - sequence.prompt_len :]):
        llm = tiny_llm(tiny, schedule_lag=lag)
        with llm if drafter is None else with_drafter(llm, drafter):
            llm.engine._tokenizer = Letters()  # type: ignore[assignment]
            state = llm.engine.add(request_of(0, PROMPTS[0], params, None))
            while llm.engine.has_unfinished:
                llm.engine.step()
            counters = llm.engine.scheduler.counters
            assert (drafter is None) == (counters.accepted_tokens == 0)
            found.append((replace(state.output, metrics=None), counters.generated_tokens))
    assert found[0] == found[1]
    output, num_generated = found[0]
    assert output.outputs[0].finish_reason == "stop"
    assert len(output.outputs[0].token_ids) == num_generated < 30


def test_a_recording_of_drafts_is_replayed(tiny: Path, tmp_path: Path) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    options = {"attention_backend": "torch", "max_model_len": 64}
    with tiny_llm(tiny, **options) as llm:
        texts = [[*p, *out.outputs[0].token_ids] for p, out in zip(PROMPTS, llm.generate(PROMPTS, greedy), strict=True)]
    path = tmp_path / "drafts.plans"
    with with_drafter(tiny_llm(tiny, record_plans=path, record_token_ids=True, **options), knowing(texts)) as llm:
        llm.generate(PROMPTS, greedy)
        assert llm.engine.scheduler.counters.accepted_tokens > 40
    with PlanFileReader(path) as reader:
        assert any(step.rejected_samples for step in reader)
    report = replay(path, tiny, {"attention_backend": "torch"})
    assert report.passed, report

"""Whole engines whose requests ask for everything that sampling can do: in graphs, and what is left out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_llm import LLM, SamplingParams
from cascade_llm.sampling.lanes import Needs
from cascade_llm.worker.graph_sampling import CHOICES, NO_MEMORY
from tests.engine.tiny_llm import assert_equal_outputs, random_forest, save_tiny, tiny_llm
from tests.gpu_path.gpu_engine import SHAPE, double_gpu, gpu_llm, graphs_of
from tests.gpu_path.test_engine_on_double import tokens

KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.7, "presence_penalty": 0.5},
    {"temperature": 0.9, "frequency_penalty": 1.5},
    {"temperature": 0.9, "top_p": 0.9, "presence_penalty": 2.0, "frequency_penalty": -0.5},
    {"temperature": 0.8, "top_k": 12, "logit_bias": {5: 4.0, 9: -100.0}},
    {"temperature": 0, "min_tokens": 6, "stop_token_ids": list(range(3, 60))},
    {"temperature": 1.0, "min_tokens": 3, "stop_token_ids": list(range(20, 50)), "repetition_penalty": 0.8},
    {"temperature": 1.0, "min_p": 0.05, "n": 2, "repetition_penalty": 1.2},
]
VOCAB = 90


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", **SHAPE)


def sampling(num_requests: int, **changes: Any) -> list[SamplingParams]:
    """Of many kinds, ending at different steps."""
    return [
        SamplingParams(**{"seed": i, "max_tokens": 6 + 5 * (i % 5), **KINDS[i % len(KINDS)], **changes})
        for i in range(num_requests)
    ]


@pytest.mark.parametrize("lag", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"max_num_seqs": 4},
        {"max_num_batched_tokens": 24, "max_num_seqs": 8},
    ],
    ids=["together", "few-lanes", "chunked"],
)
def test_equals_the_torch_backend(tiny: Path, lag: int, options: dict[str, Any]) -> None:
    """Lanes are used again and again, also while a late row of the sequence before is under way."""
    prompts, params = random_forest(2, 20, VOCAB, 70), sampling(20)
    with tiny_llm(tiny, **options) as twin:
        expected = tokens(twin.generate(prompts, params))
    with gpu_llm(tiny, double_gpu(), schedule_lag=lag, **options) as llm:
        assert tokens(llm.generate(prompts, params)) == expected
        assert tokens(llm.generate(prompts, params)) == expected
        counters = graphs_of(llm).counters
        assert counters.graph_steps > 10
        assert counters.eagerly_sampled_steps.total() == 0
        assert 0 < counters.late_captures <= 10
        assert llm.stats()["late_captures"] == counters.late_captures


def test_preempted_sequences_resume_with_their_penalties(tiny: Path) -> None:
    prompts = random_forest(7, 12, VOCAB, 60)
    params = sampling(12, n=1, max_tokens=12, min_tokens=2, stop_token_ids=[], ignore_eos=True)
    pool = {"kv_cache_bytes": (256 // 4 + 6) * 4 * 2 * 2 * 2 * 64 * 4}
    with tiny_llm(tiny, **pool) as twin:
        expected = tokens(twin.generate(prompts, params))
    with gpu_llm(tiny, double_gpu(), **pool) as llm:
        assert tokens(llm.generate(prompts, params)) == expected
        assert llm.stats()["preemptions"] > 0
        assert graphs_of(llm).counters.eagerly_sampled_steps.total() == 0


def test_log_probabilities(tiny: Path) -> None:
    prompts = random_forest(3, 12, VOCAB, 40)
    params = [SamplingParams(**{**KINDS[i % 7], "seed": i, "max_tokens": 8, "logprobs": 2}) for i in range(12)]
    params[5] = SamplingParams(temperature=0, max_tokens=8, logprobs=20)
    params[6] = SamplingParams(temperature=0, max_tokens=8, logprobs=0)
    with tiny_llm(tiny) as twin:
        expected = twin.generate(prompts, params)
    with gpu_llm(tiny, double_gpu()) as llm:
        found = llm.generate(prompts, params)
        assert graphs_of(llm).counters.eagerly_sampled_steps.total() == 0
    assert tokens(found) == tokens(expected)
    assert_equal_outputs(found[:5] + found[7:], expected[:5] + expected[7:])
    for mine, other in zip(found, expected, strict=True):
        ours, theirs = mine.outputs[0].logprobs, other.outputs[0].logprobs
        assert ours is not None
        assert theirs is not None
        assert [x.rank for x in ours] == [x.rank for x in theirs]
        assert [[token for token, _ in x.top] for x in ours] == [[token for token, _ in x.top] for x in theirs]
    assert [len(found[i].outputs[0].logprobs[0].top) for i in (5, 6)] == [20, 0]  # type: ignore[index]


def late_graphs(llm: LLM) -> set[Needs]:
    return {needs for _, needs in graphs_of(llm)._sampling._graphs if needs not in CHOICES[:3]}


def test_graphs_are_captured_when_a_step_first_needs_them(tiny: Path) -> None:
    """Once each: asking again captures nothing."""
    prompt, greedy = [5, 6, 7], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with gpu_llm(tiny, double_gpu()) as llm:
        llm.generate([prompt], greedy)
        assert late_graphs(llm) == set()
        assert graphs_of(llm).counters.late_captures == 0
        penalized = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, presence_penalty=1.0)
        llm.generate([prompt], penalized)
        assert late_graphs(llm) == {CHOICES[3]}
        captured = graphs_of(llm).counters.late_captures
        assert captured == 1
        llm.generate([prompt], penalized)
        assert graphs_of(llm).counters.late_captures == captured
        llm.generate([prompt], SamplingParams(max_tokens=4, ignore_eos=True, logprobs=0))
        assert late_graphs(llm) == {CHOICES[3], Needs.REPORT}
        assert graphs_of(llm).counters.late_captures == captured + 1


def test_a_graph_is_captured_while_others_run(tiny: Path) -> None:
    """Sequences under way, a step behind, keep their tokens when a request arrives that needs another graph."""
    prompts = random_forest(4, 6, VOCAB, 30)
    greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    with tiny_llm(tiny) as twin:
        expected = tokens(twin.generate(prompts, greedy))[0][0]
    with gpu_llm(tiny, double_gpu()) as llm:
        stream = llm.stream(prompts[0], greedy)
        found = list(next(stream).token_ids)
        for kind, prompt in zip(KINDS[1:], prompts[1:], strict=False):
            llm.generate([prompt], SamplingParams(**{**kind, "max_tokens": 6}))
        assert graphs_of(llm).counters.late_captures >= 2
        for delta in stream:
            found += delta.token_ids
    assert found == expected


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"logit_bias": {0: 2.0}}, "a logit_bias of more than 0 tokens"),
        ({"min_tokens": 4, "stop_token_ids": list(range(3, 70))}, "min_tokens with more than 64 ending tokens"),
        ({"logprobs": 21, "presence_penalty": 0.5}, "more than 20 log-probabilities"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_graphs_do_not_hold_is_sampled_behind_them(
    tiny: Path, params: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager and captured steps take turns, and penalties know the tokens of both."""
    if "logit_bias" in params:
        monkeypatch.setattr("cascade_llm.sampling.lanes.BIAS_CAPACITY", 0)
    prompts = random_forest(5, 6, VOCAB, 30)
    beside = SamplingParams(temperature=0.7, max_tokens=16, ignore_eos=True, frequency_penalty=1.0, seed=3)
    short = SamplingParams(temperature=0, max_tokens=6, **params)
    sampled = [short, beside, beside, short, beside, beside]
    with tiny_llm(tiny) as twin:
        expected = tokens(twin.generate(prompts, sampled))
    with gpu_llm(tiny, double_gpu()) as llm:
        assert tokens(llm.generate(prompts, sampled)) == expected
        counters = graphs_of(llm).counters
        assert set(counters.eagerly_sampled_steps) == {reason}
        assert 0 < counters.eagerly_sampled_steps[reason] < counters.graph_steps
        assert llm.stats()["eagerly_sampled_steps"] == counters.eagerly_sampled_steps[reason]


def test_a_graph_without_memory_is_left_out(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried once; its steps are sampled eagerly, counted."""
    prompts = random_forest(6, 3, VOCAB, 30)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, repetition_penalty=1.5)
    with tiny_llm(tiny) as twin:
        expected = tokens(twin.generate(prompts, params))
    double = double_gpu()
    with gpu_llm(tiny, double) as llm:

        def without_memory(work: Any) -> Any:
            raise torch.OutOfMemoryError("no memory")

        monkeypatch.setattr(double.stream, "capture", without_memory)
        assert tokens(llm.generate(prompts, params)) == expected
        assert tokens(llm.generate(prompts, params)) == expected
        counters = graphs_of(llm).counters
        assert set(counters.eagerly_sampled_steps) == {NO_MEMORY}
        assert counters.late_captures == 0
    warnings = [record.message for record in caplog.records if "no memory to capture sampling" in record.message]
    assert 0 < len(warnings) == len(set(warnings))


def test_prompt_log_probabilities_are_eager_and_counted(tiny: Path) -> None:
    with gpu_llm(tiny, double_gpu()) as llm:
        llm.generate([[5, 6, 7, 8]], SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=1))
        assert dict(graphs_of(llm).counters.eagerly_sampled_steps) == {"prompt log-probabilities": 1}

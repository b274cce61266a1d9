"""Steps that are replayed from a recording, beside the same steps run by Python: bit for bit, in every architecture."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_llm import LLM, RequestOutput, SamplingParams
from cascade_llm.engine.engine import Engine
from cascade_llm.models.decoder import Decoder
from cascade_llm.worker.executor import LocalExecutor
from cascade_llm.worker.recorded_steps import MOST_RECORDINGS, RecordedSteps
from tests.engine.tiny_llm import CONTEXT, random_forest, save_tiny, tiny_llm
from tests.models.families import CASES, FAMILIES
from tests.native_code import needs_compiler

pytestmark = needs_compiler

VOCAB = 90
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2)
DRAWN = SamplingParams(temperature=0.8, n=2, seed=5, max_tokens=16, ignore_eos=True, logprobs=2)


def recorded_of(llm: LLM) -> RecordedSteps | None:
    engine = llm.engine
    assert isinstance(engine, Engine)
    assert isinstance(engine.executor, LocalExecutor)
    return engine.executor.runner.recorded


def plain(outputs: list[RequestOutput]) -> list[Any]:
    return [[(sample.token_ids, sample.logprobs) for sample in output.outputs] for output in outputs]


@pytest.mark.parametrize(
    "case", [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_replayed_steps_give_the_same_bits(case: str, tmp_path: Path) -> None:
    architecture, changes = CASES[case]
    folder = save_tiny(tmp_path, architecture, **{"max_position_embeddings": CONTEXT, **changes})
    prompts = random_forest(1, 6, VOCAB, 40)
    params = [GREEDY if i % 2 else DRAWN for i in range(len(prompts))]
    found = []
    for is_eager in (True, False):
        with tiny_llm(folder, debug=False, enforce_eager=is_eager) as llm:
            found.append(plain(llm.generate(prompts, params)))
            recorded = recorded_of(llm)
            assert (recorded is None) == is_eager
            if recorded is not None:
                assert recorded.refused is None
                assert recorded.num_replayed > 12
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"kv_cache_dtype": "int8"},
        {"quantization": "q8_0"},
        {"max_num_batched_tokens": 16, "max_num_seqs": 8},
        {"enable_cascade_attention": False, "num_threads": 2},
        {"max_model_len": 64, "pool_tokens": 120},
    ],
    ids=str,
)
def test_options_change_nothing_of_it(options: dict[str, Any], tmp_path: Path) -> None:
    """Among them a pool that some sequences must leave, and chunks of prompts between the decode steps."""
    folder = save_tiny(tmp_path, hidden_size=192, intermediate_size=128)
    prompts, found, given = random_forest(2, 8, VOCAB, 40), [], dict(options)
    if (pool_tokens := given.pop("pool_tokens", None)) is not None:
        with tiny_llm(folder, max_model_len=64) as llm:
            given["kv_cache_bytes"] = pool_tokens * llm.facts.kv_bytes_per_token
    for is_eager in (True, False):
        with tiny_llm(folder, debug=False, enforce_eager=is_eager, **given) as llm:
            found.append(plain(llm.generate(prompts, GREEDY)))
            assert (llm.stats()["preemptions"] > 0) == (pool_tokens is not None)
            if (recorded := recorded_of(llm)) is not None:
                assert recorded.num_replayed > 8
    assert found[0] == found[1]


def test_no_more_recordings_are_kept_than_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade_llm.worker.recorded_steps.MOST_RECORDINGS", 2)
    assert MOST_RECORDINGS > 2
    params = [SamplingParams(temperature=0, max_tokens=6 * n, ignore_eos=True) for n in range(1, 6)]
    with tiny_llm(save_tiny(tmp_path), debug=False) as llm:
        first = plain(llm.generate(random_forest(3, 5, VOCAB, 20), params))
        recorded = recorded_of(llm)
        assert recorded is not None
        assert recorded.num_recordings == 2
        assert plain(llm.generate(random_forest(3, 5, VOCAB, 20), params)) == first


def test_a_model_that_reads_its_tensors_runs_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    embed = Decoder.embed

    def reading(self: Decoder, token_ids: torch.Tensor) -> torch.Tensor:
        assert max(token_ids.tolist()) < VOCAB * 10
        return embed(self, token_ids)

    folder, prompts = save_tiny(tmp_path), random_forest(1, 4, VOCAB, 20)
    with tiny_llm(folder, debug=False) as llm:
        expected = plain(llm.generate(prompts, GREEDY))
    monkeypatch.setattr(Decoder, "embed", reading)
    with caplog.at_level(logging.INFO, logger="cascade_llm"), tiny_llm(folder, debug=False) as llm:
        assert plain(llm.generate(prompts, GREEDY)) == expected
        recorded = recorded_of(llm)
        assert recorded is not None
        assert recorded.refused is not None
        assert recorded.num_recordings == 0
    assert "steps are not recorded: Python reads a tensor" in caplog.text

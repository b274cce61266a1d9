"""The engine against itself: the healthy one passes, one whose shared levels are wrong does not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from cascade_llm.attention.torch_backend import TorchAttentionBackend
from cascade_llm.config import CascadeConfig, EngineOptions
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.validation.engine_check import BATCH, EngineLoad, check_engine
from cascade_llm.validation.report import Check
from cascade_llm.validation.teacher_forcing import ForcedReader, ForcedText
from cascade_llm.worker.model_runner import ModelRunner
from cascade_llm.worker.worker import WorkerFacts, build_worker
from tests.engine.tiny_llm import save_tiny
from tests.models.checkpoints import Replay, decoder_of, tiny_model
from tests.validation.faults import ForgetsALevel, ReadsTooMuch, install

LOAD = EngineLoad(prefix_len=24, num_places=6, num_settling=2, num_observed=4)
PAGE_SIZE = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def build(folder: Path, dtype: str = "float32", backend: str = "torch") -> tuple[ModelRunner, WorkerFacts]:
    options = EngineOptions(
        dtype=dtype, page_size=PAGE_SIZE, max_num_seqs=BATCH + 1, max_model_len=40, attention_backend=backend
    )
    return build_worker(options, open_checkpoint(folder))


def token_ids() -> list[int]:
    draw = random.Random(0)
    return [draw.randrange(3, 97) for _ in range(300)]


def run(folder: Path, dtype: str = "float32", backend: str = "torch") -> dict[str, Check]:
    runner, facts = build(folder, dtype, backend)
    checks = check_engine(
        runner,
        facts,
        token_ids(),
        LOAD,
        page_size=PAGE_SIZE,
        max_levels=3,
        progress=lambda what, done, total: None,
    )
    return {check.name: check for check in checks}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_passes(folder: Path, dtype: str) -> None:
    checks = run(folder, dtype)
    assert all(check.passed for check in checks.values()), checks
    evidence = checks["cascade attention ran, and the cache was used"].figures
    assert evidence["cascade_steps"] > 0
    assert evidence["kv_tokens_saved"] > BATCH * LOAD.num_places
    assert evidence["cached_tokens_warm"] >= (LOAD.prefix_len - PAGE_SIZE) * BATCH
    assert checks["greedy tokens, cascade on against off"].figures["tokens"] == BATCH * LOAD.num_places


def test_another_kernel_tells_what_rounding_does(folder: Path) -> None:
    checks = run(folder, backend="native")
    assert all(check.passed for check in checks.values()), checks
    noise = checks["yardstick: another attention kernel, nothing shared"].figures
    assert 0 < noise["typical"] <= noise["largest"] < 1e-3


@pytest.mark.parametrize("fault", [ForgetsALevel, ReadsTooMuch])
def test_wrong_shared_levels_fail(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fault: type[TorchAttentionBackend]
) -> None:
    install(monkeypatch, fault)
    checks = run(folder)
    found = checks["log-probabilities, cascade on against off"]
    assert found.passed is False
    assert found.figures["largest"] > found.figures["allowed_largest"]
    assert checks["greedy tokens, cascade on against off"].figures["differing"] > 0


def test_a_forced_reading_is_the_models_own(folder: Path) -> None:
    """Log-probabilities of each place, against the same decoder over dense keys and values."""
    runner, facts = build(folder)
    reader = ForcedReader(
        runner, facts, page_size=PAGE_SIZE, max_num_seqs=8, share=CascadeConfig(shared_prefix_len=PAGE_SIZE)
    )
    ids = token_ids()
    texts = [ForcedText(ids[:13], ids[20 + 5 * i : 25 + 5 * i]) for i in range(3)]
    reading = reader.read(texts, observed=[0, 1, 2])
    replay = Replay(decoder_of(tiny_model("llama", max_position_embeddings=256)))
    for index, text in enumerate(texts):
        tokens = [*text.prompt_token_ids, *text.continuation[:-1]]
        logits = replay.step([(index, position, token) for position, token in enumerate(tokens)])
        expected = logits[len(text.prompt_token_ids) - 1 :].log_softmax(-1)
        torch.testing.assert_close(reading.logprobs[index], expected, atol=1e-4, rtol=0)
        best = expected.topk(2).values
        assert reading.greedy[index].tolist() == expected.argmax(-1).tolist()
        torch.testing.assert_close(reading.margins[index], best[:, 0] - best[:, 1], atol=2e-4, rtol=0)
    assert reader.counters.cascade_steps > 0


def test_texts_share_the_prefix_and_nothing_else() -> None:
    texts = LOAD.texts(token_ids())
    assert len(texts) == BATCH
    assert {tuple(text.prompt_token_ids) for text in texts} == {tuple(token_ids()[: LOAD.prefix_len])}
    assert len({tuple(text.continuation) for text in texts}) > BATCH // 2
    assert {len(text.continuation) for text in texts} == {LOAD.num_places}


def test_a_text_shorter_than_what_is_read_is_repeated() -> None:
    texts = LOAD.texts([5, 6, 7])
    assert all(len(text.prompt_token_ids) == LOAD.prefix_len for text in texts)
    assert all(len(text.continuation) == LOAD.num_places for text in texts)

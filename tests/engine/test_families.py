"""Every architecture in the real engine: against transformers, and against itself without cascade."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedModel

from cascade_llm import LLM, RequestOutput, SamplingParams
from tests.engine.tiny_llm import CONTEXT, assert_equal_outputs, random_forest, save_tiny, tiny_llm
from tests.models.checkpoints import TINY, tiny_model
from tests.models.families import CASES, FAMILIES

VOCAB = TINY["vocab_size"]
TOLERANCE = 1e-3
"""Of a log-probability in float32, between two implementations."""
SHARES_NOTHING = {"mistral, a short window", "gemma2, windows alone"}
"""Windows of 15 in every layer: of the prompts of 40 tokens no two share a page that lies inside both windows."""
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, logprobs=2)


class Saved(NamedTuple):
    """A tiny checkpoint, and the model it was saved from."""

    folder: Path
    model: PreTrainedModel


def saved(folder: Path, case: str) -> Saved:
    architecture, changes = CASES[case]
    fields = {"max_position_embeddings": CONTEXT, **changes}
    return Saved(save_tiny(folder, architecture, **fields), tiny_model(architecture, **fields))


@pytest.fixture
def close_after() -> Iterator[list[LLM]]:
    llms: list[LLM] = []
    yield llms
    for llm in llms:
        llm.close()


def assert_as_transformers(model: PreTrainedModel, prompts: Sequence[list[int]], outputs: Sequence[Any]) -> None:
    """Every log-probability is transformers' own, and every token its best, or within twice the tolerance of it."""
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = prompt + output["token_ids"]
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place, reported in enumerate(output["logprobs"], start=len(prompt) - 1):
            theirs = logprobs[place]
            assert abs(float(theirs[reported.token_id]) - reported.logprob) < TOLERANCE
            best, second = theirs.topk(2).values.tolist()
            assert reported.token_id == int(theirs.argmax()) or best - second < 2 * TOLERANCE


@pytest.mark.parametrize(
    "case", [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_64_greedy_tokens_equal_transformers(case: str, tmp_path: Path) -> None:
    folder, model = saved(tmp_path, case)
    prompts = random_forest(1, 6, VOCAB, 40)
    with tiny_llm(folder) as llm:
        outputs = llm.generate(prompts, GREEDY)
        assert (llm.stats()["cascade_steps"] > 0) == (case not in SHARES_NOTHING)
    assert_as_transformers(model, prompts, outputs)


OPTIONS: dict[str, dict[str, Any]] = {
    "chunked": {"max_num_batched_tokens": 16, "max_num_seqs": 8},
    "preempted": {"kv_pages": CONTEXT // 4 + 6, "max_model_len": CONTEXT},
    "four levels": {"cascade_max_levels": 4, "page_size": 1},
}


def bytes_of(pages: int, case: str, page_size: int) -> int:
    config = tiny_model(CASES[case][0], **CASES[case][1]).config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return pages * page_size * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 4


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_cascade_on_and_off_give_the_same(case: str, options: str, tmp_path: Path, close_after: list[LLM]) -> None:
    """Chunked, preempted and with several samples of each prompt, greedy ones against transformers too."""
    folder, model = saved(tmp_path, case)
    given = dict(OPTIONS[options])
    if "kv_pages" in given:
        given["kv_cache_bytes"] = bytes_of(given.pop("kv_pages"), case, given.get("page_size", 4))
    prompts = random_forest(2, 12, VOCAB, 60)
    drawn = SamplingParams(temperature=0.8, n=3, seed=5, max_tokens=24, ignore_eos=True, logprobs=2)
    params = [GREEDY if i % 2 else drawn for i in range(len(prompts))]
    outputs: list[list[RequestOutput]] = []
    for is_on in (True, False):
        llm = tiny_llm(folder, **given, enable_cascade_attention=is_on)
        close_after.append(llm)
        outputs.append(llm.generate(prompts, params))
        assert (llm.stats()["cascade_steps"] > 0) == is_on
        if options == "preempted":
            assert llm.stats()["preemptions"] > 0
    assert_equal_outputs(*outputs)
    assert_as_transformers(model, prompts[1::2], outputs[0][1::2])

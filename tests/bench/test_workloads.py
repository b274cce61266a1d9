"""Workloads: the same requests for the same seed, of the sizes asked for, or an error that says what to do."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cascade_llm.bench.load import Load, LoadRequest
from cascade_llm.bench.workloads import (
    WORKLOADS,
    ChatWorkload,
    DocumentsWorkload,
    FileWorkload,
    ForestWorkload,
    RandomWorkload,
    RolloutWorkload,
    SharedPrefixWorkload,
    Vocabulary,
    Workload,
)
from cascade_llm.errors import ConfigError, PromptError

VOCABULARY = Vocabulary(1000)


class Letters:
    """A tokenizer: one id per character."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return self.encode("".join(f"<{message['role']}>{message['content']}" for message in messages))


SMALL: list[Workload] = [
    RandomWorkload(num_requests=5, min_len=2, max_len=9),
    SharedPrefixWorkload(prefix_len=20, num_requests=4, suffix_len=3, output_len=5),
    ForestWorkload(groups=3, prompts_per_group=2, prefix_len=8, suffix_len=2, output_len=4),
    RolloutWorkload(prompts=2, samples=3, prompt_len=6, output_len=4),
    DocumentsWorkload(documents=2, questions=2, system_len=3, document_len=9, question_len=2, output_len=4),
    ChatWorkload(conversations=2, turns=3, system_len=4, user_len=2, output_len=3),
]


@pytest.mark.parametrize("workload", SMALL, ids=lambda workload: workload.name)
def test_the_same_workload_gives_the_same_requests(workload: Workload) -> None:
    first, second = workload.load(VOCABULARY), workload.load(VOCABULARY)
    assert first == second
    assert all(0 <= token < VOCABULARY.size for request in first.requests for token in request.token_ids)
    changed = type(workload)(**{**vars(workload), "seed": 1})
    assert changed.load(VOCABULARY) != first


def test_random_has_the_very_tokens_of_nano_vllm() -> None:
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    output_lens = [rng.randint(100, 1024) for _ in range(256)]
    load = RandomWorkload().load(Vocabulary(50_000))
    assert [list(request.token_ids) for request in load.requests] == prompts
    assert [request.output_len for request in load.requests] == output_lens


def test_shared_prefix_shares_its_prefix_and_nothing_else() -> None:
    load = SMALL[1].load(VOCABULARY)
    assert {tuple(request.token_ids[:20]) for request in load.requests} == {tuple(load.requests[0].token_ids[:20])}
    assert len({tuple(request.token_ids) for request in load.requests}) == 4
    assert (load.num_prompt_tokens, load.num_generated, load.longest) == (4 * 23, 4 * 5, 28)


def test_forest_mixes_its_groups() -> None:
    load = ForestWorkload(groups=4, prompts_per_group=8, prefix_len=8, suffix_len=2, output_len=4).load(VOCABULARY)
    order = [tuple(request.token_ids[:8]) for request in load.requests]
    assert sorted(order.count(prefix) for prefix in set(order)) == [8] * 4
    assert order[:8] != [order[0]] * 8


def test_rollout_asks_for_samples_and_draws_them() -> None:
    load = SMALL[3].load(VOCABULARY)
    assert [request.n for request in load.requests] == [3, 3]
    assert load.num_sequences == 6
    assert load.temperature == 1.0
    assert SMALL[3].load(VOCABULARY, temperature=0.0).temperature == 0.0


def test_documents_have_three_levels() -> None:
    requests = SMALL[4].load(VOCABULARY).requests
    assert len({tuple(request.token_ids[:3]) for request in requests}) == 1
    assert len({tuple(request.token_ids[:12]) for request in requests}) == 2
    assert len({tuple(request.token_ids) for request in requests}) == 4


def test_chat_turns_follow_each_other() -> None:
    load = SMALL[5].load(VOCABULARY)
    assert [request.follows for request in load.requests] == [None, None, 0, 1, 2, 3]
    assert load.prompt_lens == (6, 6, 6 + 3 + 2, 11, 11 + 3 + 2, 16)
    assert load.has_turns
    assert all(request.delay_s > 0 for request in load.requests[2:])


def test_file_reads_texts_ids_and_conversations(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    lines = [
        {"prompt": "ab"},
        {"prompt": [1, 2, 3], "output_len": 7, "n": 2},
        {"messages": [{"role": "u", "content": "c"}]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    load = FileWorkload(file=str(path), output_len=4).load(Vocabulary(1000, Letters))
    assert load.requests == (
        LoadRequest([97, 98], 4),
        LoadRequest([1, 2, 3], 7, 2),
        LoadRequest([60, 117, 62, 99], 4),
    )


@pytest.mark.parametrize(
    "line",
    ["no json", "[]", "{}", '{"prompt": "a", "messages": []}', '{"prompt": [5000]}', '{"prompt": [1], "output_len": 0}',
     '{"prompt": [1], "outputlen": 3}', '{"prompt": [true]}'],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": [1]}\n' + line)
    with pytest.raises(PromptError, match="line 2"):
        FileWorkload(file=str(path)).load(VOCABULARY)


def test_a_text_needs_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": "a"}')
    with pytest.raises(ConfigError, match="tokenizer"):
        FileWorkload(file=str(path)).load(VOCABULARY)
    with pytest.raises(ConfigError, match="--file"):
        FileWorkload().load(VOCABULARY)
    with pytest.raises(PromptError, match="cannot be read"):
        FileWorkload(file=str(tmp_path / "missing")).load(VOCABULARY)


@pytest.mark.parametrize(
    ("workload", "words"),
    [
        (RandomWorkload(num_requests=0), "num_requests is 0"),
        (RandomWorkload(min_len=9, max_len=8), "exceeds max_len"),
        (SharedPrefixWorkload(prefix_len=-1), "prefix_len is -1"),
        (ForestWorkload(output_len=0), "output_len is 0"),
        (ChatWorkload(think_s=-1.0), "think_s"),
    ],
)
def test_sizes_out_of_range_are_refused(workload: Workload, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        workload.load(VOCABULARY)


def test_every_workload_explains_every_option() -> None:
    from cascade_llm.cli.field_options import field_docs

    for workload in WORKLOADS.values():
        assert workload.__doc__
        named = [name for name in workload.__dataclass_fields__ if name not in ("name", "temperature")]  # type: ignore[attr-defined]
        assert set(named) <= field_docs(workload).keys(), workload


def test_a_load_that_exceeds_the_context_is_refused_with_both_numbers() -> None:
    load = SMALL[1].load(VOCABULARY)
    load.check(28)
    with pytest.raises(ConfigError, match=r"28 tokens.*27"):
        load.check(27)


def test_an_empty_load_is_refused() -> None:
    with pytest.raises(ConfigError, match="no requests"):
        Load("file", ()).check(10)
    with pytest.raises(ConfigError, match="empty prompt"):
        Load("file", (LoadRequest([], 3),)).check(10)


def test_the_pool_counts_shared_pages_once() -> None:
    shared = Load("a", tuple(LoadRequest([*range(32), 100 + i], 4) for i in range(4)))
    apart = Load("b", tuple(LoadRequest([i, *range(32)], 4) for i in range(4)))
    own = 4 * 2 * (2 + 1)  # for each: two pages at most for prompt end and output, one spare, twice
    assert shared.pool_pages(4) == 32 // 4 + own
    assert apart.pool_pages(4) == 4 * (32 // 4) + own

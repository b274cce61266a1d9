"""Sessions through `LLM`: what a conversation holds between its turns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cascade_llm import LLM, SamplingParams
from cascade_llm.errors import RequestError
from tests.engine.tiny_llm import save_tiny, tiny_llm

PROMPT = list(range(3, 20))
SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with tiny_llm(folder, num_threads=1) as llm:
        yield llm


def test_turns_hold_their_pages_and_branches_share_them(llm: LLM) -> None:
    (first,) = llm.generate(PROMPT, SHORT, session_id="talk")
    spoken = [*PROMPT, *first["token_ids"]]
    assert llm.stats()["session_pages"] == 5, "20 of its 21 tokens have K/V"
    branches = llm.generate(
        [[*spoken, 7], [*spoken, 8], [9, 9]],
        SHORT,
        session_id=["talk", "branch", None],
        fork_of=[None, "talk", None],
    )
    assert [output.num_cached_tokens for output in branches] == [20, 20, 0]
    with llm.stream([*spoken, 8, *branches[1]["token_ids"]], SHORT, session_id="branch") as stream:
        assert len(list(stream)) > 0
        assert stream.output.num_cached_tokens == 24
    assert [(info.session_id, info.num_pages) for info in llm.sessions()] == [("talk", 6), ("branch", 7)]
    assert [llm.drop_session(name) for name in ("talk", "branch", "talk")] == [True, True, False]
    assert llm.stats()["session_pages"] == 0
    assert llm.sessions() == []


def test_a_salt_keeps_pages_apart(llm: LLM) -> None:
    prompts = [[*range(30, 50), last] for last in range(3)]
    llm.generate(prompts[0], SHORT, cache_salt="mine")
    outputs = [llm.generate(prompts[1], SHORT, cache_salt=salt)[0] for salt in ("other", None, "mine")]
    assert [output.num_cached_tokens for output in outputs] == [0, 0, 20]
    outputs = llm.generate(prompts[1:], SHORT, cache_salt=["mine", None])
    assert [output.num_cached_tokens for output in outputs] == [20, 20]
    with llm.stream(prompts[2], SHORT, cache_salt="a third") as stream:
        list(stream)
        assert stream.output.num_cached_tokens == 0


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"session_id": ""}, "letters"),
        ({"session_id": "a/b"}, "letters"),
        ({"session_id": [3]}, "letters"),
        ({"fork_of": "a"}, "own session_id"),
        ({"session_id": ["a", "b"]}, "2 entries for 1"),
        ({"session_id": "a", "params": SamplingParams(n=2)}, "n is 2"),
        ({"session_id": "a", "prompts": [[1], [2]]}, "one name for 2"),
        ({"session_id": ["a", "a"], "prompts": [[1], [2]]}, "twice"),
        ({"cache_salt": ""}, "no empty one"),
        ({"cache_salt": [3]}, "must be a text"),
        ({"cache_salt": ["a", "b"]}, "2 entries for 1"),
    ],
)
def test_what_cannot_be_a_turn_is_said_and_nothing_runs(llm: LLM, how: dict[str, Any], reason: str) -> None:
    before = llm.stats()["requests"]
    with pytest.raises(RequestError, match=reason):
        llm.generate(**{"prompts": [PROMPT], "params": SHORT, **how})
    assert llm.stats()["requests"] == before


def test_without_a_prefix_cache_nothing_can_be_held(folder: Path) -> None:
    with (
        tiny_llm(folder, num_threads=1, enable_prefix_caching=False) as llm,
        pytest.raises(RequestError, match="prefix"),
    ):
        llm.generate(PROMPT, SHORT, session_id="a")

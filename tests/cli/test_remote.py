"""`generate --url` and `chat --url` against a real server with the same model as `LLM`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cascade_llm import LLM, SamplingParams
from tests.bench.fake_openai_server import fake_openai_server
from tests.cli.conftest import Run, json_lines
from tests.server.conftest import RunningServer, server

__all__ = ["server"]

GREEDY = ("--temperature", "0", "--max-tokens", "6", "--ignore-eos")
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> Iterator[LLM]:
    with LLM(tiny_folder, dtype="float32", num_threads=1, max_num_seqs=8) as llm:
        yield llm


def test_prompts_and_conversations_are_answered(run: Run, server: RunningServer, llm: LLM, tmp_path: Path) -> None:
    result = run("generate", "--url", server.url, "--json", *GREEDY, "The sea", "A ship", "--n", "2")
    assert result.exit_code == 0, result.output
    records = json_lines(result.stdout)
    assert [record["prompt"] for record in records] == ["The sea", "A ship"]
    assert [r["text"] for r in records] == [output["text"] for output in llm.generate(["The sea", "A ship"], PARAMS)]
    assert [len(record["outputs"]) for record in records] == [2, 2]
    assert records[0]["finish_reason"] == "length"
    chats = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}] for text in ("a", "b")]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"messages": messages}) for messages in chats))
    chatted = run("generate", "--url", f"{server.url}/v1/", "-m", "tiny", "-f", file, *GREEDY)
    expected = [output["text"] for output in llm.chat(chats, PARAMS)]
    assert chatted.stdout == f"[0]\n{expected[0]}\n[1]\n{expected[1]}\n"


def test_a_conversation_goes_on(run: Run, server: RunningServer, llm: LLM) -> None:
    first = [{"role": "user", "content": "Hello."}]
    (answer,) = llm.chat([first], PARAMS)
    second = [*first, {"role": "assistant", "content": answer["text"]}, {"role": "user", "content": "Go on."}]
    (more,) = llm.chat([second], PARAMS)
    result = run("chat", "--url", server.url, *GREEDY, stdin="Hello.\nGo on.\n/reset\nHello.\n/exit\n")
    assert result.stdout == f"{answer['text']}\n{more['text']}\n{answer['text']}\n"


def test_errors_name_the_server_and_its_reason(run: Run, server: RunningServer) -> None:
    failed = run("generate", "--url", server.url, *GREEDY, "fine", "word " * 600)
    assert failed.exit_code == 1
    assert "max_model_len" in failed.stderr
    assert failed.stdout.startswith("[0]\n")
    long = run("chat", "--url", server.url, *GREEDY, stdin="word " * 600 + "\nHello.\n")
    assert "max_model_len" in long.stderr
    assert long.exit_code == 0
    assert long.stdout.count("\n") == 1, "the next message is answered"
    assert "nothing answers at" in str(run("generate", "--url", "http://localhost:1", "a").output)
    assert "has no model 'large'" in run("chat", "--url", server.url, "-m", "large").output


@pytest.mark.parametrize("behaviour", ["refuses", "breaks off", "says error"])
def test_streams_that_fail_end_the_turn(run: Run, behaviour: str) -> None:
    with fake_openai_server(behaviour=behaviour) as fake:
        result = run("chat", "--url", fake.url, stdin="Hello.\n")
    assert result.exit_code == 0
    assert fake.url in result.stderr
    assert "/reset" in result.stderr


def test_options_that_are_the_servers_own_are_refused(run: Run) -> None:
    for flags, words in (
        (("--dtype", "float32"), "--dtype goes with a model that is loaded here"),
        (("--logprobs", "1"), "--logprobs does not go with --url"),
        (("--split-special-tokens",), "--split-special-tokens does not go"),
    ):
        result = run("generate", "--url", "http://localhost:1", "a", *flags)
        assert result.exit_code == 1
        assert words in result.output

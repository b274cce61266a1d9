"""`batch` against the library on the same requests, its order, its resumption, and what files get wrong."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cascade_llm import LLM, SamplingParams
from cascade_llm.errors import ConfigError
from cascade_llm.server.batch import BatchCounts, run_batch
from cascade_llm.server.batch_output import BatchOutput
from tests.cli.conftest import Run, json_lines

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ENGINE = {"dtype": "float32", "num_threads": 1, "max_num_seqs": 2, "page_size": 16}
PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
BODY = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
SHARED = ["A long beginning about the sea, the ships and the harbour. " * 3, "Another one, of hills and of rain. " * 4]


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> Iterator[LLM]:
    with LLM(tiny_folder, **ENGINE, cascade_shared_prefix_len=16) as llm:
        yield llm


def request(custom_id: object, url: object = COMPLETIONS, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {**BODY, **body}}


def write(path: Path, lines: Sequence[dict[str, Any] | bytes]) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def alternating(count: int) -> list[dict[str, Any]]:
    """Requests whose beginnings alternate: the worst order."""
    return [request(f"r{i}", prompt=f"{SHARED[i % 2]} {i}") for i in range(count)]


def answers_of(path: Path) -> dict[Any, dict[str, Any]]:
    records = json_lines(path.read_text())
    by_id = {record["custom_id"]: record for record in records}
    assert len(by_id) == len(records)
    return by_id


def text_of(record: dict[str, Any]) -> str:
    assert record["error"] is None
    text: str = record["response"]["body"]["choices"][0]["text"]
    return text


def run_file(llm: LLM, requests: Path, answers: Path, **options: Any) -> BatchCounts:
    with BatchOutput(answers) as output:
        return run_batch(llm, requests, output, names=["tiny"], **options)


def test_the_command_answers_what_the_library_does(run: Run, tiny_folder: Path, llm: LLM, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Say it."}]
    requests = write(
        tmp_path / "in.jsonl",
        [request("chat", CHAT, messages=messages), request("two", prompt=["The sea", "A ship"]), b""],
    )
    answers = tmp_path / "out.jsonl"
    flags = [x for name, value in ENGINE.items() for x in (f"--{name.replace('_', '-')}", str(value))]
    args = ("batch", requests, answers, "-m", tiny_folder, *flags)
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "2 answered, 0 with errors" in result.stderr
    found = answers_of(answers)
    (chat,) = llm.chat([messages], PARAMS)
    body = found["chat"]["response"]["body"]
    assert body["choices"][0]["message"]["content"] == chat["text"]
    assert body["usage"]["completion_tokens"] == 4
    assert body["usage"]["cascade"]["steps"] == 4
    assert (found["chat"]["response"]["status_code"], body["object"]) == (200, "chat.completion")
    expected = [output["text"] for output in llm.generate(["The sea", "A ship"], PARAMS)]
    assert [choice["text"] for choice in found["two"]["response"]["body"]["choices"]] == expected
    before = answers.read_bytes()
    again = run(*args)
    assert again.exit_code == 0
    assert "0 answered, 0 with errors, 2 were done before" in again.stderr
    assert answers.read_bytes() == before


def test_the_order_makes_beginnings_meet(llm: LLM, tmp_path: Path) -> None:
    requests = write(tmp_path / "in.jsonl", alternating(8))
    saved, texts = {}, {}
    for in_order in (True, False):
        llm.reset_prefix_cache()
        before = llm.stats()["kv_bytes_saved"]
        run_file(llm, requests, tmp_path / f"{in_order}.jsonl", in_order=in_order)
        saved[in_order] = llm.stats()["kv_bytes_saved"] - before
        texts[in_order] = {key: text_of(record) for key, record in answers_of(tmp_path / f"{in_order}.jsonl").items()}
    assert saved[False] > saved[True]
    assert texts[False] == texts[True]
    expected = [output["text"] for output in llm.generate([line["body"]["prompt"] for line in alternating(8)], PARAMS)]
    assert texts[True] == {f"r{i}": text for i, text in enumerate(expected)}


def test_salts_keep_lines_apart_and_meet_in_the_order(llm: LLM, tmp_path: Path) -> None:
    salts = ["a", "b", "a", "b"]
    lines = [request(f"r{i}", prompt=f"{SHARED[0]} {i}", cache_salt=salt) for i, salt in enumerate(salts)]
    llm.reset_prefix_cache()
    run_file(llm, write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    usages = {key: record["response"]["body"]["usage"] for key, record in answers_of(tmp_path / "out.jsonl").items()}
    cached = [usages[f"r{i}"]["prompt_tokens_details"]["cached_tokens"] for i in range(4)]
    assert cached[:2] == [0, 0], "nobody was there before with this salt"
    assert min(cached[2:]) > 0
    assert [usages[f"r{i}"]["cascade"]["group_size"] for i in range(4)] == [2, 2, 2, 2]


def test_a_file_longer_than_its_window_streams(llm: LLM, tmp_path: Path) -> None:
    most = []
    requests = write(tmp_path / "in.jsonl", alternating(11))
    counts = run_file(
        llm, requests, tmp_path / "out.jsonl", window=3, on_line=lambda _: most.append(llm.engine.num_requests)
    )
    assert (counts.answered, counts.failed) == (11, 0)
    assert max(most) <= 4, "twice as many as run"
    assert len(answers_of(tmp_path / "out.jsonl")) == 11


def test_an_interrupted_run_is_gone_on_with(llm: LLM, tmp_path: Path) -> None:
    requests, answers = write(tmp_path / "in.jsonl", alternating(7)), tmp_path / "out.jsonl"

    def interrupt(counts: BatchCounts) -> None:
        if counts.answered == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_file(llm, requests, answers, on_line=interrupt)
    kept = answers_of(answers)
    assert len(kept) == 3
    with answers.open("ab") as file:  # and killed in the middle of a line
        file.write(b'{"id": "batch_req_9", "custom_id": "r6", "respo')
    counts = run_file(llm, requests, answers)
    assert (counts.found_done, counts.answered) == (3, 4)
    assert {key: text_of(record) for key, record in answers_of(answers).items()}.keys() == {f"r{i}" for i in range(7)}
    assert llm.stats()["running_sequences"] == llm.stats()["waiting_sequences"] == 0


WRONG: list[tuple[dict[str, Any] | bytes, str, bool]] = [
    (b"{", "no JSON", False),
    (b"[1]", "a JSON list", False),
    (b'{"custom_id": "n", "body": {"prompt": "a", "temperature": NaN}}', "NaN is no JSON number", False),
    (b"\xff{}", "no UTF-8", False),
    (b"[" * 100_000, "no JSON", False),
    (b'{"custom_id": "big", "body": {"max_tokens": ' + b"9" * 5000 + b"}}", "no JSON", False),
    (b'{"custom_id": "long' + b"g" * (8 << 20) + b'"}', "longer than", False),
    (request(None, prompt="a"), "custom_id must be", False),
    (request("", prompt="a"), "custom_id must be", False),
    (request("good", prompt="b"), "was there before", False),
    (request("good", "/v2", prompt="b"), "was there before", False),
    (request("e1", "/v1/embeddings", prompt="a"), "url is '/v1/embeddings'", True),
    (request("e2", 7, prompt="a"), "url is 7", True),
    ({**request("e3", prompt="a"), "method": "GET"}, "method is 'GET'", True),
    ({**request("e4"), "body": None}, "body must be an object", True),
    (request("e5", prompt="a", model="other"), "not served here: tiny is", True),
    (request("e6", prompt="a\ud800b"), "surrogate", True),
    (request("e7", CHAT, messages=[]), "messages is empty", True),
    (request("e8", prompt="a", temperature=-1), "temperature", True),
    (request("e9", prompt="a", stream=True), "stream", True),
    (request("e9a", prompt="a", session_id="a"), "session_id: lines of a batch", True),
    (request("e9b", CHAT, messages=[], fork_of="a"), "fork_of: lines of a batch", True),
    (request("e9c", prompt="a", cache_salt=""), "cache_salt", True),
    (request("e10", prompt="word " * 600), "max_model_len", True),
    (request("e11", prompt="a", n=10**6), "n is", True),
    (request("e12\ud800", prompt=3), "prompt", True),
]


def test_what_is_wrong_with_a_line_is_its_answer(llm: LLM, tmp_path: Path) -> None:
    lines = [request("good", prompt="A ship"), *(line for line, _, _ in WRONG), request("last", prompt="The sea")]
    requests, answers = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    counts = run_file(llm, requests, answers)
    assert (counts.answered, counts.failed) == (2, len(WRONG))
    records = json_lines(answers.read_text())
    failures = {record["error"]["line"]: record for record in records if record["error"] is not None}
    for number, (line, words, has_id) in enumerate(WRONG, start=2):
        record = failures[number]
        assert words in record["error"]["message"], line
        assert record["custom_id"] == (line["custom_id"] if has_id and isinstance(line, dict) else None)
        assert (record["response"] is not None) == has_id
        if has_id:
            assert 400 <= record["response"]["status_code"] < 500
            assert record["response"]["body"]["error"]["message"] == record["error"]["message"]
    assert {r["custom_id"] for r in records if r["error"] is None} == {"good", "last"}
    before = answers.read_bytes()
    counts = run_file(llm, requests, answers)
    assert (counts.answered, counts.failed, counts.found_done) == (0, 0, 2 + len(WRONG))
    assert answers.read_bytes() == before


def test_unknown_fields_are_refused_where_that_is_asked(llm: LLM, tmp_path: Path) -> None:
    requests = write(tmp_path / "in.jsonl", [request("a", prompt="a", temprature=1)])
    assert run_file(llm, requests, tmp_path / "1.jsonl").answered == 1
    assert run_file(llm, requests, tmp_path / "2.jsonl", strict=True).failed == 1


def test_a_file_that_is_none_of_answers_is_left_alone(run: Run, tmp_path: Path) -> None:
    requests = write(tmp_path / "in.jsonl", alternating(1))
    for text in (b"dear diary", b"dear diary\n", b'{"id": "batch_1"}\n', requests.read_bytes()):
        other = tmp_path / "other"
        other.write_bytes(text)
        with pytest.raises(ConfigError, match="line 1, is no answer of a batch"):
            BatchOutput(other)
        assert other.read_bytes() == text
    assert "has the requests" in run("batch", requests, requests).stderr
    assert "cannot be written" in run("batch", requests, tmp_path / "none" / "out").stderr


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    with (tmp_path / "out").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another run writes"):
            BatchOutput(tmp_path / "out")

"""`generate` against the library on the same prompts, its output formats, and what users get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cascade_llm import LLM, RequestOutput, SamplingParams
from tests.cli.conftest import Run, json_lines

ENGINE = ("--dtype", "float32", "--max-num-seqs", "8")
GREEDY = ("--temperature", "0", "--max-tokens", "6", "--ignore-eos")
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    return LLM(tiny_folder, dtype="float32", max_num_seqs=8)


def records_of(outputs: list[RequestOutput]) -> list[dict[str, Any]]:
    return [
        {
            "index": index,
            "prompt": output.prompt,
            "text": output["text"],
            "token_ids": output["token_ids"],
            "finish_reason": output["finish_reason"],
            "stop_reason": None,
            "num_cached_tokens": output.num_cached_tokens,
            "error": None,
        }
        for index, output in enumerate(outputs)
    ]


def test_json_has_what_the_library_returns(run: Run, tiny_folder: Path, llm: LLM, tmp_path: Path) -> None:
    prompts = [
        "The sea is",
        "A shared beginning, long enough for a page or two of tokens. One",
        "Zwölf Boxkämpfer 漢字",
    ]
    llm.reset_prefix_cache()
    expected = records_of(llm.generate(prompts, PARAMS))
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts), encoding="utf-8")
    common = ("generate", "--model", tiny_folder, "--json", *GREEDY, *ENGINE)
    for args, stdin in ((prompts, ""), (["--file", str(file)], ""), ([], "\n".join(prompts))):
        result = run(*common, *args, stdin=stdin)
        assert result.exit_code == 0, result.output
        assert json_lines(result.stdout) == expected


def test_text_output_and_summary(run: Run, tiny_folder: Path, llm: LLM) -> None:
    outputs = llm.generate(["one", "two"], PARAMS)
    result = run("generate", "-m", tiny_folder, "one", "two", *GREEDY, *ENGINE)
    assert result.exit_code == 0
    assert result.stdout == f"[0]\n{outputs[0]['text']}\n[1]\n{outputs[1]['text']}\n"
    assert "2 requests, 12 tokens in" in result.stderr
    alone = run("generate", "-m", tiny_folder, "one", "--quiet", *GREEDY, *ENGINE)
    assert alone.stdout == f"{outputs[0]['text']}\n"
    assert alone.stderr == ""


def test_a_shared_system_text_is_found_in_the_cache(run: Run, tiny_folder: Path, llm: LLM, tmp_path: Path) -> None:
    system = "A text that stands before every prompt, and is read once for all of them. " * 4
    (tmp_path / "system.txt").write_text(system)
    args = ("generate", "-m", tiny_folder, "--json", "--system-file", tmp_path / "system.txt", *GREEDY, *ENGINE)
    result = run(*args, "one", "two")
    records = json_lines(result.stdout)
    assert [record["prompt"] for record in records] == [system + "one", system + "two"]
    assert [r["token_ids"] for r in records] == [
        output["token_ids"] for output in llm.generate([system + "one", system + "two"], PARAMS)
    ]
    assert records[1]["num_cached_tokens"] >= 48
    chats = [[{"role": "system", "content": system}, {"role": "user", "content": text}] for text in ("one", "two")]
    chatted = json_lines(run(*args, "--chat", "one", "two").stdout)
    assert [r["token_ids"] for r in chatted] == [output["token_ids"] for output in llm.chat(chats, PARAMS)]
    assert "<|im_start|>assistant" in chatted[0]["prompt"]


def test_conversations_from_a_file(run: Run, tiny_folder: Path, llm: LLM, tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}]]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    result = run("generate", "-m", tiny_folder, "--json", "-f", file, *GREEDY, *ENGINE)
    assert [r["token_ids"] for r in json_lines(result.stdout)] == [o["token_ids"] for o in llm.chat(chats, PARAMS)]


def test_a_chat_template_is_told_what_the_command_line_says(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text(
        "{{ messages[0].content }}|{{ tools[0].name }}|{{ mood }}", encoding="utf-8"
    )
    (tmp_path / "tools.json").write_text('\ufeff[{"name": "f"}]', encoding="utf-8")
    told = ["--chat-template", str(tmp_path / "template.jinja"), "--tools", str(tmp_path / "tools.json")]
    told += ["--chat-template-kwargs", '{"mood": "good"}']
    result = run("generate", "-m", tiny_folder, "--json", "--chat", "hi", *told, *GREEDY, *ENGINE)
    (record,) = json_lines(result.stdout)
    assert record["prompt"] == "hi|f|good"
    result = run("chat", "-m", tiny_folder, "--quiet", *told, *GREEDY, *ENGINE, stdin="hi\n")
    assert result.exit_code == 0, result.output
    result = run("chat", "-m", tiny_folder, "--continue-final-message", *ENGINE, stdin="hi\n")
    assert "goes with `generate`" in result.stderr


def test_an_editor_s_mark_at_the_beginning_of_a_file_is_no_text(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfThe sea is\r\n")
    result = run("generate", "-m", tiny_folder, "--json", "--file", tmp_path / "prompts.txt", *GREEDY, *ENGINE)
    assert [record["prompt"] for record in json_lines(result.stdout)] == ["The sea is"]


def test_samples_and_logprobs(run: Run, tiny_folder: Path, llm: LLM) -> None:
    options = ("--n", "3", "--seed", "5", "--logprobs", "2", "--prompt-logprobs", "1", "--max-tokens", "4")
    result = run("generate", "-m", tiny_folder, "--json", "one two", *options, *ENGINE)
    (record,) = json_lines(result.stdout)
    params = SamplingParams(n=3, seed=5, logprobs=2, prompt_logprobs=1, max_tokens=4)
    (output,) = llm.generate("one two", params)
    assert [sample["token_ids"] for sample in record["outputs"]] == [sample.token_ids for sample in output.outputs]
    assert [sample["index"] for sample in record["outputs"]] == [0, 1, 2]
    assert record["token_ids"] == output.outputs[0].token_ids
    assert [len(logprob["top"]) for logprob in record["logprobs"]] == [2] * len(record["token_ids"])
    assert record["prompt_logprobs"][0] is None
    assert len(record["prompt_logprobs"]) == len(output.prompt_token_ids)
    text = run("generate", "-m", tiny_folder, "--quiet", "one two", *options, *ENGINE).stdout
    assert text.startswith(f"(0) {output.outputs[0].text}\n(1) ")


WRONG: list[tuple[list[str], str]] = [
    (["hi", "--temperature", "-1"], "temperature is -1.0: it must be 0 or larger"),
    (["hi", "--max-model-len", "513"], "max_model_len is 513"),
    (["hi", "--kv-cache-bytes", "1000"], "raise kv_cache_bytes"),
    (["hi", "--dtype", "float64"], "must be one of auto, float32"),
    (["hi", "--attention-backend", "flashinfr"], "attention_backend is 'flashinfr': it must be one of auto"),
    (["fine", ""], "the prompt is empty"),
    (["word " * 600], "shorten it, or raise max_model_len"),
    (["hi", "--stop-token-ids", "999999"], "the model's vocabulary is 0 to"),
    (["caf\udce9"], "half a surrogate pair"),
    (["hi", "--chat-template-kwargs", "{}x", "--chat"], "--chat-template-kwargs is no JSON"),
    (["hi", "--chat-template-kwargs", "[1]", "--chat"], "is a JSON list: give an object"),
    (["hi", "--continue-final-message"], "--continue-final-message does nothing to plain prompts: add --chat"),
]


@pytest.mark.parametrize(("args", "words"), WRONG)
def test_a_mistake_is_one_line_with_the_cure(run: Run, tiny_folder: Path, args: list[str], words: str) -> None:
    result = run("generate", "-m", tiny_folder, *ENGINE, *args)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    assert words in line


def test_a_model_that_is_not_there(run: Run, tmp_path: Path) -> None:
    result = run("generate", "-m", tmp_path / "none.gguf", "hi")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "smollm2" in result.stderr, "names what can be given"


def test_a_broken_line_is_found_before_the_model_is_looked_for(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n{"prompt": \n')
    result = run("generate", "-m", tmp_path / "none.gguf", "--file", file)
    assert result.exit_code == 1
    assert f"{file}, line 2 is no JSON" in result.stderr


def test_wrong_usage(run: Run, tmp_path: Path) -> None:
    for args, words in (
        (["--file", str(tmp_path / "none.txt")], "does not exist"),
        (["hi", "--max-tokens", "many"], "is not a valid integer"),
    ):
        result = run("generate", *args)
        assert result.exit_code == 2
        assert words in result.stderr


def test_no_prompt_at_all(run: Run) -> None:
    result = run("generate", stdin="\n\n")
    assert result.exit_code == 1
    assert "standard input has no prompts" in result.stderr


def test_all_bad_prompts_are_named_and_nothing_runs(run: Run, tiny_folder: Path) -> None:
    result = run("generate", "-m", tiny_folder, *ENGINE, *GREEDY, "fine", "", "also fine", "word " * 600)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "prompt 1: the prompt is empty" in result.stderr
    assert "prompt 3: the prompt has" in result.stderr


def test_on_error_return_runs_the_others(run: Run, tiny_folder: Path, llm: LLM) -> None:
    args = ("generate", "-m", tiny_folder, "--on-error", "return", *ENGINE, *GREEDY, "one", "")
    result = run(*args, "--json")
    first, second = json_lines(result.stdout)
    assert result.exit_code == 1
    assert first["token_ids"] == llm.generate("one", PARAMS)[0]["token_ids"]
    assert first["error"] is None
    assert (second["token_ids"], second["finish_reason"]) == ([], "error")
    assert "the prompt is empty" in second["error"]
    assert "1 of 2 prompts failed: 1" in result.stderr
    assert "prompt 1: the prompt is empty" in run(*args).stderr

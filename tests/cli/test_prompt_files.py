"""Prompts from arguments, files and standard input; a broken line is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from cascade_llm.cli.prompt_files import PromptInput, read_file, read_prompts, with_system
from cascade_llm.errors import PromptError


def written(folder: Path, name: str, *lines: str) -> Path:
    path = folder / name
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def contents(prompts: list[PromptInput]) -> list[object]:
    return [prompt.content for prompt in prompts]


def test_a_text_file_has_one_prompt_per_line(tmp_path: Path) -> None:
    prompts = read_file(written(tmp_path, "p.txt", "one", "", "  two ", '{"prompt": 3}', ""))
    assert contents(prompts) == ["one", "  two ", '{"prompt": 3}']
    assert [prompt.where.rpartition(", ")[2] for prompt in prompts] == ["line 1", "line 3", "line 4"]


def test_a_jsonl_file_has_prompts_and_conversations(tmp_path: Path) -> None:
    message = {"role": "user", "content": "hi\nthere"}
    lines = ('{"prompt": "one", "id": 7}', "", '{"prompt": [1, 2]}', '{"messages": [{"role": "user", "content": "ü"}]}')
    prompts = read_file(written(tmp_path, "p.jsonl", *lines))
    assert contents(prompts) == ["one", [1, 2], [{"role": "user", "content": "ü"}]]
    assert [prompt.is_chat for prompt in prompts] == [False, False, True]
    assert PromptInput("", [message]).is_chat


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{'prompt': 'x'}", "is no JSON"),
        ('{"prompt": "x"', "is no JSON"),
        ('"x"', "is a JSON str, no object"),
        ("{}", "neither a prompt nor messages"),
        ('{"promt": "x"}', "neither a prompt nor messages"),
        ('{"prompt": "x", "messages": []}', "both a prompt and messages"),
        ('{"prompt": 3}', "a prompt of type int"),
        ('{"prompt": ["a"]}', "a prompt of type list"),
        ('{"messages": []}', '"messages" is no list of objects'),
        ('{"messages": "hi"}', '"messages" is no list of objects'),
        ('{"prompt": "x", "max_tokens": 3}', "use --max-tokens"),
    ],
)
def test_a_broken_line_is_named_with_its_cure(tmp_path: Path, line: str, words: str) -> None:
    path = written(tmp_path, "p.jsonl", '{"prompt": "fine"}', "", line)
    with pytest.raises(PromptError) as caught:
        read_file(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 3")
    assert words in message
    assert "write" in message or "use" in message


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"fine\n\xff\xfe")
    with pytest.raises(PromptError, match=r"no UTF-8 text .* at byte 5"):
        read_file(path)


def test_arguments_and_file_go_together(tmp_path: Path) -> None:
    prompts = read_prompts(["a", "b"], written(tmp_path, "p.txt", "c"), None, as_chat=False)
    assert contents(prompts) == ["a", "b", "c"]


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="has no prompts"):
        read_prompts([], written(tmp_path, "p.txt", "", " "), None, as_chat=False)


def test_one_kind_of_prompts_at_a_time(tmp_path: Path) -> None:
    path = written(tmp_path, "p.jsonl", '{"prompt": "x"}', '{"messages": [{"role": "user", "content": "y"}]}')
    with pytest.raises(PromptError, match=r"line 2 is a conversation, .*line 1 a plain prompt: use --chat"):
        read_prompts([], path, None, as_chat=False)
    assert contents(read_prompts([], path, None, as_chat=True)) == [
        [{"role": "user", "content": "x"}],
        [{"role": "user", "content": "y"}],
    ]


def test_token_ids_are_no_message(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="line 1 is token ids: --chat goes with texts"):
        read_prompts([], written(tmp_path, "p.jsonl", '{"prompt": [1]}'), None, as_chat=True)


def test_a_shared_text_goes_before_each_prompt() -> None:
    user = {"role": "user", "content": "hi"}
    shared = with_system([PromptInput("1", "hi"), PromptInput("2", [user])], "S ")
    assert contents(shared) == ["S hi", [{"role": "system", "content": "S "}, user]]


def test_a_shared_text_fits_neither_token_ids_nor_a_second_system_message() -> None:
    with pytest.raises(PromptError, match="the file is token ids: --system-file"):
        with_system([PromptInput("the file", [1, 2])], "S")
    with pytest.raises(PromptError, match="the file has a system message of its own"):
        with_system([PromptInput("the file", [{"role": "system", "content": "x"}])], "S")

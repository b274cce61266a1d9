"""`chat` through a pipe and in a terminal: what is cached, how it ends, how an answer is stopped."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from pathlib import Path

import pytest

from cascade_llm import LLM, SamplingParams
from cascade_llm.cli.chat import Conversation
from tests.cli.conftest import Run, RunProcess, process_args

GREEDY = ("--temperature", "0", "--dtype", "float32", "--max-num-seqs", "2")


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    return LLM(tiny_folder, dtype="float32", max_num_seqs=2)


def turns(stderr: str) -> list[tuple[int, int, int]]:
    """Cached, new and generated tokens of each turn."""
    found = re.findall(r"\[(\d+) tokens cached, (\d+) new, (\d+) generated", stderr)
    return [(int(cached), int(new), int(generated)) for cached, new, generated in found]


def test_each_turn_finds_the_conversation_so_far(run_process: RunProcess, tiny_folder: Path, llm: LLM) -> None:
    messages = ["A first message of some length, so that it fills a page or two.", "And then?", "And after that?"]
    done = run_process("chat", "-m", tiny_folder, *GREEDY, "--max-tokens", "8", stdin="\n".join(messages))
    assert done.returncode == 0, done.stderr
    assert llm.tokenizer is not None
    conversation, expected = Conversation(llm.tokenizer, None), ""
    length = 0
    for message, (cached, new, generated) in zip(messages, turns(done.stderr), strict=True):
        ids = conversation.prompt_ids(message)
        (output,) = llm.generate(ids, SamplingParams(temperature=0, max_tokens=8))
        assert cached + new == len(ids)
        assert generated == len(output["token_ids"])
        assert length - 16 <= cached <= length, "whole pages of what was computed"
        conversation.add_turn(message, output)
        expected += output["text"] + "\n"
        length = len(ids) + generated - 1
    assert done.stdout == expected


def test_commands(run: Run, tiny_folder: Path) -> None:
    lines = ("hello there", "/reset", "hello there", "/hlp", "/help", "", "/exit", "never read")
    result = run("chat", "-m", tiny_folder, *GREEDY, "--max-tokens", "3", stdin="\n".join(lines))
    assert result.exit_code == 0
    first, second = turns(result.stderr)
    assert first[0] == 0
    assert sum(first[:2]) == sum(second[:2]), "the second begins anew"
    assert "unknown command '/hlp': did you mean '/help'?" in result.stderr
    assert "/reset  forget the conversation" in result.stderr


def test_a_system_message_stays_after_a_reset(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("You answer in verse, and you never use the letter e in your answers. " * 2)
    args = ("chat", "-m", tiny_folder, "--system-file", tmp_path / "system.txt", *GREEDY, "--max-tokens", "2")
    first, second = turns(run(*args, stdin="hi\n/reset\nhi\n").stderr)
    assert first[0] == 0
    assert second[0] >= 32
    assert sum(first[:2]) == sum(second[:2])


def test_a_message_that_does_not_fit_is_left_out(run: Run, tiny_folder: Path) -> None:
    lines = ("hello", "word " * 600, "hello again")
    result = run("chat", "-m", tiny_folder, *GREEDY, "--max-tokens", "2", stdin="\n".join(lines))
    assert result.exit_code == 0
    assert len(turns(result.stderr)) == 2
    assert "the context is max_model_len 512" in result.stderr
    assert "/reset" in result.stderr


def test_quiet_prints_answers_alone(run: Run, tiny_folder: Path) -> None:
    result = run("chat", "-m", tiny_folder, "--quiet", *GREEDY, "--max-tokens", "2", stdin="hi\nho\n")
    assert result.stdout.count("\n") >= 2
    assert result.stderr == ""


def test_options_that_make_no_conversation(run: Run, tiny_folder: Path) -> None:
    result = run("chat", "-m", tiny_folder, "--n", "2", stdin="hi")
    assert result.exit_code == 1
    assert "n is 2: a conversation goes on from one answer" in result.stderr


def test_history_is_kept_as_it_was_generated(llm: LLM) -> None:
    assert llm.tokenizer is not None
    conversation = Conversation(llm.tokenizer, "Be brief.")
    ids = conversation.prompt_ids("one")
    (output,) = llm.generate(ids, SamplingParams(temperature=1.5, seed=3, max_tokens=20))
    conversation.add_turn("one", output)
    kept = [*ids, *output["token_ids"]]
    assert conversation.prompt_ids("two")[: len(kept)] == kept


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, args: list[str], cwd: Path, environment: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            args, cwd=cwd, env={**environment, "TERM": "dumb"}, stdin=slave, stdout=slave, stderr=slave,
            start_new_session=True, preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(slave)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Read until the pattern appears in what was not waited for yet; returns all up to its end."""
        while not (match := re.search(pattern, self.shown, re.DOTALL)):
            try:
                read = os.read(self._master, 4096)
            except OSError:  # Linux's way to say that the other side is closed
                read = b""
            assert read, f"it ended before {pattern!r}: {self.shown}"
            self.shown += read.decode(errors="replace")
        before, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return before

    def press_until_it_ends(self, key: str) -> int:
        """Readline shows its prompt a moment before it listens, so one key alone may come too early."""
        for _ in range(20):
            self.type(key)
            try:
                return self.process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                continue
        raise AssertionError(f"it does not end: {self.shown}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_in_a_terminal(repo_root: Path, environment: dict[str, str], tiny_folder: Path) -> None:
    endless = ("--ignore-eos", "--max-tokens", "450")
    args = process_args("chat", "-m", tiny_folder, *GREEDY, *endless)
    terminal = Terminal(list(args), repo_root, environment)
    try:
        terminal.wait_for("> ")
        terminal.type("hello\n")
        terminal.wait_for("hello\r\n.")  # the answer has begun
        terminal.type("\x03")
        stopped = terminal.wait_for(r"generated.*tok/s\].*> ")
        assert "stopped" in stopped
        terminal.type("/reset\n")
        terminal.wait_for("anew.*> ")
        assert terminal.press_until_it_ends("\x04") == 0
    finally:
        terminal.close()


@pytest.mark.slow
def test_ctrl_c_at_the_prompt_leaves(repo_root: Path, environment: dict[str, str], tiny_folder: Path) -> None:
    terminal = Terminal(list(process_args("chat", "-m", tiny_folder, *GREEDY)), repo_root, environment)
    try:
        terminal.wait_for("> ")
        assert terminal.press_until_it_ends("\x03") == 0
    finally:
        terminal.close()

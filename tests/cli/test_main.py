"""The process itself: exit status, interruption, broken pipes, tracebacks."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from cascade_llm.errors import ModelNotFoundError
from tests.cli.conftest import Run, RunProcess, json_lines, process_args


def test_a_real_process_generates(run_process: RunProcess, tiny_folder: Path) -> None:
    args = ("generate", "-m", tiny_folder, "--json", "--max-tokens", "3", "--max-num-seqs", "4", "--dtype", "float32")
    done = run_process(*args, stdin="one\ntwo\n")
    assert done.returncode == 0, done.stderr
    assert [record["prompt"] for record in json_lines(done.stdout)] == ["one", "two"]
    assert "2 requests" in done.stderr


def test_an_error_is_one_line_and_status_1(run_process: RunProcess) -> None:
    done = run_process("plan", __file__, "-m", "nothing-of-this-name")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: 'nothing-of-this-name'")
    assert len(done.stderr.strip().splitlines()) == 1


def test_debug_lets_the_error_through(run: Run) -> None:
    for args in (["--debug", "plan", __file__, "-m", "no"], ["generate", "--debug", "hi", "-m", "no"]):
        assert isinstance(run(*args).exception, ModelNotFoundError)
    assert isinstance(run("generate", "hi", "-m", "no").exception, SystemExit)


def test_an_interruption_is_one_line(repo_root: Path, environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        process_args("generate"),
        cwd=repo_root,
        env=environment,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    try:
        process.stdin.write("more than a pipe holds" * 20_000)  # returns when the command has begun to read
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.strip() == "Interrupted."


def test_a_reader_that_leaves_is_no_error(repo_root: Path, environment: dict[str, str], tiny_folder: Path) -> None:
    args = process_args("generate", "-m", tiny_folder, "--quiet", "--json", "--max-tokens", "1", "--dtype", "float32")
    process = subprocess.Popen(
        args,
        cwd=repo_root,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate("one\ntwo\n", timeout=120)
    assert process.returncode == 1
    assert errors == ""

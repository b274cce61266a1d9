"""The process itself: exit status, interruption, broken pipes, tracebacks."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cascade_llm.cli.main import main
from cascade_llm.errors import ModelNotFoundError
from tests.cli.conftest import Run, RunProcess, json_lines, process_args
from tests.patience import PATIENCE_S

Capture = pytest.CaptureFixture[str]


def test_a_real_process_generates(run_process: RunProcess, tiny_folder: Path) -> None:
    args = ("generate", "-m", tiny_folder, "--json", "--max-tokens", "3", "--max-num-seqs", "4", "--dtype", "float32")
    done = run_process(*args, stdin="one\ntwo\n")
    assert done.returncode == 0, done.stderr
    assert [record["prompt"] for record in json_lines(done.stdout)] == ["one", "two"]
    assert "2 requests" in done.stderr


def test_an_error_is_one_line_and_status_1(run_process: RunProcess) -> None:
    done = run_process("pull", "nothing-of-this-name")
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
        _, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 130, errors
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
    _, errors = process.communicate("one\ntwo\n", timeout=PATIENCE_S)
    assert process.returncode == 1
    assert errors == ""


@pytest.mark.parametrize(
    ("redirection", "status", "words"),
    [
        (">&-", 1, "standard output is closed"),
        (">/dev/full", 1, "No space left on device"),
        ("2>&-", 0, ""),
        ("<&-", 0, ""),
        ("<&- 2>&-", 0, ""),
    ],
)
@pytest.mark.parametrize(
    "args", [["plan", "--help"], pytest.param(["generate", "x", "--json", "-q"], marks=pytest.mark.slow)]
)
def test_streams_that_are_closed_or_full(
    repo_root: Path,
    environment: dict[str, str],
    tiny_folder: Path,
    args: list[str],
    redirection: str,
    status: int,
    words: str,
) -> None:
    model = [] if "--help" in args else ["-m", str(tiny_folder), "--max-tokens", "1"]
    command = f"{shlex.join([*process_args(*args), *model])} {redirection}"
    done = subprocess.run(
        command, shell=True, cwd=repo_root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert words in done.stderr


def test_an_engine_runs_without_standard_input_and_error(
    repo_root: Path, environment: dict[str, str], tiny_folder: Path
) -> None:
    args = process_args("generate", "x", "--json", "-q", "-m", tiny_folder, "--max-tokens", "1")
    done = subprocess.run(
        f"{shlex.join(args)} <&- 2>&-", shell=True, cwd=repo_root, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [record["prompt"] for record in json_lines(done.stdout)] == ["x"]


def test_no_prompts_on_a_closed_standard_input(repo_root: Path, environment: dict[str, str], tiny_folder: Path) -> None:
    command = f"{shlex.join(process_args('generate', '-m', tiny_folder))} <&-"
    done = subprocess.run(
        command, shell=True, cwd=repo_root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert "prompt" in done.stderr


@pytest.mark.parametrize(
    "encoding",
    ["ascii", *(pytest.param(name, marks=pytest.mark.slow) for name in ("latin-1", "cp1252")), "utf-16"],
)
@pytest.mark.slow
def test_output_in_other_encodings(
    repo_root: Path, environment: dict[str, str], tiny_folder: Path, encoding: str
) -> None:
    args = process_args("generate", "-m", tiny_folder, "--json", "-q", "--max-tokens", "1", "caf\xe9 \u4e16 \U0001f600")
    done = subprocess.run(
        args, cwd=repo_root, env={**environment, "PYTHONIOENCODING": encoding}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert json.loads(done.stdout.decode(encoding))["prompt"] == "caf\xe9 \u4e16 \U0001f600"
    plain = [arg for arg in args if arg != "--json"]
    done = subprocess.run(
        plain, cwd=repo_root, env={**environment, "PYTHONIOENCODING": encoding}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "x", "-m", "a\0b"],
        ["generate", "x", "-m", "/" + "x" * 5000],
        ["generate", "-f", "a\0b"],
        ["generate", "x", "--num-threads", "1000000000"],
        ["generate", "x", "--max-num-seqs", "9" * 5000],
        ["plan", "a\0b"],
    ],
)
def test_names_and_numbers_that_the_system_refuses_are_one_line(args: list[str], capsys: Capture) -> None:
    assert main(args) in (1, 2)
    captured = capsys.readouterr()
    assert "Error: " in captured.err
    assert "Traceback" not in captured.err


def test_what_nobody_foresaw_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    class PanicException(BaseException):
        """As pyo3 raises it for a panic in Rust."""

    def panic(*args: object, **options: object) -> None:
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr("cascade_llm.llm.LLM.__init__", panic)
    assert main(["generate", "x"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("Error: PanicException: called")
    assert "--debug" in line


def test_the_package_runs_as_a_module(repo_root: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cascade_llm", "--version"],
        cwd=repo_root,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("cascade-llm, version")

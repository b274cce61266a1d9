"""`--help` answers for every command, at once: nothing heavy is imported for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

import click
import pytest

from cascade_llm.cli.generate import generate
from cascade_llm.cli.main import COMMANDS, cli
from cascade_llm.config import EngineOptions
from cascade_llm.sampling_params import SamplingParams
from tests.cli.conftest import Run

PATHS = [(), *((name,) for name in COMMANDS), ("bench", "throughput")]
FLAGS = ("--help", "-h")


class Helps(NamedTuple):
    """What a fresh interpreter answered: this one may have run and imported anything before."""

    answers: dict[str, tuple[int, str]]
    """exit status and text, by command line"""
    modules: set[str]
    """imported by then"""


@pytest.fixture(scope="module")
def helps(run_python: Callable[[str], str]) -> Helps:
    lines = [[*path, flag] for path in PATHS for flag in FLAGS]
    printed = run_python(
        "import json, sys\n"
        "from click.testing import CliRunner\n"
        "from cascade_llm.cli.main import cli\n"
        f"results = {{' '.join(line): CliRunner().invoke(cli, line) for line in {lines!r}}}\n"
        "answers = {line: (result.exit_code, result.stdout) for line, result in results.items()}\n"
        "print(json.dumps([answers, sorted(sys.modules)]))"
    )
    answers, modules = json.loads(printed)
    return Helps(answers, set(modules))


def test_help_imports_nothing_heavy(helps: Helps) -> None:
    assert not {"torch", "numpy", "transformers", "tokenizers", "huggingface_hub", "psutil"} & helps.modules
    assert "cascade_llm.cli.generate" in helps.modules, "else this proves nothing"


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
@pytest.mark.parametrize("flag", FLAGS)
def test_help_of_each_command_says_what_it_does(helps: Helps, path: tuple[str, ...], flag: str) -> None:
    status, text = helps.answers[" ".join((*path, flag))]
    assert status == 0
    assert text.startswith(f"Usage: cli {' '.join(path)}".rstrip())
    assert "cascade_llm." not in text


def test_every_command_has_a_short_help() -> None:
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        assert command.get_short_help_str(), name


def test_every_option_has_a_help_text() -> None:
    undocumented = [p.opts[0] for p in generate.params if isinstance(p, click.Option) and not p.help]
    assert undocumented == []


def test_generate_takes_every_field_of_both_records(run: Run) -> None:
    text = run("generate", "--help").stdout
    own = {"seed": "engine-seed"}
    for field in fields(SamplingParams):
        assert f"--{field.name.replace('_', '-')}" in text
    for field in fields(EngineOptions):
        assert f"--{own.get(field.name, field.name).replace('_', '-')}" in text


def test_version(run: Run) -> None:
    from cascade_llm import __version__

    assert run("--version").stdout == f"cascade-llm, version {__version__}\n"


@pytest.mark.parametrize(
    ("args", "near"),
    [
        (["generat"], "did you mean 'generate'?"),
        (["bench", "thruput"], "did you mean 'throughput'?"),
        (["generate", "--temprature", "1"], "'--temperature'"),
        (["generate", "--max_tokens", "1"], "'--max-tokens'"),
        (["chat", "--cascade-max-level", "1"], "'--cascade-max-levels'"),
        (["plan", "--jsn"], "'--json'"),
        (["demo", "--repeats", "2"], "'--repeat'"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest_known_one(run: Run, args: list[str], near: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert near in result.stderr.lower()
    assert result.stdout == ""

"""Every command on two ranks: those with an engine take `--tensor-parallel-size`, the others refuse it by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import pytest

from cascade_llm.cli.main import cli
from tests.cli.conftest import Run, json_lines

RANKS = ("--tensor-parallel-size", "2")
ENGINE = ("--dtype", "float32", "--page-size", "16")
LOAD = ("--prefix-len", "40", "--num-requests", "4", "--suffix-len", "4", "--output-len", "6", "--repeat", "1")
WITHOUT_ENGINE = {
    "bench attention",
    "bench calibrate",
    "bench serve",
    "env",
    "kernels build",
    "kernels list",
    "models",
    "plan",
    "pull",
}
GREEDY = ("--temperature", "0", "--max-tokens", "6", "--ignore-eos")


def commands(group: click.Group = cli, names: Sequence[str] = ()) -> Iterator[tuple[str, click.Command]]:
    """All that are no groups, by their whole names; of those that workloads make, one."""
    context = click.Context(group)
    listed = group.list_commands(context)
    for name in listed[:1] if group.name in ("throughput", "latency", "serve") and names else listed:
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*names, name))
        else:
            yield " ".join((*names, name)), command


def test_commands_with_an_engine_take_ranks_and_others_refuse_them(run: Run) -> None:
    flags = {name: {flag for p in command.params for flag in p.opts} for name, command in commands()}
    assert {name for name in flags if "--tensor-parallel-size" not in flags[name]} == {
        name for name in flags if any(name.startswith(other) for other in WITHOUT_ENGINE)
    }
    refused = run("plan", __file__, *RANKS)
    assert refused.exit_code == 2
    assert "No such option '--tensor-parallel-size'" in refused.stderr


def test_what_heads_cannot_be_shared_by_is_refused_by_name(run: Run, tiny_folder: Path) -> None:
    result = run("generate", "-m", tiny_folder, "a", "--tensor-parallel-size", "4")
    assert result.exit_code == 1
    assert "6 query heads and 2 KV heads cannot be shared out over 4 ranks; this model takes 1, 2, 6" in result.stderr


@pytest.mark.slow
def test_generate_and_chat(run: Run, tiny_folder: Path) -> None:
    args = ("generate", "-m", tiny_folder, "one", "two", "--json", *GREEDY, *ENGINE)
    one, two = run(*args), run(*args, *RANKS)
    assert two.exit_code == 0, two.stderr
    assert json_lines(two.stdout) == json_lines(one.stdout)
    chat = ("chat", "-m", tiny_folder, *GREEDY, *ENGINE)
    one, two = (run(*chat, *ranks, stdin="hello\n") for ranks in ((), RANKS))
    assert two.exit_code == 0, two.stderr
    assert two.stdout == one.stdout


@pytest.mark.slow
def test_batch(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    body = {"prompt": "The sea", "temperature": 0, "max_tokens": 4, "ignore_eos": True}
    requests, answers = tmp_path / "requests", tmp_path / "answers"
    lines = [{"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body} for i in range(3)]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run("batch", requests, answers, "-m", tiny_folder, *ENGINE, *RANKS)
    assert result.exit_code == 0, result.stderr
    assert all(record["response"]["status_code"] == 200 for record in json_lines(answers.read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["throughput", "latency"])
def test_bench(run: Run, tiny_folder: Path, what: str) -> None:
    result = run("bench", what, "shared-prefix", "-m", tiny_folder, *LOAD, *ENGINE, *RANKS, "--json")
    assert result.exit_code == 0, result.stderr
    assert "cascade off" in json.loads(result.stdout)["ratio"]


@pytest.mark.slow
def test_validate(run: Run, tiny_folder: Path) -> None:
    result = run("validate", tiny_folder, "--quick", "--json", "--attention-backend", "torch", *ENGINE[:2], *RANKS)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["subject"]["tensor_parallel_size"] == 2

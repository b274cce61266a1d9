"""`bench plan` on small loads: the table, the JSON, the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run

SMALL = ("planning", "--max-sequences", "32", "--max-context-len", "8192", "--repeat", "2")
TREE = ("--cache-pages", "2000", "--cache-prefixes", "50")


def test_table(run: Run) -> None:
    done = run(*SMALL, *TREE)
    assert done.exit_code == 0, done.output
    assert "one joins" in done.stdout
    assert "prompts: " in done.stdout
    assert "bytes a page" in done.stdout


def test_json(run: Run) -> None:
    done = run(*SMALL, *TREE, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    loads = [entry["load"] for entry in report["planning"]]
    assert {load["num_levels"] for load in loads} == {1, 2, 3, 4}
    assert {load["num_sequences"] for load in loads} == {16, 32}
    assert {load["context_len"] for load in loads} == {4096, 8192}
    assert all(entry["unchanged_s"] > 0 for entry in report["planning"])
    assert report["growth"] == {}, "too few sequences to tell"
    assert report["cache_tree"]["num_pages"] > 1900


def test_plot(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "growth.png"
    done = run(*SMALL, "--cache-pages", "0", "--plot", path)
    assert done.exit_code == 0, done.output
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "Prefix cache" not in done.stdout


def test_a_file_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run(*SMALL, "--cache-pages", "0", "--plot", tmp_path / "nowhere" / "growth.png")
    assert done.exit_code == 1
    assert "cannot be written" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-sequences", "8"), "--max-sequences"),
        (("--cache-pages", "10", "--cache-prefixes", "50"), "too few"),
        (("--repeat", "0", "--cache-pages", "0"), "repeat"),
        (("--max-context-len", "100"), "--max-context-len"),
    ],
)
def test_bad_numbers(run: Run, arguments: tuple[str, ...], words: str) -> None:
    done = run("planning", *arguments)
    assert done.exit_code in (1, 2)
    assert words in done.stderr

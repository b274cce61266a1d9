"""Each example runs as it stands, in a process of its own, and says what it is there to show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = {
    "inspect_plan.py": ["level 2 (leaf)", "rows 2 to 3: 32 tokens", "K/V tokens read: 138; by one level: 458"],
    "shared_prefix.py": ["Who is the captain?", "prompt tokens: 1374, computed: 334"],
}
SLOW = {
    "offline_generation.py": ["' Paris.' (stop)", "'Water boils at'"],
    "chat.py": ["[0 of 38 prompt tokens were cached]", "> Thank you!"],
    "n_samples.py": ["8 samples of 46 prompt tokens: 46 prefilled"],
}


def output_of(root: Path, name: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, f"examples/{name}"], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", QUICK)
def test_quick_example(repo_root: Path, name: str) -> None:
    printed = output_of(repo_root, name)
    assert [words for words in QUICK[name] if words not in printed] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_example(repo_root: Path, name: str) -> None:
    printed = output_of(repo_root, name)
    assert [words for words in SLOW[name] if words not in printed] == []


@pytest.mark.slow
def test_later_turns_of_the_chat_are_mostly_cached(repo_root: Path) -> None:
    turns = re.findall(r"\[(\d+) of (\d+) prompt tokens", output_of(repo_root, "chat.py"))
    assert len(turns) == 3
    assert all(int(cached) > int(total) // 2 for cached, total in turns[1:])


def test_every_example_is_here_and_short(repo_root: Path) -> None:
    files = {path.name: path for path in (repo_root / "examples").glob("*.py")}
    assert files.keys() == QUICK.keys() | SLOW.keys()
    assert all(len(path.read_text().splitlines()) <= 60 for path in files.values())

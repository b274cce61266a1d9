"""A tiny model with a real tokenizer, and ways to run a command line on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cascade_llm.cli.main import cli
from cascade_llm.engine.tokenizer import load_tokenizer
from cascade_llm.loader.gguf_file import GGUFFile
from cascade_llm.loader.resolve import open_checkpoint
from tests.models.checkpoints import tiny_model

Run = Callable[..., Result]
RunProcess = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of 2 layers and 512 positions with SmolLM2's tokenizer and chat template."""
    source = open_checkpoint("smollm2").tokenizer_source
    tokenizer = load_tokenizer(source)
    assert source is not None
    assert tokenizer is not None
    folder = tmp_path_factory.mktemp("tiny")
    changes = {"vocab_size": tokenizer.vocab_size, "num_hidden_layers": 2, "max_position_embeddings": 512}
    tiny_model("llama", **changes).save_pretrained(folder)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": GGUFFile(source).metadata["tokenizer.chat_template"],
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a command line in this process; the result has `exit_code`, `stdout` and `stderr`."""

    def run(*args: str | Path, stdin: str = "") -> Result:
        return CliRunner().invoke(cli, list(map(str, args)), input=stdin)

    return run


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For processes of their own."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}


@pytest.fixture(scope="session")
def run_process(repo_root: Path, environment: dict[str, str]) -> RunProcess:
    """Run the command in a process of its own."""

    def run(*args: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            process_args(*args),
            input=stdin,
            cwd=repo_root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def process_args(*args: str | Path) -> Sequence[str]:
    """The command line of `cascade-llm` with this interpreter."""
    code = "import sys; from cascade_llm.cli.main import main; sys.exit(main())"
    return [sys.executable, "-c", code, *map(str, args)]


def json_lines(text: str) -> list[Any]:
    """One value per line; fails where anything else is among them."""
    return [json.loads(line) for line in text.splitlines()]

"""Runs clients of others, unmodified, against `cascade-llm serve`, and prints what worked.

python -m scripts.clients FOLDER [--install] [--only NAME ...] [--model smollm2]

Each client has an environment of its own, FOLDER/NAME; `--install` makes those that are missing (a download).
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.peer_environment import PeerKind, install_peer
from cascade_llm.bench.openai_server import OpenAIServer
from cascade_llm.engine.tokenizer import load_tokenizer
from cascade_llm.loader.resolve import open_checkpoint
from scripts.clients.checks import CLIENTS, Client, Place
from scripts.serve_table import start_server

LONGEST_S = 600
"""For one client."""


def main() -> int:
    """Print a table; returns how many have failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", type=Path, metavar="FOLDER")
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(CLIENTS), default=list(CLIENTS))
    parser.add_argument("--model", default="smollm2")
    args = parser.parse_args()
    num_failed = 0
    print("| client | version | what it did |\n| --- | --- | --- |")
    with _serving(args.model) as (url, tokenizer):
        model = OpenAIServer(url).model
        for name in args.only:
            folder = args.environments / name
            try:
                binaries = _environment(folder, CLIENTS[name], install=args.install)
                said = _run(CLIENTS[name], url, model, tokenizer, binaries)
            except (AssertionError, LookupError, ValueError, OSError, subprocess.SubprocessError) as error:
                num_failed += 1
                said = "FAILED"
                print(f"{name}: {error}", file=sys.stderr)
                binaries = folder / "bin"
            print(f"| {name} | {_version(binaries, CLIENTS[name])} | {said} |", flush=True)
    return num_failed


@contextmanager
def _serving(model: str) -> Iterator[tuple[str, Path]]:
    """A server's URL, and a folder with its model's tokenizer."""
    tokenizer = load_tokenizer(open_checkpoint(model, load_format="dummy").tokenizer_source)
    assert tokenizer is not None, "the model has no tokenizer"
    server, port = start_server(model)
    try:
        with tempfile.TemporaryDirectory(prefix="cascade-llm-") as folder:
            tokenizer.save(Path(folder))
            yield f"http://127.0.0.1:{port}", Path(folder)
    finally:
        server.terminate()
        server.wait()


def _environment(folder: Path, client: Client, *, install: bool) -> Path:
    """The binaries of a client's environment."""
    if client.requirements and not (folder / "bin" / "python").exists():
        if not install:
            raise FileNotFoundError(f"{folder} has no environment: --install makes it")
        kind = PeerKind(module="", driver="", requirements=client.requirements, unwanted=client.unwanted)
        install_peer(folder, kind, on_install=lambda what: print(what, file=sys.stderr))
    return folder.absolute() / "bin"


def _run(client: Client, url: str, model: str, tokenizer: Path, binaries: Path) -> str:
    with tempfile.TemporaryDirectory(prefix="cascade-llm-") as folder:
        place = Place(url=url, model=model, tokenizer=tokenizer, folder=Path(folder), binaries=binaries)
        command = client.arguments(place)
        plain = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        start_s = time.monotonic()
        done = subprocess.run(
            command,
            cwd=folder,
            env={**plain, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LONGEST_S,
            check=False,
        )
        print(f"{shlex.join(command)}: {time.monotonic() - start_s:.0f} s", file=sys.stderr)
        assert done.returncode == 0, f"exit status {done.returncode}: {done.stdout[-3000:]}"
        return client.summary(place, done.stdout)


def _version(binaries: Path, client: Client) -> str:
    if not client.package:
        return subprocess.run(["curl", "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    code = f"from importlib.metadata import version; print(version({client.package!r}))"
    done = subprocess.run([str(binaries / "python"), "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "none"


if __name__ == "__main__":
    sys.exit(main())

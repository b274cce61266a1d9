"""Tasks behind the system prompts of agent frameworks.

The prompts are read as text from the packages that carry them; nothing of these is imported.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from cascade_llm.bench.load import LoadRequest
from cascade_llm.bench.workloads import RandomTokens, Vocabulary, Workload
from cascade_llm.errors import ConfigError

__all__ = ["AGENT_PROMPTS", "AgentsWorkload", "PromptFile", "agent_prompts"]


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """Where a distribution keeps its system prompt."""

    file: str
    """As the distribution's list of files has it."""
    version: str
    """Of the distribution, in which it was found there."""
    keys: Sequence[str] = ()
    """Of a YAML file: the keys whose texts, one after the other, are the prompt; of a text file none."""


AGENT_PROMPTS: Mapping[str, PromptFile] = {
    "browser-use": PromptFile(file="browser_use/agent/system_prompts/system_prompt.md", version="0.13.14"),
    "smolagents": PromptFile(file="smolagents/prompts/code_agent.yaml", version="1.26.0", keys=("system_prompt",)),
    "mini-swe-agent": PromptFile(
        file="minisweagent/config/mini.yaml", version="2.4.6", keys=("system_template", "instance_template")
    ),
}
"""By distribution. Places for tools and tasks stay as they are written: a few words of some thousand."""


@dataclass(frozen=True, kw_only=True)
class AgentsWorkload(Workload):
    """Tasks behind the system prompts of agent frameworks, read from the packages that are installed."""

    name: ClassVar[str] = "agents"

    tasks: int = 8
    """Tasks for each agent."""
    task_len: int = 128
    """Tokens of each task, at random."""
    output_len: int = 128
    """Generated tokens of each answer."""
    seed: int = 0
    """Of the tasks and their order."""

    def _requests(self, vocabulary: Vocabulary) -> list[LoadRequest]:
        tokens, tokenizer = RandomTokens(vocabulary, self.seed), vocabulary.encoder("the workload agents")
        requests = [
            LoadRequest(system + tokens.draw(self.task_len), self.output_len)
            for system in (tokenizer.encode(text) for text in agent_prompts().values())
            for _ in range(self.tasks)
        ]
        tokens.rng.shuffle(requests)
        return requests


def agent_prompts() -> dict[str, str]:
    """The prompts that are installed here, by distribution; `ConfigError` with the command where there are none."""
    found, missed = {}, []
    for name, prompt in AGENT_PROMPTS.items():
        try:
            text = _read(name, prompt)
        except metadata.PackageNotFoundError:
            continue
        if text is None:
            missed.append(f"{name} {metadata.version(name)} has no prompt in {prompt.file}")
        else:
            found[name] = text
    if not found:
        wanted = " ".join(f"{name}=={prompt.version}" for name, prompt in AGENT_PROMPTS.items())
        raise ConfigError(
            f"the workload agents reads the prompts of {', '.join(AGENT_PROMPTS)}, and there is none here"
            f"{''.join(f'; {miss}' for miss in missed)}: pip install --no-deps {wanted} (only their text is read)"
        )
    return found


def _literal_block(text: str, key: str) -> str | None:
    """The text of a YAML key that is written as a literal block (`key: |`); None where there is none.

    A block goes on as long as its lines are empty or further in than its key. So much of YAML is enough here, and saves
    a dependency.
    """
    lines = text.splitlines()
    for number, line in enumerate(lines):
        own = line.lstrip()
        if not own.startswith(f"{key}: |"):
            continue
        indent = len(line) - len(own)
        end = number + 1
        while end < len(lines) and (not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > indent):
            end += 1
        return textwrap.dedent("\n".join(lines[number + 1 : end])).strip("\n")
    return None


def _read(distribution: str, prompt: PromptFile) -> str | None:
    """None where the file or a key of it is missing."""
    for entry in metadata.files(distribution) or ():
        path = Path(os.fspath(entry.locate()))
        if entry.as_posix() != prompt.file or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        if not prompt.keys:
            return text
        blocks = [block for key in prompt.keys if (block := _literal_block(text, key))]
        return "\n\n".join(blocks) if len(blocks) == len(prompt.keys) else None
    return None

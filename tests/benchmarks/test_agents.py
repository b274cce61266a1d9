"""The workload of agents: system prompts read from installed packages, or an error that says what to install."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks import agents
from benchmarks.agents import AgentsWorkload, PromptFile
from cascade_llm.bench.workloads import Vocabulary
from cascade_llm.errors import ConfigError
from tests.bench.test_workloads import Letters
from tests.cli.conftest import Run

NO_AGENTS = {"no-such-agent": PromptFile(file="no_such_agent/prompt.md", version="1.0")}


def install_agent(folder: Path, name: str, files: Mapping[str, str]) -> None:
    """A distribution with these files, as pip leaves it in a folder of modules."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)


def test_agents_without_packages_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "AGENT_PROMPTS", NO_AGENTS)
    with pytest.raises(ConfigError, match=r"pip install --no-deps no-such-agent==1\.0"):
        AgentsWorkload().load(Vocabulary(1000, Letters))


def test_agents_read_the_text_of_installed_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_agent(tmp_path, "an-agent", {"an_agent/prompt.md": "You act."})
    yaml = "# comment\nagent:\n  system: |-\n    Be brief.\n\n      - so\n  other: |\n    Not this.\n"
    yaml += "plan: |\n  Do {{task}}.\n"
    install_agent(tmp_path, "other-agent", {"other_agent/config.yaml": yaml})
    monkeypatch.syspath_prepend(str(tmp_path))
    prompts = {
        "an-agent": PromptFile(file="an_agent/prompt.md", version="1.0"),
        "other-agent": PromptFile(file="other_agent/config.yaml", version="1.0", keys=("system", "plan")),
        **NO_AGENTS,
    }
    monkeypatch.setattr(agents, "AGENT_PROMPTS", prompts)
    found = {"an-agent": "You act.", "other-agent": "Be brief.\n\n  - so\n\nDo {{task}}."}
    assert agents.agent_prompts() == found
    load = AgentsWorkload(tasks=3, task_len=2, output_len=4).load(Vocabulary(1000, Letters))
    texts = ["".join(map(chr, request.token_ids[:-2])) for request in load.requests]
    assert sorted(texts) == sorted([*found.values()] * 3)


def test_an_agent_whose_prompt_moved_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_agent(tmp_path, "moved-agent", {"moved_agent/config.yaml": "user: |\n  Hello.\n"})
    monkeypatch.syspath_prepend(str(tmp_path))
    for file in ("moved_agent/config.yaml", "moved_agent/elsewhere.yaml"):
        prompt = PromptFile(file=file, version="0.9", keys=("system",))
        monkeypatch.setattr(agents, "AGENT_PROMPTS", {"moved-agent": prompt})
        with pytest.raises(ConfigError, match=r"moved-agent 1.0 has no prompt in .*moved-agent==0.9"):
            agents.agent_prompts()


def test_agents_are_a_workload_of_both_commands(run: Run) -> None:
    for command in ("throughput", "latency"):
        assert "--task-len" in run(command, "agents", "--help").stdout

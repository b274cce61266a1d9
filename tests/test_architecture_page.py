"""The walks on the architecture page name functions that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path


def defined_names(root: Path) -> set[str]:
    """Functions, methods as `Class.name`, and classes of the package."""
    names: set[str] = set()
    for path in (root / "cascade_llm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            if isinstance(node, ast.ClassDef):
                names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return names | {name.replace("FlashInferScheduler.", "Scheduler.") for name in names}


def test_every_function_of_the_walks_exists(repo_root: Path) -> None:
    page = (repo_root / "claude_docs" / "architecture.md").read_text(encoding="utf-8")
    walks = page.split("## Three walks")[1].split("\n## Where to read on")[0]
    named = set(re.findall(r"`([A-Za-z_]+(?:\.[A-Za-z_]+)?)(?:\([^`]*\))?`", walks))
    named = {name for name in named if re.search(r"[A-Z_]", name)}  # plain words are columns and fields
    known = defined_names(repo_root)
    assert len(named) > 40
    assert {name for name in named if name not in known} <= {"kv_page_indices"}

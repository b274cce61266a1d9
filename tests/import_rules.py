"""The import rules of the package, as functions from sources to broken rules; `test_imports.py` applies them.

Sources are a mapping from module name ("cascade_llm.plan"; a package by its own name) to source text, so that each
rule can be shown to fail on a made-up source. Every import counts, wherever it stands: inside a function, under
`if TYPE_CHECKING`, or as `import_module("name")`.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

PACKAGE = "cascade_llm"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("bench", "validation", "server"),
    ("llm",),
    ("engine",),
    ("scheduler", "worker"),
    ("sampling", "models", "loader"),
    ("layers", "weights"),
    ("attention",),
    ("kv_cache", "device"),
    ("plan", "plan_codec", "plan_file", "tiling", "config", "sampling_params", "outputs", "metrics", "errors"),
)
"""Top to bottom. A part imports lower rows only, never its neighbours; the bottom row's modules may, without cycles."""

BOTTOM = LAYERS[-1]

ROW = {part: row for row, parts in enumerate(LAYERS) for part in parts}


class Door(NamedTuple):
    """Where a third-party package may be imported."""

    places: tuple[str, ...]
    """Modules, or packages with all that is in them, below `cascade_llm`."""
    one_module: bool = False
    """Whether one module alone may import it, wherever among the places."""


DOORS: Mapping[str, Door] = {
    "transformers": Door(("engine.tokenizer", "validation.transformers_model")),
    "jinja2": Door(("engine.chat_template", "engine.template_sandbox")),
    "tokenizers": Door(("engine.tokenizer", "loader")),
    "gguf": Door(("loader",)),
    "safetensors": Door(("loader",)),
    "huggingface_hub": Door(("loader",)),
    "modelscope_hub": Door(("loader",), one_module=True),
    "flashinfer": Door(("attention",), one_module=True),
    "matplotlib": Door(("cli", "bench", "validation"), one_module=True),
    "xxhash": Door(("scheduler",)),
    "click": Door(("cli",)),
    "fastapi": Door(("server",)),
    "pydantic": Door(("server",), one_module=True),
    "uvicorn": Door(("server",), one_module=True),
    "zmq": Door(("server",)),
    "msgspec": Door(("server",)),
    "opentelemetry": Door(("server.tracing",), one_module=True),
    "prometheus_client": Door(("server",), one_module=True),
    "rich": Door(("cli", "bench", "validation", "engine.progress_bars")),
}


class Import(NamedTuple):
    """One import: who, what (a full module name), where."""

    module: str
    target: str
    line: int

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.module}:{self.line} imports {self.target}"

    @property
    def top(self) -> str:
        """The top-level name of what is imported."""
        return self.target.split(".")[0]


def read_sources(root: Path) -> dict[str, str]:
    """All modules of the package below `root`."""
    sources = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return sources


def part_of(module: str) -> str | None:
    """The row entry that a module of the package belongs to; None for the package's own `__init__`."""
    return module.split(".")[1] if "." in module else None


def front_door(sources: Mapping[str, str]) -> Mapping[str, str]:
    """The public names that `cascade_llm/__init__.py` imports on first use, and the modules they come from."""
    for node in ast.parse(sources.get(PACKAGE, "")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "_HOMES" for t in node.targets):
            return dict(ast.literal_eval(node.value))
    return {}


def imports_of(sources: Mapping[str, str]) -> list[Import]:
    """Every absolute import in the sources."""
    homes = front_door(sources)
    found = []
    for module, source in sources.items():
        for node in _importing(source):
            found.extend(Import(module, target, node.lineno) for target in _targets(node, sources, homes))
    return found


@functools.cache
def _importing(source: str) -> tuple[ast.AST, ...]:
    """What may import, of a source; all rules ask for that of the same ones."""
    kinds = ast.Import | ast.ImportFrom | ast.Call
    return tuple(node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))


def _targets(node: ast.AST, sources: Mapping[str, str], homes: Mapping[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            if node.module == PACKAGE and alias.name in homes:
                yield homes[alias.name]
            else:
                yield full if full in sources else str(node.module)
    elif isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        name = node.args[0] if called in ("import_module", "__import__") and node.args else None
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            yield name.value


def relative_imports(sources: Mapping[str, str]) -> list[str]:
    """Imports that do not say the whole name of the module."""
    return [
        f"{module}:{node.lineno} imports relatively: write the whole name"
        for module, source in sources.items()
        for node in _importing(source)
        if isinstance(node, ast.ImportFrom) and node.level
    ]


def unplaced_modules(sources: Mapping[str, str]) -> list[str]:
    """Modules that belong to no row."""
    return [f"{module} is in no row of LAYERS" for module in sources if part_of(module) not in (None, *ROW)]


def imports_not_downward(sources: Mapping[str, str]) -> list[str]:
    """Imports that go up or across; the front door names what it re-exports and is above every row."""
    broken = []
    for item in imports_of(sources):
        own, other = part_of(item.module), part_of(item.target)
        if item.top != PACKAGE or own not in ROW or other not in ROW or own == other:
            continue
        if own in BOTTOM and other in BOTTOM:
            continue
        if ROW[other] <= ROW[own]:
            broken.append(f"{item.where}: {'across' if ROW[other] == ROW[own] else 'up'}")
    return broken


def import_cycles(sources: Mapping[str, str]) -> list[str]:
    """A cycle among the modules, if there is one."""
    graph: dict[str, set[str]] = {module: set() for module in sources}
    for item in imports_of(sources):
        # the front door imports on first use: what it names is no edge, and neither is asking it for the version
        if item.target in graph and item.module != PACKAGE:
            graph[item.module].add(item.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def third_party_imports(sources: Mapping[str, str]) -> list[Import]:
    """Imports of neither this package nor the standard library."""
    return [item for item in imports_of(sources) if item.top not in (PACKAGE, *sys.stdlib_module_names)]


def packages_not_allowed(sources: Mapping[str, str]) -> list[str]:
    """Third-party packages in the bottom row (none allowed) and in the scheduler (xxhash alone)."""
    allowed: dict[str, set[str]] = {part: set() for part in BOTTOM} | {"scheduler": {"xxhash"}}
    return [
        f"{item.where}: {part} may not"
        for item in third_party_imports(sources)
        if (part := part_of(item.module)) in allowed and item.top not in allowed[part]
    ]


def scheduler_reaches_too_far(sources: Mapping[str, str]) -> list[str]:
    """Modules that the scheduler imports although they are neither its own nor of the bottom row."""
    return [
        item.where
        for item in imports_of(sources)
        if part_of(item.module) == "scheduler"
        and item.top == PACKAGE
        and part_of(item.target) not in (None, "scheduler", *BOTTOM)
    ]


def closed_doors(sources: Mapping[str, str], doors: Mapping[str, Door] = DOORS) -> list[str]:
    """Imports of a package that has a door, elsewhere than through it."""
    broken = []
    users: dict[str, set[str]] = {name: set() for name in doors}
    for item in third_party_imports(sources):
        if item.top not in doors:
            continue
        users[item.top].add(item.module)
        places = [f"{PACKAGE}.{place}" for place in doors[item.top].places]
        if not any(item.module == place or item.module.startswith(f"{place}.") for place in places):
            broken.append(f"{item.where}: only {', '.join(places)} may")
    for name, modules in users.items():
        if doors[name].one_module and len(modules) > 1:
            broken.append(f"{name} is imported by {', '.join(sorted(modules))}: one module alone may")
    return broken


def undeclared_packages(sources: Mapping[str, str], pyproject: str) -> list[str]:
    """Third-party packages that pyproject.toml names neither as a dependency nor in an extra."""
    project = tomllib.loads(pyproject)["project"]
    extras = project.get("optional-dependencies", {}).values()
    requirements = [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]
    declared = {re.split(r"[^A-Za-z0-9._-]", requirement)[0].replace("-", "_").lower() for requirement in requirements}
    declared |= {module for module, name in (("zmq", "pyzmq"), ("yaml", "pyyaml")) if name in declared}
    declared |= {"opentelemetry"} if "opentelemetry_sdk" in declared else set()
    declared |= {"flashinfer"} if "flashinfer_python" in declared else set()
    return [item.where for item in third_party_imports(sources) if item.top.lower() not in declared]


def layers_in(markdown: str) -> tuple[tuple[str, ...], ...]:
    """The rows of the code block after the mark `<!-- layers -->`."""
    block = markdown.split("<!-- layers")[1].split("```")[1]
    rows = (re.findall(r"[a-z_]+", line.split("#")[0]) for line in block.splitlines()[1:])
    return tuple(tuple(row) for row in rows if row)

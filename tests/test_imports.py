"""Who may import whom. Each rule is applied to the package, and shown to fail on a made-up source."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests import import_rules as rules


@pytest.fixture(scope="module")
def sources(repo_root: Path) -> dict[str, str]:
    return rules.read_sources(repo_root)


RULES = [
    rules.relative_imports,
    rules.unplaced_modules,
    rules.imports_not_downward,
    rules.import_cycles,
    rules.packages_not_allowed,
    rules.scheduler_reaches_too_far,
    rules.closed_doors,
]

Rule = Callable[[Mapping[str, str]], list[str]]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps(rule: Rule, sources: dict[str, str]) -> None:
    assert rule(sources) == []


def test_package_imports_only_what_it_declares(sources: dict[str, str], repo_root: Path) -> None:
    assert rules.undeclared_packages(sources, (repo_root / "pyproject.toml").read_text()) == []


def test_sources_are_all_there(sources: dict[str, str]) -> None:
    assert {"cascade_llm", "cascade_llm.plan", "cascade_llm.attention.backend"} <= sources.keys()
    found = {(item.module, item.target) for item in rules.imports_of(sources)}
    assert ("cascade_llm.attention.backend", "torch") in found
    assert ("cascade_llm.attention.backend", "cascade_llm.plan") in found
    assert ("cascade_llm", "cascade_llm.llm") in found, "imports under TYPE_CHECKING count"


def test_the_architecture_page_draws_these_layers(repo_root: Path) -> None:
    assert rules.layers_in((repo_root / "claude_docs" / "architecture.md").read_text()) == rules.LAYERS


BROKEN: list[tuple[Rule, dict[str, str], str]] = [
    (rules.relative_imports, {"cascade_llm.engine.step": "from .loop import run"}, "relatively"),
    (rules.relative_imports, {"cascade_llm.engine.step": "from . import loop"}, "relatively"),
    (rules.unplaced_modules, {"cascade_llm.utils.misc": ""}, "cascade_llm.utils.misc"),
    (rules.imports_not_downward, {"cascade_llm.layers.norm": "from cascade_llm.models import decoder"}, "up"),
    (rules.imports_not_downward, {"cascade_llm.layers.norm": "import cascade_llm.models.decoder"}, "up"),
    (rules.imports_not_downward, {"cascade_llm.plan": "from cascade_llm.kv_cache.pages import x"}, "up"),
    (rules.imports_not_downward, {"cascade_llm.scheduler.queue": "from cascade_llm.worker import batch"}, "across"),
    (rules.imports_not_downward, {"cascade_llm.bench.run": "from cascade_llm.server.http import app"}, "across"),
    (rules.imports_not_downward, {"cascade_llm.worker.run": "def f():\n from cascade_llm.engine.step import x"}, ":2 "),
    (
        rules.imports_not_downward,
        {"cascade_llm.kv_cache.pages": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n import cascade_llm.llm"},
        "up",
    ),
    (
        rules.imports_not_downward,
        {"cascade_llm": "_HOMES = {'LLM': 'cascade_llm.llm'}", "cascade_llm.worker.run": "from cascade_llm import LLM"},
        "imports cascade_llm.llm",
    ),
    (
        rules.imports_not_downward,
        {"cascade_llm.cli": "", "cascade_llm.plan": "from cascade_llm import cli"},
        "imports cascade_llm.cli",
    ),
    (
        rules.import_cycles,
        {"cascade_llm.plan": "import cascade_llm.outputs", "cascade_llm.outputs": "import cascade_llm.plan"},
        "cascade_llm.plan",
    ),
    (
        rules.import_cycles,
        {
            "cascade_llm.attention": "from cascade_llm.attention.a import A",
            "cascade_llm.attention.a": "def f():\n from cascade_llm.attention import b",
            "cascade_llm.attention.b": "from cascade_llm.attention import A",
        },
        "cascade_llm.attention.b",
    ),
    (rules.packages_not_allowed, {"cascade_llm.plan": "import numpy as np"}, "plan may not"),
    (rules.packages_not_allowed, {"cascade_llm.errors": "def f():\n import torch.cuda"}, "errors may not"),
    (rules.packages_not_allowed, {"cascade_llm.scheduler.tree": "import numpy"}, "scheduler may not"),
    (rules.packages_not_allowed, {"cascade_llm.scheduler.tree": "from torch import Tensor"}, "scheduler may not"),
    (rules.scheduler_reaches_too_far, {"cascade_llm.scheduler.tree": "import cascade_llm.kv_cache.pages"}, "kv_cache"),
    (rules.closed_doors, {"cascade_llm.models.llama": "from transformers import AutoConfig"}, "engine.tokenizer"),
    (rules.closed_doors, {"cascade_llm.engine.tokenizer_x": "import transformers"}, "engine.tokenizer"),
    (rules.closed_doors, {"cascade_llm.engine.step": "import huggingface_hub.utils"}, "cascade_llm.loader"),
    (
        rules.closed_doors,
        {"cascade_llm.worker.run": "import importlib\nx = importlib.import_module('flashinfer.norm')"},
        "cascade_llm.attention",
    ),
    (
        rules.closed_doors,
        {"cascade_llm.attention.a": "import flashinfer", "cascade_llm.attention.b": "import flashinfer.norm"},
        "one module alone",
    ),
    (
        rules.closed_doors,
        {
            "cascade_llm.bench.a": "import matplotlib.pyplot",
            "cascade_llm.validation.b": "from matplotlib import pyplot",
        },
        "one module alone",
    ),
]


@pytest.mark.parametrize(("rule", "made_up", "words"), BROKEN)
def test_rule_can_fail(rule: Rule, made_up: dict[str, str], words: str) -> None:
    broken = rule(made_up)
    assert len(broken) == 1
    assert words in broken[0]


def test_declaration_rule_can_fail() -> None:
    pyproject = '[project]\ndependencies = ["torch>=2"]\noptional-dependencies = { cuda = ["flashinfer-python==1"] }'
    made_up = {"cascade_llm.worker.run": "import json, torch, flashinfer, scipy.linalg"}
    assert rules.undeclared_packages(made_up, pyproject) == ["cascade_llm.worker.run:1 imports scipy.linalg"]
    beside = {"cascade_llm.bench.run": "from benchmarks import goals"}
    assert rules.undeclared_packages(beside, pyproject) == ["cascade_llm.bench.run:1 imports benchmarks"]


def test_rules_pass_a_good_source() -> None:
    good = {
        "cascade_llm": "_HOMES = {'LLM': 'cascade_llm.llm'}",
        "cascade_llm.errors": "import difflib",
        "cascade_llm.plan": "from array import array\nfrom cascade_llm.errors import PlanError",
        "cascade_llm.scheduler.tree": "import xxhash\nfrom cascade_llm import plan, __version__",
        "cascade_llm.attention.kernels": "import flashinfer.norm\nfrom cascade_llm.plan import CascadePlan",
        "cascade_llm.llm": "from cascade_llm.scheduler.tree import Tree",
    }
    assert {rule.__name__: rule(good) for rule in RULES} == {rule.__name__: [] for rule in RULES}


def packages_loaded_by(names: list[str], run_python: Callable[[str], str]) -> set[str]:
    """The top-level names, the standard library's left out, that importing these modules brings into an interpreter."""
    imports = "".join(f"import {name}\n" for name in names)
    printed = run_python(
        f"import sys, json\nbefore = set(sys.modules)\n{imports}print(json.dumps([*sys.modules.keys() - before]))"
    )
    return {name.split(".")[0] for name in json.loads(printed)} - sys.stdlib_module_names


def test_importing_the_package_loads_nothing_else(run_python: Callable[[str], str]) -> None:
    assert packages_loaded_by(["cascade_llm"], run_python) == {"cascade_llm"}


def test_importing_the_bottom_row_loads_the_standard_library_alone(
    sources: dict[str, str], run_python: Callable[[str], str]
) -> None:
    names = [name for name in sources if rules.part_of(name) in rules.BOTTOM]
    assert names
    assert packages_loaded_by(names, run_python) == {"cascade_llm"}


def test_importing_the_scheduler_loads_neither_torch_nor_numpy(
    sources: dict[str, str], run_python: Callable[[str], str]
) -> None:
    names = [name for name in sources if rules.part_of(name) == "scheduler"]
    assert names
    loaded = packages_loaded_by(names, run_python)
    assert loaded <= {"cascade_llm", "xxhash"}
    assert not loaded & {"torch", "numpy"}


def test_the_loaded_packages_are_seen(run_python: Callable[[str], str]) -> None:
    assert "numpy" in packages_loaded_by(["numpy"], run_python), "else the three tests above prove nothing"

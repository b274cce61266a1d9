"""How large the code is, and how much of it one `generate` runs: a table for a checkout.

    python scripts/house_table.py [CHECKOUT] [--json]

Counts lines of every `.py` file, comments and docstrings among them. "Executed" are the modules of the package of which
one `LLM.generate` on the CPU enters at least a function, model and tokenizer being loaded before; two prompts with a
shared prefix, one sampled.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "cascade_llm"

TRACED = """
import json, sys, threading
from pathlib import Path
from cascade_llm import LLM, SamplingParams
import cascade_llm
root = str(Path(cascade_llm.__file__).parent)
seen = set()
def note(frame, event, argument):
    if event == "call" and frame.f_code.co_filename.startswith(root) and frame.f_code.co_name != "<module>":
        seen.add(frame.f_code.co_filename)
with LLM("smollm2", max_model_len=1024, max_num_seqs=8, device="cpu") as llm:
    shared = list(range(100, 420))
    params = [SamplingParams(max_tokens=8, temperature=0), SamplingParams(max_tokens=8, temperature=0.8, seed=1)]
    sys.setprofile(note)
    threading.setprofile(note)
    llm.generate([shared + [5, 6], shared + [7, 8]], params)
    sys.setprofile(None)
print(json.dumps(sorted(str(Path(name).relative_to(Path(root).parent)) for name in seen)))
"""


def num_lines(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def executed_modules(checkout: Path) -> list[str]:
    """The files, relative to the checkout, that one `generate` runs."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TRACED], capture_output=True, text=True, env=environment, cwd=checkout, check=True
    )
    names: list[str] = json.loads(done.stdout.splitlines()[-1])
    return names


def functions(trees: dict[Path, ast.Module]) -> Iterator[tuple[int, str]]:
    """(lines, where) of every function, its docstring counted."""
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield (node.end_lineno or 0) - node.lineno + 1, f"{path}:{node.name}"


def importers(trees: dict[Path, ast.Module]) -> dict[str, set[Path]]:
    """Which files import each module of the package."""
    modules = {module_name(path): path for path in trees}
    found: dict[str, set[Path]] = {name: set() for name in modules}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                if name in found:
                    found[name].add(path)
    return found


def module_name(path: Path) -> str:
    """cascade_llm/engine/engine.py -> cascade_llm.engine.engine"""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def states_shapes(trees: dict[Path, ast.Module]) -> tuple[int, int]:
    """Public functions that take or give tensors, and those of them whose docstring has a shape in brackets."""
    total = stated = 0
    for tree in trees.values():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            arguments = node.args
            annotations = [a.annotation for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            text = " ".join(ast.unparse(a) for a in (*annotations, node.returns) if a is not None)
            doc = ast.get_docstring(node) or ""
            if "torch.Tensor" in text:
                total += 1
                stated += "[" in doc or doc.startswith("See `")
    return total, stated


def house_table(checkout: Path) -> dict[str, object]:
    """All figures of a checkout."""
    paths = [path.relative_to(checkout) for path in sorted((checkout / PACKAGE).rglob("*.py"))]
    trees = {path: ast.parse((checkout / path).read_text(encoding="utf-8")) for path in paths}
    lines = {path: num_lines(checkout / path) for path in paths}
    ran = executed_modules(checkout)
    sizes = sorted(functions(trees))
    tensor_functions, stated = states_shapes(trees)

    def lines_below(folder: str) -> int:
        return sum(num_lines(path) for path in (checkout / folder).rglob("*.py"))

    return {
        "modules that one generate executes": len(ran),
        "lines of these": sum(lines[Path(name)] for name in ran),
        "modules with one importer": sum(
            len(who) == 1 for name, who in importers(trees).items() if not name.endswith("__init__")
        ),
        "modules of the package": len([path for path in paths if path.name != "__init__.py"]),
        "lines of the package": sum(lines.values()),
        "lines of cascade_llm/bench": lines_below("cascade_llm/bench"),
        "lines of cascade_llm/cli": lines_below("cascade_llm/cli"),
        "lines of benchmarks": lines_below("benchmarks"),
        "lines of tests": lines_below("tests"),
        "median lines of a function": statistics.median(size for size, _ in sizes),
        "longest function": f"{sizes[-1][0]} ({sizes[-1][1]})",
        "public tensor functions whose docstrings give shapes": f"{stated} of {tensor_functions} "
        f"({stated / tensor_functions:.0%})",
        "executed": {name: lines[Path(name)] for name in ran},
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    table = house_table(arguments.checkout.resolve())
    if arguments.json:
        print(json.dumps(table, indent=1))
        return
    executed = table.pop("executed")
    assert isinstance(executed, dict)
    for name, value in table.items():
        print(f"{name:55} {value}")
    for name, count in executed.items():
        print(f"  {count:5} {name}")


if __name__ == "__main__":
    main()

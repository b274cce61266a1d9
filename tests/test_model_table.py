"""The README's table of models is the registry's own, and every cell of it has a test."""

from __future__ import annotations

import re
from pathlib import Path

from cascade_llm.engine.architecture_support import architecture_support, markdown_table
from tests.engine.test_family_formats import CELLS, FORMATS, OF_EXPERTS, has_experts
from tests.models.families import FAMILIES
from tests.models.test_ranks import PLAIN, SHARED


def test_the_readme_s_table_is_that_of_the_registry(repo_root: Path) -> None:
    readme = (repo_root / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"<!-- models: [^\n]* -->\n\n(.*?)\n\n", readme, re.DOTALL)
    assert table == markdown_table(), f"paste this into README.md:\n\n{markdown_table()}"


def test_every_cell_has_a_case() -> None:
    tested = {tuple(cell.values) for cell in CELLS}
    ranked = {architecture for _, architecture, _ in (*SHARED, *PLAIN)}
    for row in architecture_support():
        assert row.name in FAMILIES
        assert row.name in ranked
        kinds = {"in situ": True, "GGUF": row.gguf is not None, "safetensors": row.name != "gpt_oss"}
        needed = [name for name in FORMATS if any(name.startswith(kind) and kinds[kind] for kind in kinds)]
        needed = [name for name in needed if name not in OF_EXPERTS or has_experts(row.name)]
        assert {(row.name, name) for name in needed} <= tested

"""What a captured decode step launches, by name: one kernel more in a layer is noticed here.

The list is in claude_docs/flashinfer_cascade_spec.md too. A run of a FlashInfer wrapper counts as one; where it splits
K/V, a kernel that merges the parts belongs to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cascade_llm.sampling.lanes import Needs
from cascade_llm.worker.graph_sampling import CHOICES
from cascade_llm.worker.graph_shapes import GraphShape
from tests.engine.tiny_llm import save_tiny
from tests.gpu_path.gpu_engine import SHAPE, double_gpu, gpu_llm, graphs_of

ROWS = 16
BEFORE = ["aten.index_select", "aten.maximum", "aten.embedding", "aten.index_select"]
"""The token of lane or host, its embedding, the rotations of the rows' positions."""
HEAD = ["aten.mm"]
PROJECTED = ["aten.linear"]
NORMS_OF_HEADS = ["rmsnorm", "rmsnorm"]
WRITTEN = ["apply_rope_with_cos_sin_cache_inplace", "append_paged_kv_cache"]
SHARED = ["PrefillWrapper.run", "merge_state_in_place"]
REST = ["aten.linear", "fused_add_rmsnorm", "aten.linear", "silu_and_mul", "aten.linear"]


def save(folder: Path, architecture: str, num_layers: int, **changes: Any) -> Path:
    return save_tiny(folder, architecture, **{**SHAPE, "num_hidden_layers": num_layers, **changes})


def forward_launches(folder: Path, *capacities: tuple[int, ...], **options: Any) -> list[list[str]]:
    """Of the graph of each of these capacities."""
    with gpu_llm(folder, double_gpu(exact=False), dtype="bfloat16", max_num_seqs=ROWS, **options) as llm:
        shapes = graphs_of(llm)._shapes
        forwards: list[Any] = [shapes[GraphShape(ROWS, each)].forward for each in capacities]
        return [[name.removeprefix("FlashInferDouble.") for name in forward.launches] for forward in forwards]


def layer_launches(first: bool, extra: list[str], num_shared: int, leaf: str = "DecodeWrapper.run") -> list[str]:
    norm = ["rmsnorm"] if first else ["fused_add_rmsnorm"]
    return norm + PROJECTED + extra + WRITTEN + [leaf] + SHARED * num_shared + REST


@pytest.mark.parametrize(("architecture", "extra"), [("qwen3", NORMS_OF_HEADS), ("llama", []), ("qwen2", [])])
def test_of_a_forward_pass(tmp_path: Path, architecture: str, extra: list[str]) -> None:
    graphs: list[tuple[int, ...]] = [(), (2,), (8, 8)]
    found = forward_launches(save(tmp_path, architecture, 2), *graphs)
    for capacities, launches in zip(graphs, found, strict=True):
        layers = [layer_launches(first, extra, len(capacities)) for first in (True, False)]
        assert launches == [*BEFORE, *layers[0], *layers[1], "fused_add_rmsnorm", *HEAD], capacities


def test_of_a_layer_of_qwen3(tmp_path: Path) -> None:
    graphs = {(): 12, (2,): 14, (8, 8): 16}
    one, three = (forward_launches(save(tmp_path / str(layers), "qwen3", layers), *graphs) for layers in (1, 3))
    assert [(len(b) - len(a)) / 2 for a, b in zip(one, three, strict=True)] == list(graphs.values())


def test_of_8_bit_pages(tmp_path: Path) -> None:
    """Without scales: K and V are clamped and converted before they are appended."""
    folder = save(tmp_path, "llama", 1, head_dim=128)
    (found,) = forward_launches(folder, (), kv_cache_dtype="fp8_e4m3")
    layer = layer_launches(True, [], 0)
    append = layer.index("append_paged_kv_cache")
    encoded = [*layer[:append], *["aten.clamp", "aten.to"] * 2, *layer[append:]]
    assert found == [*BEFORE, *encoded, "fused_add_rmsnorm", *HEAD]


def test_of_sampling(tmp_path: Path) -> None:
    """Once a step, however many layers it has."""
    with gpu_llm(save(tmp_path, "qwen3", 1), double_gpu(exact=False), dtype="bfloat16", max_num_seqs=ROWS) as llm:
        sampling = graphs_of(llm)._sampling
        with llm._engine.executor.runner._running():
            for needs in (CHOICES[3], Needs.REPORT):
                sampling._capture_late(ROWS, needs)
        graphs: list[Any] = [sampling._graphs[ROWS, needs] for needs in (*CHOICES, Needs.REPORT)]
    assert [len(graph.launches) for graph in graphs] == [8, 71, 114, 143, 45]

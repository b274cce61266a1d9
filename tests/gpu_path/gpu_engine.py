"""The real `LLM` on a GPU made of doubles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cascade_llm import LLM, SamplingParams
from cascade_llm.worker.cuda_graphs import CudaGraphs
from tests.doubles.flashinfer import FlashInferDouble
from tests.engine.tiny_llm import tiny_llm
from tests.gpu_path.double_gpu import double_gpu, on_double
from tests.gpu_path.published_pages import watch_published_pages

__all__ = ["OPTIONS", "PARAMS", "PROMPTS", "SHAPE", "double_gpu", "gpu_llm", "graphs_of", "on_double"]

SHAPE = {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
"""Of a tiny model that FlashInfer's kernels would serve."""

FAMILIES = [[3 + (i * step) % 80 for i in range(64)] for step in (1, 7)]
PROMPTS = [[*FAMILIES[i % 2], *(5 + (7 * i + j) % 80 for j in range(120 + i))] for i in range(6)]
PROMPTS += [[*FAMILIES[0][:40], 50 + i] for i in range(2)] + [[60 - i for i in range(9)]]
PARAMS = [SamplingParams(temperature=0, max_tokens=6 + 3 * i, ignore_eos=True) for i in range(len(PROMPTS))]
"""Some sequences grow past 128 tokens of their own, where kernels begin to split K/V."""
OPTIONS: dict[str, Any] = {"page_size": 4, "cascade_shared_prefix_len": 32, "max_num_seqs": 10}


def gpu_llm(folder: Path, double: FlashInferDouble, **options: Any) -> LLM:
    """An engine on the double; plans are not checked, since `debug` does without graphs, but every append is."""
    with on_double(double):
        llm = tiny_llm(folder, **{"debug": False, "schedule_lag": 1, **options})
    watch_published_pages(llm, double)
    return llm


def graphs_of(llm: LLM) -> CudaGraphs:
    """The captured graphs of an engine."""
    graphs = llm._engine.executor.runner.graphs
    assert graphs is not None
    return graphs

"""The memory that a start takes beside what it keeps: a checkpoint of 1 GB in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.slow

HIDDEN, INNER, LAYERS, VOCABULARY = 1024, 4096, 28, 32000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
PEAK, CONSTANT = 1.2, 64 << 20
"""Peak growth allowed: a multiple of the file and a constant, for the pool and what Python imports late."""

SCRIPT = """
from pathlib import Path
from cascade_llm import LLM

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

import cascade_llm.llm, torch, transformers
before = peak()
llm = LLM({folder!r}, kv_cache_bytes=64 << 20, max_num_seqs=4, dtype="bfloat16", num_threads=1)
print(peak() - before)
"""


def shapes() -> dict[str, tuple[int, ...]]:
    ends = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    layer = {
        **dict.fromkeys((f"self_attn.{part}_proj" for part in "qkvo"), (HIDDEN, HIDDEN)),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (INNER, HIDDEN)),
        "mlp.down_proj": (HIDDEN, INNER),
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (HIDDEN,)),
    }
    layers = {f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in layer.items()}
    return {**ends, "model.norm.weight": (HIDDEN,), **layers}


def save(folder: Path, num_shards: int) -> int:
    """Random weights; returns their bytes."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names, total, weight_map = list(shapes()), 0, {}
    for shard in range(num_shards):
        tensors = {name: (torch.randn(shapes()[name]) * 0.02).bfloat16() for name in names[shard::num_shards]}
        file = "model.safetensors" if num_shards == 1 else f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file(tensors, folder / file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        weight_map.update(dict.fromkeys(tensors, file))
    if num_shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


@pytest.mark.parametrize("num_shards", [1, 4])
def test_a_start_never_needs_twice_the_checkpoint(
    tmp_path: Path, num_shards: int, run_python: Callable[[str], str]
) -> None:
    num_bytes = save(tmp_path, num_shards)
    assert num_bytes > 1e9
    grown = int(run_python(SCRIPT.format(folder=str(tmp_path))))
    assert 0.9 * num_bytes < grown < PEAK * num_bytes + CONSTANT


@pytest.mark.parametrize(("quantization", "share"), [("int4", 5 / 16), ("q8_0", 8.5 / 16)])
def test_weights_that_are_rounded_while_loading_never_stand_dense(
    tmp_path: Path, quantization: str, share: float, run_python: Callable[[str], str]
) -> None:
    """The layers' parts lie in several shards, so that many matrices wait for their last part."""
    num_bytes = save(tmp_path, 4)
    script = SCRIPT.replace("num_threads=1", f"num_threads=1, quantization={quantization!r}")
    head_share, head_bytes = 8.5 / 16, 2 * VOCABULARY * HIDDEN * 2
    kept = share * (num_bytes - head_bytes) + head_share * head_bytes
    assert int(run_python(script.format(folder=str(tmp_path)))) < PEAK * kept + CONSTANT

"""Model shapes, and how much is run; `python -m scripts.gpu_suite.sizes FOLDER` writes the shapes' configurations."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DRY", "FULL", "MODELS", "PAGE_SIZE", "QUICK", "SMALL_MODELS", "ModelShape", "Sizes", "decode_floor_s"]

PAGE_SIZE = 16


@dataclass(frozen=True)
class ModelShape:
    """A Qwen3 configuration."""

    name: str
    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    ffn: int
    vocab: int

    def write(self, folder: Path) -> Path:
        """Write its config.json into a folder of its own; returns the folder."""
        own = folder / self.name
        own.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_qo_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "attention_bias": False,
            "hidden_act": "silu",
        }
        (own / "config.json").write_text(json.dumps(config))
        return own

    @property
    def weight_bytes(self) -> int:
        """In 16 bits, the embedding counted."""
        heads = 2 * (self.num_qo_heads + self.num_kv_heads)
        layer = self.hidden * (heads * self.head_dim + 3 * self.ffn)
        return 2 * (self.num_layers * layer + 2 * self.hidden * self.vocab)

    @property
    def kv_bytes_per_token(self) -> int:
        """In 16 bits, over all layers."""
        return 4 * self.num_layers * self.num_kv_heads * self.head_dim


MODELS = (
    ModelShape("qwen3-0.6b", 28, 16, 8, 128, 1024, 3072, 151936),
    ModelShape("qwen3-8b", 36, 32, 8, 128, 4096, 12288, 151936),
)
SMALL_MODELS = (
    ModelShape("gqa-128", 2, 8, 2, 128, 256, 512, 512),
    ModelShape("mha-64", 2, 8, 8, 64, 256, 512, 512),
    ModelShape("gqa-64", 2, 16, 4, 64, 256, 512, 512),
    ModelShape("mha-128", 2, 4, 4, 128, 256, 512, 512),
)
"""Both leaf kernels, both head sizes."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is run."""

    copy_bytes: int = 2 << 30
    matrix_size: int = 8192
    small_models: tuple[ModelShape, ...] = SMALL_MODELS
    families: int = 4
    """Groups of requests that share a prefix, where correctness is looked at."""
    per_family: int = 16
    prefix_pages: int = 6
    """Of what a family shares."""
    longest: int = 56
    """Tokens that such a request generates at most."""
    longest_equal: int = 56
    """The same where ways of running are compared."""
    least_rows: int = 33
    """Of the widest decode step: from here on no leaf's K/V is split, on 132 processors and 8 KV heads."""
    models: tuple[ModelShape, ...] = MODELS
    loads: tuple[tuple[int, int], ...] = ((0, 1), (8192, 1), (1024, 64), (8192, 64), (8192, 256))
    """(shared prefix, sequences) of timed decode steps."""
    own_len: int = 256
    """Tokens that each sequence has beyond the prefix before it is timed."""
    decode_steps: int = 128
    cases: tuple[str, ...] = (
        *("1/2048", "16/1024", "64/512", "256/512", "256/2048"),
        *(f"1,{rows}/{prefix},256" for rows in (4, 16, 64, 256) for prefix in (256, 1024, 4096, 16384)),
        *("4,64/1024,256", "16,256/1024,256", "1,8,64/4096,512,256", "1,16,256/8192,1024,256"),
    )
    """Trees of K/V whose attention is timed: nodes of each level / tokens of each."""
    attention_heads: tuple[tuple[int, int, int], ...] = ((32, 8, 128), (16, 8, 128))
    """(query heads, KV heads, head size)"""
    matrices: tuple[tuple[int, int], ...] = ((6144, 4096), (4096, 12288))
    """(outputs, inputs) of quantized products."""
    product_rows: tuple[int, ...] = (1, 16, 64, 256, 2048)
    """Of such a product."""
    experts: tuple[int, int, int, int] = (2048, 768, 128, 8)
    """Hidden size, outputs of an expert's gate, experts, experts of a row: Qwen3-30B-A3B's."""
    exchanged: tuple[int, ...] = (4096, 64 * 4096, 2048 * 4096)
    """Numbers of a sum over ranks: rows of a hidden size."""
    load_requests: int = 256
    load_range: tuple[int, int] = (100, 1024)


FULL = Sizes()
QUICK = Sizes(
    small_models=SMALL_MODELS[:2],
    models=MODELS[:1],
    loads=((0, 1), (8192, 64)),
    cases=("16/1024", "64/512", "1,16/1024,256", "1,64/1024,256", "1,64/4096,256", "4,64/1024,256"),
    attention_heads=((32, 8, 128),),
    matrices=((6144, 4096),),
    load_requests=64,
)
TINY_MODEL = ModelShape("tiny", 1, 2, 1, 64, 64, 64, 128)
DRY = Sizes(
    copy_bytes=1 << 16,
    matrix_size=32,
    small_models=(ModelShape("gqa-64", 1, 4, 2, 64, 64, 64, 96), ModelShape("mha-128", 1, 2, 2, 128, 64, 64, 96)),
    families=3,
    per_family=6,
    prefix_pages=2,
    longest=40,
    longest_equal=12,
    least_rows=5,
    models=(TINY_MODEL,),
    loads=((32, 3),),
    own_len=8,
    decode_steps=8,
    cases=("4/64", "1,4/64,16", "1,2,8/64,32,16"),
    attention_heads=((4, 2, 64),),
    matrices=((48, 256),),
    product_rows=(1, 17),
    experts=(48, 16, 5, 2),
    exchanged=(64, 4096),
    load_requests=4,
    load_range=(4, 10),
)
"""For doubles."""


def decode_floor_s(
    shape: ModelShape, batch: int, prefix: int, own_len: int, bytes_per_s: float, flops_per_s: float
) -> float:
    """The floor of one decode step in 16 bits: linear layers, shared attention, suffix attention and head run one after
    another, each as fast as memory or arithmetic allows."""
    heads = shape.num_qo_heads + 2 * shape.num_kv_heads
    linear = shape.hidden * (heads + shape.num_qo_heads) * shape.head_dim + 3 * shape.hidden * shape.ffn
    kv_bytes = 2 * 2 * shape.num_kv_heads * shape.head_dim
    kv_flops = 4 * shape.num_qo_heads * shape.head_dim

    def part(num_bytes: float, flops: float) -> float:
        return max(num_bytes / bytes_per_s, flops / flops_per_s)

    layer = (
        part(2 * linear, 2 * linear * batch)
        + part(prefix * kv_bytes, prefix * batch * kv_flops)
        + part(batch * own_len * kv_bytes, batch * own_len * kv_flops)
    )
    head = shape.hidden * shape.vocab
    return shape.num_layers * layer + part(2 * head, 2 * head * batch)


if __name__ == "__main__":
    for model in (*MODELS, *SMALL_MODELS):
        print(model.write(Path(sys.argv[1])))

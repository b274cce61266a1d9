"""Model shapes, prefix trees and sizes that the suite measures with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from cascade_llm.plan import CascadeLevel, CascadePlan, int_column

__all__ = ["FULL", "HEADS", "MODELS", "TREES", "ModelShape", "Sizes", "Tree"]

PAGE_SIZE = 16


@dataclass(frozen=True)
class Tree:
    """A prefix tree as PAT (ASPLOS 2026) writes it: nodes per level, tokens per node; the last level are the leaves."""

    nodes: tuple[int, ...]
    tokens: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Tree:
        """From "1,4,256/32,256,32"."""
        nodes, tokens = (tuple(int(number) for number in part.split(",")) for part in text.split("/"))
        return cls(nodes, tokens)

    def __str__(self) -> str:
        return "/".join(",".join(map(str, part)) for part in (self.nodes, self.tokens))

    @property
    def rows(self) -> int:
        """Sequences: one row each."""
        return self.nodes[-1]

    @property
    def num_pages(self) -> int:
        """Pages of all nodes."""
        return sum(n * _pages(t) for n, t in zip(self.nodes, self.tokens, strict=True))

    def plan(self, num_shared: int | None = None) -> CascadePlan:
        """A level for each of the first `num_shared` levels of the tree (default all), the rest folded into leaves."""
        shared = len(self.nodes) - 1 if num_shared is None else min(num_shared, len(self.nodes) - 1)
        pages = self._node_pages()
        levels = []
        for depth in range(shared):
            rows = self.rows // self.nodes[depth]
            levels.append(_level([(rows, pages[depth][i], PAGE_SIZE) for i in range(self.nodes[depth])]))
        leaves = []
        for row in range(self.rows):
            own: list[int] = []
            for depth in range(shared, len(self.nodes)):
                own.extend(pages[depth][row * self.nodes[depth] // self.rows])
            leaves.append((1, own, (self.tokens[-1] - 1) % PAGE_SIZE + 1))
        return CascadePlan((*levels, _level(leaves)), PAGE_SIZE)

    def _node_pages(self) -> list[list[range]]:
        pages, begin = [], 0
        for count, tokens in zip(self.nodes, self.tokens, strict=True):
            size = _pages(tokens)
            pages.append([range(begin + i * size, begin + (i + 1) * size) for i in range(count)])
            begin += count * size
        return pages


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE_SIZE)


def _level(segments: list[Any]) -> CascadeLevel:
    return CascadeLevel(
        int_column(accumulate((rows for rows, _, _ in segments), initial=0)),
        int_column(accumulate((len(pages) for _, pages, _ in segments), initial=0)),
        int_column(page for _, pages, _ in segments for page in pages),
        int_column(last for _, _, last in segments),
    )


TREES = tuple(
    Tree.parse(text)
    for text in (
        "1,10/4096,416", "1,256/256,32", "1,1024/2048,32", "1,2,64/1024,256,256", "1,4,256/32,256,32",
        "1,8,512/32,512,256", "1,8,512/32,2048,256", "1,8,512/512,512,256", "1,4,8,256/32,256,256,32",
        "1,4,16,512/1024,256,128,32", "1,4,16,64,256,1024/256,32,256,64,32,256", "2,8,16,256/256,256,32,32",
        "4,16,256,512/512,32,128,32", "8,16,32,256/512,512,256,32", "256/1024", "256/4096",
    )
)  # fmt: skip
"""PAT's list; the last two share nothing."""

HEADS = ((32, 32), (16, 8), (32, 8), (64, 8))
"""(query heads, KV heads), of 128 dimensions."""


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
        """Write its config.json; returns the file."""
        folder.mkdir(parents=True, exist_ok=True)
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
        file = folder / "config.json"
        file.write_text(json.dumps(config))
        return file


MODELS = (
    ModelShape("qwen3-0.6b", 28, 16, 8, 128, 1024, 3072, 151936),
    ModelShape("qwen3-8b", 36, 32, 8, 128, 4096, 12288, 151936),
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured."""

    trees: tuple[Tree, ...] = TREES
    heads: tuple[tuple[int, int], ...] = HEADS
    head_dim: int = 128
    models: tuple[ModelShape, ...] = MODELS
    batches: tuple[int, ...] = (1, 8, 64, 128, 256)
    prefixes: tuple[int, ...] = (0, 1024, 8192, 32768)
    own_len: int = 256
    decode_steps: int = 24
    copy_bytes: int = 2 << 30
    matrix_size: int = 8192
    load_requests: int = 256
    load_range: tuple[int, int] = (100, 1024)


FULL = Sizes()

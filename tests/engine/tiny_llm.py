"""Small real models behind the real `LLM`, and what it means that two engines give equal tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cascade_llm import LLM, RequestOutput
from tests.models.checkpoints import tiny_model

CONTEXT = 256
TOLERANCE = 1e-4
"""Of a log-probability in float32, between two ways to compute it."""


def save_tiny(folder: Path, architecture: str = "llama", **changes: Any) -> Path:
    """A random checkpoint saved by transformers, without a tokenizer."""
    model = tiny_model(architecture, **{"max_position_embeddings": CONTEXT, **changes})
    model.save_pretrained(folder)
    return folder


def tiny_llm(folder: Path, **options: Any) -> LLM:
    """An engine on it: float32, a pool of its own size, every plan checked."""
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "page_size": 4,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "debug": True,
        "cascade_shared_prefix_len": 4,
    }
    return LLM(folder, **{**defaults, **options})


def assert_equal_outputs(ours: Sequence[RequestOutput], theirs: Sequence[RequestOutput]) -> int:
    """Tokens are equal, or at the first difference the two best log-probabilities are within twice the tolerance.

    Both sides were asked for two log-probabilities. Those of equal tokens are within the tolerance. Returns how many
    samples differed at a near-tie.
    """
    num_ties = 0
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine.outputs, other.outputs, strict=True):
            assert a.logprobs is not None
            assert b.logprobs is not None
            for x, y in zip(a.logprobs, b.logprobs, strict=False):
                if x.token_id != y.token_id:
                    (_, best), (_, second) = x.top
                    assert best - second < 2 * TOLERANCE, (mine.request_id, a.token_ids, b.token_ids)
                    num_ties += 1
                    break
                assert abs(x.logprob - y.logprob) < TOLERANCE
            else:
                assert a.token_ids == b.token_ids
                assert a.finish_reason == b.finish_reason
    return num_ties


def random_forest(seed: int, num_prompts: int, vocab_size: int, longest: int) -> list[list[int]]:
    """Prompts of which many share prefixes of several lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    prompts: list[list[int]] = [[draw(3, vocab_size) for _ in range(longest // 2)]]
    while len(prompts) < num_prompts:
        parent = prompts[draw(0, len(prompts))]
        kept = parent[: draw(1, len(parent) + 1)]
        own = [draw(3, vocab_size) for _ in range(draw(1, longest // 2))]
        prompts.append((kept + own)[:longest])
    return prompts

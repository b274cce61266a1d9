"""Decoders that share a model give the logits of one that has it all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.device.ranks import Ranks
from cascade_llm.device.torch_exchange import TorchExchange
from cascade_llm.errors import ConfigError
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.models.loading import init_dummy
from tests.models.checkpoints import Replay, decoder_of, empty_decoder, hf_config_of, tiny_model
from tests.models.families import FAMILIES
from tests.rank_threads import in_ranks

ROWS = [(0, position, 3 + 5 * position) for position in range(7)] + [(1, 0, 96), (1, 1, 50)]
SHARED: list[tuple[int, str, dict[str, Any]]] = [
    (2, "qwen2_moe", {}),
    (3, "llama", {"num_key_value_heads": 3, "vocab_size": 200, "tie_word_embeddings": True}),
    (3, "qwen2", {"num_key_value_heads": 1, "intermediate_size": 100}),
    (2, "llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "vocab_size": 5}),
    (3, "olmo2", {"num_key_value_heads": 1}),
    (3, "qwen3_moe", {"num_key_value_heads": 3, "mlp_only_layers": [2]}),
]
PLAIN: list[tuple[int, str, dict[str, Any]]] = [(2, architecture, {}) for architecture in FAMILIES]


@pytest.mark.parametrize(
    ("count", "architecture", "changes"), [*SHARED, *(pytest.param(*case, marks=pytest.mark.slow) for case in PLAIN)]
)
def test_logits_are_those_of_one_rank(count: int, architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(architecture, **changes)
    rows = [(sequence, position, token % model.config.vocab_size) for sequence, position, token in ROWS]
    expected = Replay(decoder_of(model)).step(rows)
    found = in_ranks(count, tmp_path, lambda ranks: Replay(decoder_of(model, ranks=ranks)).step(rows))
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)
    assert all(len(logits) == len(rows) for logits in found)


def test_each_rank_holds_its_share_alone(tmp_path: Path) -> None:
    model = tiny_model("llama", intermediate_size=128)
    whole = decoder_of(model)
    found = in_ranks(2, tmp_path, lambda ranks: decoder_of(model, ranks=ranks))
    for shared, held in zip(zip(*(decoder.linears for decoder in found), strict=True), whole.linears, strict=True):
        assert sum(linear.matrix.num_bytes for linear in shared) == held.matrix.num_bytes
        assert max(linear.matrix.num_bytes for linear in shared) <= 0.7 * held.matrix.num_bytes


def test_dummy_weights_are_the_same_model(tmp_path: Path) -> None:
    model = tiny_model("llama")

    def logits(ranks: Ranks) -> torch.Tensor:
        decoder = empty_decoder(model, ranks=ranks)
        init_dummy(decoder, seed=4)
        return Replay(decoder).step(ROWS)

    torch.testing.assert_close(in_ranks(2, tmp_path, logits)[0], logits(Ranks()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("heads", "count", "works"), [((9, 3), 2, "1, 3"), ((12, 4), 3, "1, 2, 4"), ((32, 8), 3, "1, 2, 4, 8")]
)
def test_heads_that_cannot_be_shared_are_refused(heads: tuple[int, int], count: int, works: str) -> None:
    fields = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 8}
    config = model_config_from_hf({**hf_config_of(tiny_model("llama")), **fields})
    with pytest.raises(ConfigError, match=f"over {count} ranks; this model takes {works}$"):
        AttentionSpec.for_model(config, torch.float32, torch.device("cpu"), ranks=Ranks(0, count, TorchExchange(None)))

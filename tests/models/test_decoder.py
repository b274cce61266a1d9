from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from cascade_llm.layers.fused_ops import TorchOps
from cascade_llm.models.decoder import FirstNonFinite
from cascade_llm.models.loading import init_dummy
from cascade_llm.weights.format import StoredTensor
from tests.models.checkpoints import TINY, Replay, decoder_of, empty_decoder, tiny_model
from tests.models.families import CASES, FAMILIES


def token_ids(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(TINY["vocab_size"]), k=length)


@torch.inference_mode()
def transformers_logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]), use_cache=False).logits[0]


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_whole_prompt_has_the_logits_of_transformers(name: str, plain: bool) -> None:
    architecture, changes = CASES[name]
    model = tiny_model(architecture, **changes)
    decoder = decoder_of(model, ops=TorchOps() if plain else None)
    ids = token_ids(40, seed=1)
    got = Replay(decoder).step([(0, position, token) for position, token in enumerate(ids)])
    assert_close(got, transformers_logits(model, ids))


@pytest.mark.parametrize("name", ["llama, llama3", "qwen2", "qwen3"])
def test_chunks_of_mixed_sequences_have_the_logits_of_each_alone(name: str) -> None:
    architecture, changes = CASES[name]
    model, rng = tiny_model(architecture, **changes), random.Random(3)
    replay = Replay(decoder_of(model))
    prompts = [token_ids(length, seed=length) for length in (23, 1, 40)]
    computed, logits = [0] * len(prompts), [torch.empty(0, TINY["vocab_size"])] * len(prompts)
    while any(done < len(prompt) for done, prompt in zip(computed, prompts, strict=True)):
        rows = []
        for sequence, prompt in enumerate(prompts):
            chunk = range(computed[sequence], min(len(prompt), computed[sequence] + rng.randint(1, 9)))
            rows.extend((sequence, position, prompt[position]) for position in chunk)
            computed[sequence] = max(computed[sequence], chunk.stop)
        for row, out in zip(rows, replay.step(rows), strict=True):
            logits[row[0]] = torch.cat((logits[row[0]], out[None]))
    for prompt, got in zip(prompts, logits, strict=True):
        assert_close(got, transformers_logits(model, prompt))


@torch.inference_mode()
def test_dynamic_rope_beyond_its_length_has_the_logits_of_decoding_token_by_token() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=12)
    replay, ids = Replay(decoder_of(model, max_positions=30)), token_ids(30, seed=5)
    got = replay.step([(0, position, token) for position, token in enumerate(ids)])
    cache, expected = None, []
    for token in ids:
        out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        expected.append(out.logits[0, 0])
    assert_close(got, torch.stack(expected))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", ["llama, tied", "llama, llama3", *FAMILIES])
def test_bfloat16_is_as_near_to_float32_as_transformers_is(name: str, plain: bool) -> None:
    architecture, changes = CASES[name]
    model, ids = tiny_model(architecture, **changes), token_ids(40, seed=2)
    exact = transformers_logits(model, ids)
    decoder = decoder_of(model, dtype=torch.bfloat16, ops=TorchOps() if plain else None)
    got = Replay(decoder).step([(0, position, token) for position, token in enumerate(ids)])
    assert got.dtype == torch.bfloat16
    theirs = transformers_logits(model.bfloat16(), ids)
    assert (got.float() - exact).norm() < 1.2 * (theirs.float() - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_tied_head_multiplies_with_the_rows_of_the_embedding(dtype: torch.dtype) -> None:
    decoder = decoder_of(tiny_model("llama", tie_word_embeddings=True), dtype=dtype)
    rows = decoder.embedding(torch.arange(TINY["vocab_size"]))
    hidden = torch.randn(3, TINY["hidden_size"]).to(dtype)
    torch.testing.assert_close(decoder.logits(hidden), hidden @ rows.T, rtol=1e-5, atol=1e-5)


def test_an_observer_sees_every_stage_and_finds_the_first_that_is_not_finite() -> None:
    decoder = decoder_of(tiny_model("llama"))
    replay, stages = Replay(decoder), []
    replay.attention.start_step([0, 1], [0, 0])
    rows = torch.tensor([3, 4]), torch.tensor([0, 0])
    decoder.forward(*rows, replay.attention, observer=lambda stage, _: stages.append(stage))
    assert stages == ["embedding", "layer 0", "layer 1", "layer 2", "final norm"]

    healthy = FirstNonFinite()
    decoder.forward(*rows, replay.attention, observer=healthy)
    assert healthy.stage is None

    broken_rows = torch.full((TINY["hidden_size"], TINY["intermediate_size"]), torch.nan)
    decoder.layers[1].mlp.down.load("down_proj", StoredTensor.plain(broken_rows))
    broken = FirstNonFinite()
    decoder.forward(*rows, replay.attention, observer=broken)
    assert broken.stage == "layer 1"
    assert broken.rows == (0, 1)


def test_a_broken_row_is_named() -> None:
    check = FirstNonFinite()
    check("embedding", torch.tensor([[1.0, 2.0], [1.0, float("inf")], [0.0, 0.0]]))
    check("layer 0", torch.full((3, 2), float("nan")))
    assert (check.stage, check.rows) == ("embedding", (1,))


def test_dummy_weights_give_finite_varied_logits_and_repeat_by_seed() -> None:
    model = tiny_model("qwen3", head_dim=16)

    def logits(seed: int) -> torch.Tensor:
        decoder = empty_decoder(model)
        init_dummy(decoder, seed)
        return Replay(decoder).step([(0, position, token) for position, token in enumerate(token_ids(8, seed=1))])

    first = logits(0)
    assert torch.isfinite(first).all()
    assert first.std() > 0.1
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first, logits(0))
    assert not torch.equal(first, logits(1))

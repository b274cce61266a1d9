from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from cascade_llm.errors import CheckpointError
from cascade_llm.models.decoder import Decoder
from cascade_llm.models.loading import init_dummy, load_weights
from cascade_llm.weights.format import StoredTensor
from cascade_llm.weights.linear import Embedding, Linear
from tests.models.checkpoints import empty_decoder, stored, tiny_model


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return dict(tiny_model("qwen2").state_dict())


@pytest.fixture
def decoder() -> Decoder:
    return empty_decoder(tiny_model("qwen2"))


def values_of(linear: Linear) -> torch.Tensor:
    """What a layer multiplies by, from its products: [out_features, in_features]."""
    return linear.matrix.multiply(torch.eye(linear.spec.in_features)).T


def rows_of(embedding: Embedding) -> torch.Tensor:
    """[vocab_size, hidden]"""
    return embedding(torch.arange(embedding.spec.out_features))


def problems(decoder: Decoder, tensors: dict[str, torch.Tensor]) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_weights(decoder, stored(tensors))
    return str(caught.value)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_names_are_those_of_transformers_and_every_parameter_is_covered(architecture: str) -> None:
    model = tiny_model(architecture, head_dim=8)
    parameters = dict(empty_decoder(model).named_parameters())
    assert {name: parameter.shape for name, parameter in parameters.items()} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_tensors_in_any_order_fill_the_same_matrices(seed: int) -> None:
    model = tiny_model("qwen3", head_dim=8)
    state = model.state_dict()
    names = random.Random(seed).sample(sorted(state), len(state))
    decoder = empty_decoder(model)
    load_weights(decoder, stored({name: state[name] for name in names}))
    layer, prefix = decoder.layers[1], "model.layers.1"
    parts = [state[f"{prefix}.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(values_of(layer.attention.qkv), torch.cat(parts))
    parts = [state[f"{prefix}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(values_of(layer.mlp.linears[0]), torch.cat(parts))
    assert torch.equal(rows_of(decoder.embedding), state["model.embed_tokens.weight"])


def test_old_buffers_and_a_head_equal_to_a_tied_embedding_are_passed_over() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    state = dict(model.state_dict())
    for head in (torch.zeros(1), state["lm_head.weight"] + 1e-3):
        assert "lm_head.weight is another matrix" in problems(empty_decoder(model), {**state, "lm_head.weight": head})
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    decoder = empty_decoder(model)
    load_weights(decoder, stored(state))
    assert torch.equal(values_of(decoder.lm_head), model.state_dict()["model.embed_tokens.weight"])


def test_other_dtypes_are_converted(decoder: Decoder, state: dict[str, torch.Tensor]) -> None:
    load_weights(decoder, stored({name: tensor.bfloat16() for name, tensor in state.items()}))
    torch.testing.assert_close(rows_of(decoder.embedding), state["model.embed_tokens.weight"].bfloat16().float())


def test_every_kind_of_problem_is_named_at_once(decoder: Decoder, state: dict[str, torch.Tensor]) -> None:
    broken = dict(state)
    del broken["model.layers.1.self_attn.k_proj.bias"]
    broken["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
    broken["model.norm.weight"] = torch.zeros(7)
    broken["model.layers.0.mlp.down_proj.weight"] = state["model.layers.0.mlp.down_proj.weight"].to(torch.int8)
    message = problems(decoder, broken)
    assert "4 problems" in message
    assert "model.layers.1.self_attn.k_proj.bias is missing" in message
    assert "model.layers.9.mlp.up_proj.weight is not a tensor of qwen2" in message
    assert "model.norm.weight has shape [7], the configuration says [48]" in message
    assert "model.layers.0.mlp.down_proj.weight has dtype int8" in message


def test_many_problems_are_counted_and_the_first_are_named(decoder: Decoder) -> None:
    message = problems(decoder, {})
    num_expected = len(dict(decoder.named_parameters()))
    assert f"{num_expected} problems" in message
    assert message.count("is missing") == 10
    assert f"and {num_expected - 10} more" in message


def test_a_tensor_given_twice_is_named(decoder: Decoder, state: dict[str, torch.Tensor]) -> None:
    def tensors() -> Iterator[tuple[str, StoredTensor]]:
        yield from stored(state)
        yield "model.norm.weight", StoredTensor.plain(state["model.norm.weight"])

    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is given twice"):
        load_weights(decoder, tensors())


def test_an_untied_head_must_be_there(decoder: Decoder, state: dict[str, torch.Tensor]) -> None:
    message = problems(decoder, {name: tensor for name, tensor in state.items() if name != "lm_head.weight"})
    assert "lm_head.weight is missing" in message


def test_dummy_weights_repeat_no_row_and_keep_norms_at_one(decoder: Decoder) -> None:
    init_dummy(decoder, seed=3)
    embedding = rows_of(decoder.embedding)
    assert len({tuple(row.tolist()) for row in embedding}) == len(embedding)
    assert torch.equal(decoder.final_norm.weight, torch.ones(48))
    assert float(values_of(decoder.layers[0].mlp.linears[0]).std()) == pytest.approx(48**-0.5, rel=0.05)

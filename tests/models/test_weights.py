from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cascade_llm.errors import CheckpointError
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.models.decoder import Decoder
from cascade_llm.models.weights import checkpoint_slots, init_dummy, load_weights
from tests.models.checkpoints import decoder_of, hf_config_of, tiny_model


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return dict(tiny_model("qwen2").state_dict())


@pytest.fixture
def decoder() -> Decoder:
    return Decoder(model_config_from_hf(hf_config_of(tiny_model("qwen2"))))


def problems(decoder: Decoder, tensors: dict[str, torch.Tensor]) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_weights(decoder, tensors.items())
    return str(caught.value)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_names_are_those_of_transformers_and_every_parameter_is_covered(architecture: str) -> None:
    model = tiny_model(architecture, head_dim=8)
    decoder = decoder_of(model)
    slots = checkpoint_slots(decoder)
    assert set(slots) == set(model.state_dict())
    assert sum(slot.numel() for slot in slots.values()) == sum(p.numel() for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(slots[name], tensor)


def test_a_head_beside_a_tied_embedding_and_old_buffers_are_passed_over() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    state = dict(model.state_dict())
    state["lm_head.weight"] = torch.zeros(1)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    decoder = Decoder(model_config_from_hf(hf_config_of(model)))
    load_weights(decoder, state.items())
    assert torch.equal(decoder.lm_head.weight, model.state_dict()["model.embed_tokens.weight"])


def test_other_dtypes_are_converted(decoder: Decoder, state: dict[str, torch.Tensor]) -> None:
    load_weights(decoder, ((name, tensor.bfloat16()) for name, tensor in state.items()))
    torch.testing.assert_close(decoder.embedding, state["model.embed_tokens.weight"].bfloat16().float())


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
    num_expected = len(checkpoint_slots(decoder))
    assert f"{num_expected} problems" in message
    assert message.count("is missing") == 10
    assert f"and {num_expected - 10} more" in message


def test_a_tensor_given_twice_is_named(decoder: Decoder, state: dict[str, torch.Tensor]) -> None:
    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield from state.items()
        yield "model.norm.weight", state["model.norm.weight"]

    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is given twice"):
        load_weights(decoder, tensors())


def test_an_untied_head_must_be_there(decoder: Decoder, state: dict[str, torch.Tensor]) -> None:
    message = problems(decoder, {name: tensor for name, tensor in state.items() if name != "lm_head.weight"})
    assert "lm_head.weight is missing" in message


def test_dummy_weights_repeat_no_row_and_keep_norms_at_one(decoder: Decoder) -> None:
    init_dummy(decoder, seed=3)
    assert len({tuple(row.tolist()) for row in decoder.embedding}) == len(decoder.embedding)
    assert torch.equal(decoder.final_norm.weight, torch.ones(48))
    assert float(decoder.layers[0].gate_up.weight.std()) == pytest.approx(48**-0.5, rel=0.05)

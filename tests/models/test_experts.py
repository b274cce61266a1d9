"""A block of experts beside transformers' own, whatever holds its matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from cascade_llm.layers.fused_ops import TorchOps
from cascade_llm.layers.routing import Router, Routing, TorchRouter
from cascade_llm.models.blocks import BlockOptions
from cascade_llm.models.experts import Experts
from cascade_llm.weights.format import StoredTensor, WeightOptions
from tests.models.checkpoints import empty_decoder, tiny_model

HIDDEN, INNER, SHARED, NUM_EXPERTS, CHOSEN = 48, 32, 40, 7, 3


def block_options(router: Router | None = None, **weights: Any) -> BlockOptions:
    """For blocks of the tiny llama's hidden size."""
    config = empty_decoder(tiny_model("llama")).config
    options = WeightOptions(**{"dtype": torch.float32, "device": torch.device("cpu"), **weights})
    return BlockOptions(config, options, TorchOps(), router or TorchRouter())


def filled(experts: Experts, state: dict[str, torch.Tensor]) -> Experts:
    """The block with a checkpoint's tensors, those of all experts in one cut apart."""
    parameters = dict(experts.named_parameters())
    for name, parameter in parameters.items():
        parameter.load(StoredTensor.plain(tensor_of(state, name)))
    return experts


def tensor_of(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A tensor by its name in a checkpoint of one matrix each."""
    if name in state:
        return state[name]
    _, index, part, _ = name.split(".")
    if part == "down_proj":
        return state["experts.down_proj"][int(index)]
    return state["experts.gate_up_proj"][int(index)].chunk(2)[part == "up_proj"]


def theirs(kind: str, divides: bool) -> torch.nn.Module:
    """A random block of transformers."""
    fields: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INNER,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "norm_topk_prob": divides,
    }
    torch.manual_seed(0)
    if kind == "qwen2_moe":
        block = Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(**fields, shared_expert_intermediate_size=SHARED))
    else:
        block = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**fields))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    return block.eval()


def ours(kind: str, divides: bool, **options: Any) -> Experts:
    """The same block without values."""
    routing = Routing(num_experts=NUM_EXPERTS, num_chosen=CHOSEN, divides_by_sum=divides)
    shared = SHARED if kind == "qwen2_moe" else None
    return Experts(block_options(**options), routing, INNER, shared_size=shared)


@torch.inference_mode()
@pytest.mark.parametrize("divides", [False, True])
@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe"])
def test_a_block_has_the_outputs_of_transformers(kind: str, divides: bool) -> None:
    block = theirs(kind, divides)
    experts = filled(ours(kind, divides), dict(block.state_dict()))
    for rows in (1, 5, 40):
        x = torch.randn(rows, HIDDEN)
        torch.testing.assert_close(experts(x), block(x.unsqueeze(0))[0], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_rows_are_ordered_by_expert_and_found_again() -> None:
    routing = Routing(num_experts=5, num_chosen=2, divides_by_sum=False)
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0, -1.0], [9.0, 0.0, 0.0, 0.0, 0.0]])
    routed = TorchRouter().route(logits, routing)
    assert routed.sources.tolist() == [1, 0, 1, 0]  # experts 0, 1, 1, 3; of equal logits the lower comes first
    assert routed.ends.tolist() == [1, 3, 3, 4, 4]
    assert routed.places.tolist() == [[1, 3], [0, 2]]
    outputs = torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
    weights = logits.softmax(-1)
    expected = torch.stack((10 * weights[0, 1] + 1000 * weights[0, 3], weights[1, 0] + 100 * weights[1, 1]))
    torch.testing.assert_close(TorchRouter().combine(outputs, routed), expected.unsqueeze(1))

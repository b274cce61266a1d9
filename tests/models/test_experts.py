"""A block of experts beside transformers' own, whatever holds its matrices."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from cascade_llm import LLM
from cascade_llm.errors import CheckpointError
from cascade_llm.layers.fused_ops import TorchOps
from cascade_llm.layers.native_routing import NativeRouter, select_router
from cascade_llm.layers.routing import Router, Routing, TorchRouter
from cascade_llm.loader.hf_folder import HuggingFaceCheckpoint
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.models.blocks import BlockOptions
from cascade_llm.models.experts import Experts
from cascade_llm.models.loading import check_shapes, load_weights
from cascade_llm.weights.format import StoredTensor, WeightOptions
from tests.models.checkpoints import Replay, decoder_of, empty_decoder, hf_config_of, stored, tiny_model
from tests.native_code import expect_native

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
        if not parameter.stands_for:
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
def test_experts_of_gpt_oss_have_the_outputs_of_transformers() -> None:
    """Biases everywhere, a clamped activation, and tensors with the inputs first, gate and up alternating."""
    fields = {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": CHOSEN, "swiglu_limit": 1.5}
    torch.manual_seed(0)
    block = GptOssMLP(GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, **fields)).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    options = block_options()
    routing = Routing(num_experts=NUM_EXPERTS, num_chosen=CHOSEN, divides_by_sum=True)
    activation = partial(options.ops.clamped_swiglu, limit=1.5, alpha=1.702)
    experts = Experts(
        options,
        routing,
        INNER,
        router_name="router",
        router_bias=True,
        bias=True,
        activation=activation,
        order="inputs_first",
    )
    parameters = dict(experts.named_parameters())
    for name, tensor in block.state_dict().items():
        assert parameters[name].shape == tensor.shape
        parameters[name].load(StoredTensor.plain(tensor))
    for rows in (1, 9):
        x = torch.randn(rows, HIDDEN)
        torch.testing.assert_close(experts(x), block(x.unsqueeze(0))[0][0], rtol=1e-4, atol=1e-4)


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


@torch.inference_mode()
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    experts=st.integers(1, 40),
    chosen=st.integers(1, 9),
    divides=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=st.integers(0, 99),
)
def test_rows_are_routed_in_c_as_in_torch(
    rows: int, experts: int, chosen: int, divides: bool, dtype: torch.dtype, seed: int
) -> None:
    router, twin = select_router(dtype, torch.device("cpu")), TorchRouter()
    expect_native(None if isinstance(router, NativeRouter) else "the router is torch's")
    generator = torch.Generator().manual_seed(seed)
    routing = Routing(num_experts=experts, num_chosen=min(chosen, experts), divides_by_sum=divides)
    logits = (4 * torch.randn(rows, experts, generator=generator)).round(decimals=seed % 2).to(dtype)  # some are equal
    got, wanted = router.route(logits, routing), twin.route(logits, routing)
    for field in ("sources", "ends", "places"):
        assert torch.equal(getattr(got, field), getattr(wanted, field)), field
    torch.testing.assert_close(got.weights, wanted.weights, rtol=1e-5, atol=1e-6)
    outputs = torch.randn(rows * routing.num_chosen, 7 + 300 * (seed % 2), generator=generator).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        router.combine(outputs, got), twin.combine(outputs, wanted), rtol=tolerance, atol=tolerance
    )


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_no_numbers_are_routed_somewhere(dtype: torch.dtype) -> None:
    routing = Routing(num_experts=4, num_chosen=2, divides_by_sum=True)
    for logits in (torch.full((3, 4), torch.nan), torch.full((3, 4), -torch.inf), torch.full((3, 4), torch.inf)):
        routed = select_router(dtype, torch.device("cpu")).route(logits.to(dtype), routing)
        assert routed.ends[-1] == 6
        assert sorted(routed.places.flatten().tolist()) == list(range(6))


def moe_config(kind: str = "qwen3_moe", **fields: Any) -> dict[str, Any]:
    """A config.json."""
    model = tiny_model(kind, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=32, num_hidden_layers=2)
    return {**hf_config_of(model), **fields}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 6}, "num_experts_per_tok is 6: it must be at most num_local_experts, 5"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok is None"),
        ({"num_experts": 4}, "num_experts 4 and num_local_experts 5 contradict each other"),
        ({"num_local_experts": None}, "num_experts is None: it must be an integer"),
        ({"num_local_experts": 0}, "num_local_experts is 0"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size is -1"),
        ({"mlp_only_layers": [2]}, r"mlp_only_layers is \[2\]: it must be a list of integers from 0 to 1"),
        ({"mlp_only_layers": 1}, "mlp_only_layers is 1"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1"),
    ],
)
def test_a_field_of_experts_that_makes_no_sense_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        model_config_from_hf(moe_config(**fields))


def test_the_older_name_of_the_count_is_read() -> None:
    assert model_config_from_hf(moe_config(num_experts=5, num_local_experts=None)) == model_config_from_hf(moe_config())


def test_a_folder_has_a_tensor_for_each_expert_and_gives_the_same_logits(tmp_path: Path) -> None:
    """transformers takes the tensors of all experts apart as it saves them."""
    model = tiny_model("qwen2_moe", num_experts=5, num_experts_per_tok=2, moe_intermediate_size=32)
    model.save_pretrained(tmp_path)
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    tensors = dict(checkpoint.stored_tensors())
    assert "model.layers.0.mlp.experts.4.up_proj.weight" in tensors
    decoder = empty_decoder(model)
    load_weights(decoder, checkpoint.stored_tensors())
    rows = [(0, position, token) for position, token in enumerate((5, 9, 3, 77))]
    assert torch.equal(Replay(decoder).step(rows), Replay(decoder_of(model)).step(rows))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("model.layers.0.mlp.experts.3.up_proj.weight", None, "experts.3.up_proj.weight is missing"),
        ("model.layers.1.mlp.gate.weight", torch.zeros(4, 48), r"gate.weight has shape \[4, 48\], .* says \[5, 48\]"),
        (
            "model.layers.1.mlp.experts.5.up_proj.weight",
            torch.zeros(32, 48),
            "experts.5.up_proj.weight is not a tensor",
        ),
        ("model.layers.1.mlp.experts.down_proj", torch.zeros(5, 48, 32), "experts.down_proj is given twice"),
    ],
)
def test_a_checkpoint_with_other_experts_is_refused(name: str, values: torch.Tensor | None, message: str) -> None:
    decoder = empty_decoder(tiny_model("qwen3_moe", num_experts=5, num_experts_per_tok=2, moe_intermediate_size=32))
    parameters = {n: p for n, p in decoder.named_parameters() if not p.stands_for}
    state = {n: torch.zeros(p.shape) for n, p in parameters.items()}
    if values is None:
        del state[name]
    else:
        state[name] = values
    for check in (
        lambda: check_shapes(decoder, ((name, tuple(tensor.shape)) for name, tensor in state.items())),
        lambda: load_weights(decoder, stored(state)),
    ):
        with pytest.raises(CheckpointError, match=message):
            check()


def test_a_folder_without_an_expert_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("qwen3_moe", num_experts=5, num_experts_per_tok=2, moe_intermediate_size=32)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.3.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    monkeypatch.setattr(HuggingFaceCheckpoint, "stored_tensors", lambda self: pytest.fail("weights are read"))
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.experts\.3\.down_proj\.weight is missing"):
        LLM(tmp_path, device="cpu", max_num_seqs=1)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_what_is_missing_or_wrong_is_called_as_its_folder_calls_it(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, num_local_experts=4)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    told = {
        "mixtral": ("block_sparse_moe.experts.1.w3.weight", "block_sparse_moe.gate.weight"),
        "gpt_oss": ("mlp.experts.down_proj_bias", "mlp.router.weight"),
    }
    missing, wrong = (f"model.layers.1.{name}" for name in told[architecture])
    del tensors[missing]
    tensors[wrong] = torch.zeros(3, 48)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        check_shapes(empty_decoder(model), checkpoint.shapes(), checkpoint.stored_name)
    assert "2 problems" in str(caught.value)
    assert f"  {missing} is missing" in str(caught.value)
    assert f"  {wrong} has shape [3, 48], the configuration says [4, 48]" in str(caught.value)

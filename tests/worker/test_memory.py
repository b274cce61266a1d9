from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cascade_llm import LLM
from cascade_llm.config import EngineOptions, ModelConfig
from cascade_llm.device.ranks import Ranks
from cascade_llm.errors import CapacityError
from cascade_llm.loader.hf_folder import DummyCheckpoint
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.models.decoder import Decoder
from cascade_llm.weights.format import WeightOptions
from cascade_llm.worker import memory
from cascade_llm.worker.memory import check_sizes
from cascade_llm.worker.worker import build_worker
from tests.models.checkpoints import hf_config_of, tiny_model

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    return hf_config_of(tiny_model("llama"))


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"hidden_size": 2**30, "head_dim": 8}, {}, "hidden size 1,073,741,824"),
        ({"vocab_size": 2**31 - 1, "hidden_size": 2**20, "head_dim": 8}, {}, "vocabulary of 2,147,483,647 takes"),
        ({"num_attention_heads": 2**30, "num_key_value_heads": 2, "head_dim": 8}, {}, "the weights of 3 layers"),
        ({"max_position_embeddings": 2**31 - 1}, {}, "set a smaller max_model_len"),
        ({"max_position_embeddings": 2**20, "rope_parameters": {**YARN, "factor": 1e20}}, {}, "smaller max_model_len"),
        ({}, {"kv_cache_bytes": 2**62, "max_num_seqs": 2**20, "max_num_batched_tokens": 2**20}, "are free: lower it"),
        ({"num_hidden_layers": 30}, {"page_size": 2**20}, "give kv_cache_bytes"),
    ],
)
def test_what_no_machine_holds_is_an_error_before_anything_is_built(
    tiny: dict[str, Any], fields: dict[str, Any], options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1 << 30)
    with pytest.raises(CapacityError, match=message):
        build_worker(EngineOptions(device="cpu", **options), DummyCheckpoint({**tiny, **fields}))


def test_the_state_of_sequences_is_counted(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1 << 28)
    options = EngineOptions(device="cpu", max_num_seqs=2**20, max_num_batched_tokens=2**20)
    with pytest.raises(CapacityError, match="max_num_seqs 1,048,576 sequences takes 536,870,912 bytes"):
        build_worker(options, DummyCheckpoint(tiny))


def size_of(model: ModelConfig) -> int:
    parameters = Decoder(model, WeightOptions(dtype=torch.float32, device=torch.device("cpu"))).named_parameters()
    whole = (parameter for _, parameter in parameters if not parameter.stands_for)
    return 4 * sum(torch.Size(parameter.shape).numel() for parameter in whole)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2_moe"])
def test_what_is_counted_is_nearly_what_the_weights_take(
    architecture: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"num_experts": 5, "moe_intermediate_size": 32} if architecture == "qwen2_moe" else {}
    model = replace(
        model_config_from_hf(hf_config_of(tiny_model(architecture, **fields))),
        tie_word_embeddings=tied,
        max_position_embeddings=64,
    )
    for free, fits in ((size_of(model), True), (int(size_of(model) * 0.98), False)):
        monkeypatch.setattr(memory, "available_bytes", lambda device, free=free: free)
        arguments = EngineOptions(device="cpu", max_num_seqs=1), model, torch.float32, 8, 64, Ranks()
        if fits:
            check_sizes(*arguments)
        else:
            with pytest.raises(CapacityError, match="the weights of 3 layers"):
                check_sizes(*arguments)


def test_weights_in_few_bits_need_no_more_than_these(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_config_from_hf(tiny)
    monkeypatch.setattr(memory, "available_bytes", lambda device: size_of(model) // 4)
    sizes = model, torch.float32, 8, 64, Ranks()
    check_sizes(EngineOptions(device="cpu", max_num_seqs=1), *sizes, size_of(model) // 5)
    check_sizes(EngineOptions(device="cpu", max_num_seqs=1, quantization="int4"), *sizes, size_of(model))
    with pytest.raises(CapacityError, match="the weights of 3 layers"):
        check_sizes(EngineOptions(device="cpu", max_num_seqs=1), *sizes, size_of(model))


def test_yarn_serves_the_original_length_times_its_factor(tiny: dict[str, Any]) -> None:
    """As Qwen documents it: the factor is added to the configuration, max_position_embeddings stays."""
    config = {**tiny, "max_position_embeddings": 80, "rope_parameters": YARN}
    options: dict[str, Any] = {"load_format": "dummy", "device": "cpu", "max_num_seqs": 1}
    _, facts = build_worker(EngineOptions(**options), DummyCheckpoint(config))
    assert facts.max_model_len == 256
    _, facts = build_worker(EngineOptions(**options, max_model_len=200), DummyCheckpoint(config))
    assert facts.max_model_len == 200


def test_memory_that_the_system_refuses_is_a_capacity_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        torch.empty(1 << 60)  # as where the size was not foreseen

    monkeypatch.setattr("cascade_llm.worker.worker.LaneState", refuse)
    with pytest.raises(CapacityError, match="lanes and workspaces"):
        LLM("smollm2", load_format="dummy", kv_cache_bytes=1 << 20, max_model_len=16)

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

from cascade_llm import SamplingParams
from cascade_llm.errors import ConfigError
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.models.decoder import Decoder
from cascade_llm.weights.format import WeightOptions
from cascade_llm.weights.packed_kernels import reason_against_packed
from tests.engine.tiny_llm import random_forest, save_tiny, tiny_llm
from tests.loader.gguf_files import write_model
from tests.models.checkpoints import tiny_model
from tests.native_code import expect_native

FITTING = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6}
TEXT = (
    "A radix tree is a space-optimized trie in which every node that is the only child is merged with its parent. "
    "It stores strings by their shared prefixes, so that looking one up takes as long as the string, not as long as "
    "the number of strings. Routers use such trees for addresses, and inference engines for prompts that begin alike."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("int4"), "qwen2", **FITTING)


def prompt_logprobs(folder: Path | str, prompts: Sequence[str | list[int]], **options: Any) -> torch.Tensor:
    """Log-probabilities of all prompt tokens but the first of each."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    options = {"dtype": "bfloat16", "max_num_seqs": 4, "enable_prefix_caching": False, **options}
    with tiny_llm(folder, **options) as llm:
        outputs = llm.generate(list(prompts), params)
    return torch.tensor([token.logprob for output in outputs for token in output.prompt_logprobs or () if token])


def mean_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert len(a) == len(b) > 50
    return float((a - b).abs().mean())


def test_steps_of_few_rows_and_of_many_compute_with_the_same_quantized_weights(folder: Path) -> None:
    prompts = random_forest(seed=0, num_prompts=6, vocab_size=97, longest=64)
    few = prompt_logprobs(folder, prompts, quantization="int4", max_num_batched_tokens=8)
    many = prompt_logprobs(folder, prompts, quantization="int4")
    dense = prompt_logprobs(folder, prompts)
    assert mean_difference(few, many) < 0.5 * mean_difference(many, dense)


def test_blocks_that_are_quantized_already_stay_as_they_are() -> None:
    options = {"max_model_len": 256, "kv_cache_bytes": 50_000_000, "debug": False}
    rounded = prompt_logprobs("smollm2", [TEXT], quantization="int4", **options)
    assert torch.equal(rounded, prompt_logprobs("smollm2", [TEXT], **options))


def test_rounding_the_inputs_of_products_costs_little_and_can_be_left_out() -> None:
    """Measured: 0.055 in the mean, where bfloat16 against float32 makes 0.033."""
    options = {"max_model_len": 256, "kv_cache_bytes": 50_000_000, "debug": False, "dtype": "float32"}
    rounded = prompt_logprobs("smollm2", [TEXT], **options)
    exact = prompt_logprobs("smollm2", [TEXT], exact_activations=True, **options)
    assert 0 < mean_difference(rounded, exact) < 0.11
    assert abs(float((rounded - exact).mean())) < 0.03


def test_a_model_is_rounded_while_it_is_loaded_and_more_bits_change_it_less(folder: Path) -> None:
    """A random model: its log-probabilities change by 0.09 in bfloat16 alone."""
    prompts = random_forest(seed=0, num_prompts=6, vocab_size=97, longest=64)
    options = {"dtype": "float32", "exact_activations": True}
    plain = prompt_logprobs(folder, prompts, **options)
    changes = {
        method: mean_difference(prompt_logprobs(folder, prompts, quantization=method, **options), plain)
        for method in ("q8_0", "int8", "fp8", "q4_k", "int4")
    }
    assert 0 < changes["q8_0"] < 0.4
    assert changes["q8_0"] < changes["fp8"] < changes["int4"]
    assert changes["int8"] < changes["fp8"]
    assert changes["q4_k"] == changes["int4"], "inputs that are no super-blocks fall back"


def test_rounding_to_what_has_no_kernel_on_a_gpu_is_refused(folder: Path) -> None:
    config = model_config_from_hf(open_checkpoint(folder).hf_config(), {})
    weights = WeightOptions(dtype=torch.float16, device=torch.device("meta"), quantization="int8")
    with pytest.raises(ConfigError, match="has no kernel on a GPU: take q4_k, int4, fp8"):
        Decoder(config, weights)


def test_a_matrix_whose_inputs_are_no_groups_stays_plain(tmp_path: Path) -> None:
    with tiny_llm(save_tiny(tmp_path, hidden_size=48), quantization="int4", dtype="float32") as llm:
        assert llm.generate([[5, 6]], SamplingParams(max_tokens=2, ignore_eos=True))[0]["token_ids"]


@pytest.mark.parametrize(("kind", "has_kernel"), [("Q8_0", True), ("TQ2_0", False)])
def test_blocks_without_a_kernel_are_decoded_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, has_kernel: bool
) -> None:
    expect_native(reason_against_packed())
    model = tiny_model("llama", hidden_size=256, intermediate_size=256, num_attention_heads=4, head_dim=64)
    file = write_model(tmp_path / "tiny.gguf", model, tensor_type=GGMLQuantizationType[kind])
    with tiny_llm(file) as llm:
        assert len(llm.generate([[5, 6]], SamplingParams(max_tokens=2, ignore_eos=True))[0]["token_ids"]) == 2
    message = f"{kind} of the checkpoint has no kernel here: decoded to float32, 32 bits a weight"
    assert (message in caplog.text) == (not has_kernel)


def test_an_unknown_quantization_is_refused(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match="quantization is 'int3': it must be one of None, q4_k, q8_0, int8, int4, fp8"
    ):
        tiny_llm(folder, quantization="int3")

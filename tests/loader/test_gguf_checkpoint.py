from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from cascade_llm.config import RopeConfig
from cascade_llm.errors import CheckpointError, UnsupportedModelError
from cascade_llm.layers.rope import RotaryTables
from cascade_llm.loader.gguf_checkpoint import GGUFCheckpoint
from cascade_llm.loader.gguf_file import CHUNK_LEN, dequantize
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.models.architectures import model_config_from_hf
from tests.loader.gguf_files import architecture_name, convert, metadata_of, write_gguf, write_model
from tests.models.checkpoints import hf_config_of, tiny_model
from tests.models.families import CASES, FAMILIES

Type = GGMLQuantizationType

WITHOUT_GGUF = {
    "llama, dynamic": "no key for it",
    "llama, linear": "read from keys of its own: test_rope_scaling",
    "llama, yarn": "read from keys of its own: test_rope_scaling",
    "llama, llama3": "read from divisors: test_llama3_scaling_is_found_again_from_its_divisors",
    "qwen2, yarn": "as llama's",
    "qwen3, yarn": "as llama's",
    "gemma2, no caps, untied": "a head of its own is left out",
    "gemma2, low caps": "no key for what scores are scaled by",
    "gemma3_text, no windows, capped": "no key for what scores are scaled by",
    "smollm3, listed layers, untied": "no key for it",
    "smollm3, biases, no rotation": "no key for it",
    "smollm3, windows": "no key for which layers rotate",
    "qwen2_moe, few": "no key for it",
}
"""Cases that a conversion cannot write, or does not write into the common keys."""
WITHOUT_KEY_FOR_WINDOWS = {
    *("mistral", "mistral, a short window", "mixtral, window, all"),
    *("qwen2, windows", "qwen3, windows", "qwen2_moe, windows", "qwen3_moe, windows"),
}
"""Cases whose file says nothing of windows, so that they are read without."""
WITH_EXPERTS = ("qwen2_moe", "qwen3_moe", "gpt_oss")
MODELS = {case: model for case, model in CASES.items() if case not in WITHOUT_GGUF and model[0] not in WITH_EXPERTS}
PARTS = ("gate_proj", "up_proj")
TWO_TYPES = ["sliding_attention", "full_attention"]


def quantizable_types() -> list[Type]:
    found = []
    for tensor_type in Type:
        try:
            quants.quantize(np.ones((1, 256), np.float32), tensor_type)
        except NotImplementedError:
            continue
        found.append(tensor_type)
    return found


def block_types() -> list[Type]:
    found = []
    for tensor_type in Type:
        try:
            quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[tensor_type][1]), np.uint8), tensor_type)
        except NotImplementedError:
            continue
        found.append(tensor_type)
    return [tensor_type for tensor_type in found if GGML_QUANT_SIZES[tensor_type][0] > 1]


def by_expert(name: str, values: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor that holds all experts, as one for each matrix; any other as it is."""
    block, _, last = name.rpartition(".")
    if not block.endswith("experts"):
        yield name, values
        return
    for expert, matrix in enumerate(values):
        parts = {"down_proj": matrix} if last == "down_proj" else dict(zip(PARTS, matrix.chunk(2), strict=True))
        yield from ((f"{block}.{expert}.{part}.weight", own) for part, own in parts.items())


@pytest.mark.parametrize("case", MODELS)
def test_tensors_equal_the_model_that_was_converted(tmp_path: Path, case: str) -> None:
    architecture, changes = MODELS[case]
    model = tiny_model(architecture, **changes)
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "tiny.gguf", model))
    loaded = dict(checkpoint.tensors())
    expected = {name: own for whole, values in model.state_dict().items() for name, own in by_expert(whole, values)}
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    assert set(loaded) == set(expected)
    is_rounded = FAMILIES[architecture].norm_offset != 0  # what a conversion added is subtracted
    for name, values in expected.items():
        torch.testing.assert_close(loaded[name], values, rtol=0, atol=2**-23 if is_rounded and "norm" in name else 0)
    assert dict(checkpoint.shapes()) == {name: tuple(values.shape) for name, values in loaded.items()}


@pytest.mark.parametrize("case", MODELS)
def test_configuration_means_what_the_model_s_own_does(tmp_path: Path, case: str) -> None:
    architecture, changes = MODELS[case]
    model = tiny_model(architecture, **changes)
    checkpoint = GGUFCheckpoint(
        write_model(tmp_path / "tiny.gguf", model, other_keys={"tokenizer.ggml.eos_token_id": 2})
    )
    ours = model_config_from_hf(checkpoint.hf_config(), checkpoint.generation_config())
    theirs = model_config_from_hf(hf_config_of(model))
    if architecture == "mistral":  # whose file is llama's, without biases
        assert not any(ours.own.values())
        ours = replace(ours, architecture="mistral", own={})
    if case in WITHOUT_KEY_FOR_WINDOWS:
        assert ours.attention_kinds == (None,)
        ours = replace(ours, attention_kinds=theirs.attention_kinds, layer_kinds=theirs.layer_kinds)
    rotations = [RotaryTables(config, 64) for config in (ours, theirs)]
    for mine, other in zip(*(tables.by_layer(tables.tables) for tables in rotations), strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            torch.testing.assert_close(mine.cos_sin, other.cos_sin)
            assert mine.is_interleaved == other.is_interleaved
    ours, theirs = (replace(config, rope=RopeConfig(), layer_ropes=()) for config in (ours, theirs))
    assert ours == theirs


@pytest.mark.parametrize(
    ("architecture", "num_layers", "keys", "field", "value"),
    [
        ("gemma2", 46, {}, "query_pre_attn_scalar", 48 // 6),
        ("gemma3_text", 62, {}, "query_pre_attn_scalar", 48 // 6),
        ("gemma2", 2, {"attention.sliding_window": None}, "sliding_window", 4096),
        ("gemma2", 2, {"attn_logit_softcapping": None}, "attn_logit_softcapping", "left out"),
        ("gemma2", 2, {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping", None),
        ("gemma3_text", 2, {"attention.sliding_window": None}, "layer_types", ["full_attention"] * 2),
        ("gemma3_text", 2, {"attention.sliding_window_pattern": 2}, "layer_types", TWO_TYPES),
        ("gemma3_text", 2, {"attention.sliding_window_pattern": [True, False]}, "layer_types", TWO_TYPES),
        ("gemma3_text", 2, {"rope.freq_base_swa": None}, "rope_local_base_freq", 10_000.0),
    ],
)
def test_what_gemma_s_files_leave_to_the_reader(
    tmp_path: Path, architecture: str, num_layers: int, keys: dict[str, Any], field: str, value: object
) -> None:
    model = tiny_model(architecture, num_hidden_layers=2, layer_types=None)
    tensors = convert(model)
    if num_layers > 2:  # of a file that big the first layers' weights do for the others
        parts = [name.removeprefix("blk.0.") for name in tensors if name.startswith("blk.0.")]
        tensors |= {f"blk.{n}.{part}": tensors[f"blk.0.{part}"] for n in range(num_layers) for part in parts}
    written = {**metadata_of(model), "block_count": num_layers, **keys}
    path = write_gguf(tmp_path / "tiny.gguf", architecture_name(model), written, tensors)
    assert GGUFCheckpoint(path).hf_config().get(field, "left out") == value


def transformers_weights(path: Path) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """What transformers makes of a GGUF file: a model without weights, and the weights for it."""
    read = load_gguf_checkpoint(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**read["config"]))
    return model, load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_same_weights_from_the_file(tmp_path: Path, architecture: str) -> None:
    path = write_model(tmp_path / "tiny.gguf", tiny_model(architecture, num_key_value_heads=3))
    assert_same_tensors(dict(GGUFCheckpoint(path).tensors()), transformers_weights(path)[1])


@pytest.mark.slow
def test_smollm2_equals_what_transformers_loads() -> None:
    checkpoint = open_checkpoint("smollm2")
    assert checkpoint.tokenizer_source is not None
    model, weights = transformers_weights(checkpoint.tokenizer_source)
    assert_same_tensors(dict(checkpoint.tensors()), weights)
    ours, theirs = (model_config_from_hf(config) for config in (checkpoint.hf_config(), hf_config_of(model)))
    # the file's float32 1e-5 reads as 9.99999974e-06 there
    assert replace(ours, rms_norm_eps=theirs.rms_norm_eps) == theirs
    assert ours.rms_norm_eps == pytest.approx(theirs.rms_norm_eps, rel=1e-7)


def assert_same_tensors(loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(loaded) == set(expected)
    for name, values in expected.items():
        assert torch.equal(loaded[name], values), name


def test_smollm2_s_configuration() -> None:
    checkpoint = open_checkpoint("smollm2")
    config = model_config_from_hf(checkpoint.hf_config(), checkpoint.generation_config())
    assert (config.architecture, config.num_layers, config.hidden_size, config.intermediate_size) == (
        ("llama", 30, 576, 1536)
    )
    assert (config.num_qo_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (9, 3, 64, 49152)
    assert (config.max_position_embeddings, config.rope.theta, config.rms_norm_eps) == (8192, 1e5, 1e-5)
    assert config.tie_word_embeddings
    assert config.ending_token_ids == {2}
    assert checkpoint.name == "SmolLM2-135M-Instruct.Q4_1"


@pytest.mark.parametrize("tensor_type", quantizable_types(), ids=lambda t: t.name)
def test_quantized_files_equal_gguf_s_own_dequantization(tmp_path: Path, tensor_type: Type) -> None:
    model = tiny_model(
        "llama", hidden_size=256, intermediate_size=256, num_attention_heads=4, vocab_size=300, num_hidden_layers=1
    )
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "tiny.gguf", model, tensor_type=tensor_type))
    loaded = dict(checkpoint.tensors())
    assert set(loaded) == set(model.state_dict())
    for name, values in model.state_dict().items():
        stored = tensor_type if values.dim() > 1 else Type.F32
        # blocks lie within a row, so that permuting rows before quantizing or after gives the same
        expected = quants.dequantize(quants.quantize(values.numpy(), stored), stored)
        assert torch.equal(loaded[name].float(), torch.from_numpy(expected)), name
    plain = {Type.F16: torch.float16, Type.BF16: torch.bfloat16}
    assert loaded["lm_head.weight"].dtype == plain.get(tensor_type, torch.float32)
    assert checkpoint.hf_config()["torch_dtype"] == str(loaded["lm_head.weight"].dtype).removeprefix("torch.")


@pytest.mark.parametrize("tensor_type", block_types(), ids=lambda t: t.name)
def test_random_blocks_equal_gguf_s_own_dequantization(tensor_type: Type) -> None:
    block_len, block_bytes = GGML_QUANT_SIZES[tensor_type]
    num_rows = 3
    row_blocks = CHUNK_LEN // block_len // 2 + 7
    data = np.random.default_rng(0).integers(0, 256, (num_rows, row_blocks * block_bytes), np.uint8)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(quants.dequantize(data, tensor_type))
        loaded = dequantize(data.reshape(-1), tensor_type, (num_rows, row_blocks * block_len))
    assert loaded.shape == (num_rows, row_blocks * block_len)
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0, equal_nan=True)


def test_blocks_are_handed_over_as_stored_and_in_hugging_face_s_order(tmp_path: Path) -> None:
    """A format that keeps them finds in each row the blocks of that row; only `values()` decodes."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=64, num_attention_heads=4, num_hidden_layers=1)
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "tiny.gguf", model, tensor_type=Type.Q4_1))
    for name, stored in checkpoint.stored_tensors():
        values = model.state_dict()[name]
        assert stored.shape == values.shape
        if values.dim() == 1:
            assert (stored.format, stored.data.dtype) == ("plain", torch.float32)
        else:
            assert stored.format == "Q4_1"
            assert torch.equal(stored.data, torch.from_numpy(quants.quantize(values.numpy(), Type.Q4_1))), name


def test_a_type_without_dequantization_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Q8_K"):
        dequantize(np.zeros(GGML_QUANT_SIZES[Type.Q8_K][1], np.uint8), Type.Q8_K, (256,))


def test_plain_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", tiny_model("qwen2"))
    first, second = (dict(GGUFCheckpoint(path).tensors())["lm_head.weight"] for _ in range(2))
    before = path.read_bytes()
    first.zero_()
    assert second.abs().sum() > 0
    assert path.read_bytes() == before


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "soft cap": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "window": ({"attention.sliding_window": 4096}, "sliding-window"),
    "partial rotation": ({"rope.dimension_count": 4}, "RoPE over 4 of 8"),
    "longrope without factors": ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, "longrope"),
    "value heads": ({"attention.key_length": 8, "attention.value_length": 16}, "values of 16"),
    "layers differ": ({"attention.head_count_kv": [2, 2, 6]}, "head_count_kv differs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    path = write_model(tmp_path / "tiny.gguf", tiny_model("llama"), changes)
    with pytest.raises(UnsupportedModelError, match=message):
        GGUFCheckpoint(path)


def test_experts_of_an_architecture_without_them_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", tiny_model("qwen3"), {"expert_count": 8})
    with pytest.raises(UnsupportedModelError, match=r"qwen3\.expert_count = 8"):
        GGUFCheckpoint(path)


def test_one_kv_head_count_for_every_layer_may_be_a_list(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", tiny_model("llama"), {"attention.head_count_kv": [2, 2, 2]})
    assert GGUFCheckpoint(path).hf_config()["num_key_value_heads"] == 2


def test_unknown_architecture_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'mamba' .* llama, qwen2, qwen3"):
        GGUFCheckpoint(write_gguf(tmp_path / "tiny.gguf", "mamba"))


def test_unknown_tensor_is_refused(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": np.zeros((8, 48), np.float32), "blk.0.attn_sinks.weight": np.zeros(6, np.float32)}
    path = write_gguf(tmp_path / "tiny.gguf", "llama", metadata(), tensors)
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.attn_sinks\.weight"):
        GGUFCheckpoint(path)


def metadata() -> dict[str, Any]:
    return {
        "context_length": 64,
        "embedding_length": 48,
        "block_count": 1,
        "feed_forward_length": 64,
        "attention.head_count": 6,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }


def test_missing_metadata_is_named(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", tiny_model("llama"), {"block_count": None})
    with pytest.raises(CheckpointError, match=r"llama\.block_count is None"):
        GGUFCheckpoint(path)


def test_a_file_without_embedding_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"token_embd\.weight"):
        GGUFCheckpoint(write_gguf(tmp_path / "tiny.gguf", "llama", metadata()))


def split(folder: Path, model: PreTrainedModel, ending: str = ".gguf") -> list[Path]:
    """A model in three parts, the metadata in the first alone, as llama.cpp splits it."""
    tensors = list(convert(model).items())
    paths = []
    for number, chosen in enumerate((tensors[:0], tensors[:5], tensors[5:])):
        path = folder / f"tiny-{number + 1:05d}-of-00003{ending}"
        keys = {"split.no": number, "split.count": 3, "split.tensors.count": len(tensors)}
        first = metadata_of(model) if number == 0 else {}
        paths.append(write_gguf(path, "llama" if number == 0 else "", first, dict(chosen), other_keys=keys))
    return paths


@pytest.mark.parametrize("ending", [".gguf", ".GGUF"])
def test_a_split_file_is_one_model_whichever_part_is_given(tmp_path: Path, ending: str) -> None:
    model = tiny_model("llama")
    whole = dict(GGUFCheckpoint(write_model(tmp_path / "whole.gguf", model)).tensors())
    (tmp_path / "parts").mkdir()
    paths = split(tmp_path / "parts", model, ending)
    for path in (*paths, tmp_path / "parts"):
        checkpoint = open_checkpoint(path)
        assert checkpoint.hf_config()["num_hidden_layers"] == 3
        tensors = dict(checkpoint.tensors())
        assert tensors.keys() == whole.keys()
        assert all(torch.equal(tensors[name], whole[name]) for name in whole)


def test_parts_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    paths = split(tmp_path, tiny_model("llama"))
    second = paths[1].read_bytes()
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"tiny-00002-of-00003\.gguf is missing"):
        GGUFCheckpoint(paths[0])
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(CheckpointError, match="says that it is another part"):
        GGUFCheckpoint(paths[2])
    paths[1].write_bytes(second)
    with pytest.raises(CheckpointError, match=r"is one of 3 parts: .*NAME-00001-of-00003\.gguf"):
        GGUFCheckpoint(paths[0].rename(tmp_path / "other.gguf"))


@pytest.mark.parametrize("count", ["three", [3]])
def test_a_count_of_parts_that_is_no_number_is_named(tmp_path: Path, count: object) -> None:
    path = write_model(tmp_path / "tiny.gguf", tiny_model("llama"), other_keys={"split.count": count})
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: split\.count is"):
        GGUFCheckpoint(path)


ENDINGS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "eos": ({"eos": 2}, [2]),
    "eos, eot and eom": ({"eos": 2, "eot": 5, "eom": 6}, [2, 5, 6]),
    "the same twice": ({"eos": 2, "eot": 2}, [2]),
    "end of turn by its text": ({"eos": 2, "texts": True}, [2, 4]),
    "nothing": ({}, []),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_ending_ids(tmp_path: Path, case: str) -> None:
    given, expected = ENDINGS[case]
    keys: dict[str, Any] = {
        f"tokenizer.ggml.{name}_token_id": given[name] for name in ("eos", "eot", "eom") if name in given
    }
    if "texts" in given:
        keys["tokenizer.ggml.tokens"] = ["a", "<|eot_id|>", "</s>", "b", "<|eot_id|>"]
        keys["tokenizer.ggml.token_type"] = [1, 1, 3, 1, 3]
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "tiny.gguf", tiny_model("llama"), other_keys=keys))
    assert checkpoint.generation_config() == ({"eos_token_id": expected} if expected else {})
    assert (checkpoint.tokenizer_source is not None) == ("texts" in given)


@pytest.mark.parametrize(("architecture", "divides"), [("qwen2_moe", False), ("qwen3_moe", True)])
def test_experts_of_blocks_and_what_no_key_tells(tmp_path: Path, architecture: str, divides: bool) -> None:
    """A matrix of each expert is some rows of the file's tensor; llama.cpp knows who divides weights by their sum."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    shared = {"shared_expert_intermediate_size": 96} if architecture == "qwen2_moe" else {}
    model = tiny_model(architecture, num_experts=5, num_experts_per_tok=2, **sizes, **shared)
    changes = {"expert_weights_norm": None}
    path = write_model(tmp_path / "tiny.gguf", model, changes, tensor_type=Type.Q4_0)
    checkpoint = GGUFCheckpoint(path)
    assert model_config_from_hf(checkpoint.hf_config()).own["routing"].divides_by_sum is divides
    stored = dict(checkpoint.stored_tensors())
    for name, values in model.state_dict().items():
        for own, matrix in by_expert(name, values):
            if "experts" in own:
                assert stored[own].format == "Q4_0"
                rounded = quants.dequantize(quants.quantize(matrix.numpy(), Type.Q4_0), Type.Q4_0)
                assert np.array_equal(stored[own].values().numpy(), rounded)


def test_fused_gates_of_experts_are_cut(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=32)
    tensors = convert(model)
    for layer in range(model.config.num_hidden_layers):
        apart = [tensors.pop(f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up")]
        tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate(apart, axis=1)
    path = write_gguf(tmp_path / "tiny.gguf", "qwen3moe", metadata_of(model), tensors)
    whole = write_model(tmp_path / "whole.gguf", model)
    assert_same_tensors(dict(GGUFCheckpoint(path).tensors()), dict(GGUFCheckpoint(whole).tensors()))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"expert_gating_func": 2}, UnsupportedModelError, "expert_gating_func = 2"),
        ({"expert_weights_scale": 2.5}, UnsupportedModelError, "expert_weights_scale = 2.5"),
        ({"expert_used_count": None}, CheckpointError, "expert_used_count is None"),
        ({"expert_count": None}, CheckpointError, "expert_count is None"),
    ],
)
def test_keys_of_experts_that_nobody_reads_or_that_are_missing(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = tiny_model("qwen3_moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=32)
    with pytest.raises(error, match=message):
        GGUFCheckpoint(write_model(tmp_path / "tiny.gguf", model, changes))

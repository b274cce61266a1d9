from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cascade_llm.loader.hf_folder import HuggingFaceCheckpoint
from cascade_llm.weights.codes import CodeLayout
from cascade_llm.weights.format import StoredTensor
from tests.loader.quantized_files import (
    LAYER,
    WRITERS,
    Written,
    awq,
    float_quantized,
    fp8,
    gptq,
    int_quantized,
    pack_quantized,
    save_folder,
)
from tests.loader.table_files import TABLE_WRITERS


def stored_of(folder: Path) -> StoredTensor:
    tensors = dict(HuggingFaceCheckpoint(folder).stored_tensors())
    return tensors[f"{LAYER}.weight"]


def assert_read_exactly(written: Written) -> StoredTensor:
    """Values, codes, and any rows of both, bit by bit."""
    with TemporaryDirectory() as folder:
        stored = stored_of(save_folder(Path(folder), written))
    assert stored.shape == tuple(written.values.shape)
    assert torch.equal(stored.values(), written.values)
    assert stored.codes is not None
    codes = stored.codes(stored.data[1:3])
    assert torch.equal(codes.dequantized(), written.values[1:3])
    assert torch.equal(stored.codes(stored.data[:1]).dequantized(), written.values[:1])
    out = torch.empty(stored.shape)
    stored.write_to(out)
    assert torch.equal(out, written.values)
    return stored


def layout_of(stored: StoredTensor) -> CodeLayout:
    assert stored.codes is not None
    return stored.codes(stored.data).layout


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99),
    out=st.integers(1, 5).map(lambda n: 8 * n),
    words=st.integers(1, 24),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([-1, 32, 64, 128]),
    act_order=st.booleans(),
    version=st.sampled_from(["gptq", "gptq_v2"]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_gptq(out: int, words: int, **options: Any) -> None:
    num_inputs = 32 * words if options["act_order"] else 8 * words
    if options["act_order"] and num_inputs % options["group_size"]:
        num_inputs = 128
    stored = assert_read_exactly(gptq(out=out, num_inputs=num_inputs, **options))
    layout = layout_of(stored)
    assert layout.code == f"u{options['bits']}"
    assert layout.has_minimum is not options["symmetric"]


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 99),
    out=st.integers(1, 5).map(lambda n: 8 * n),
    num_inputs=st.integers(1, 40).map(lambda n: 8 * n),
    group_size=st.sampled_from([-1, 32, 64, 128]),
)
def test_awq(**options: Any) -> None:
    assert_read_exactly(awq(**options))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99),
    out=st.integers(3, 21),
    groups=st.integers(1, 3),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([-1, 32, 64, 128]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_pack_quantized(groups: int, **options: Any) -> None:
    num_inputs = 36 * groups if options["group_size"] == -1 else options["group_size"] * groups
    assert_read_exactly(pack_quantized(num_inputs=num_inputs, **options))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), out=st.integers(3, 20), num_inputs=st.integers(1, 70), symmetric=st.booleans())
def test_int_quantized(**options: Any) -> None:
    assert_read_exactly(int_quantized(**options))


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 99),
    out=st.integers(3, 20),
    num_inputs=st.sampled_from([5, 64, 192]),
    strategy=st.sampled_from(["channel", "tensor", "block"]),
)
def test_float_quantized(**options: Any) -> None:
    assert_read_exactly(float_quantized(**options))


@pytest.mark.parametrize("block", [(128, 128), (16, 32), None])
@pytest.mark.parametrize("shape", [(12, 192), (130, 128), (8, 40)])
def test_fp8(shape: tuple[int, int], block: tuple[int, int] | None) -> None:
    assert_read_exactly(fp8(0, *shape, block=block))


def test_layouts_are_those_that_kernels_take() -> None:
    def layout(written: Written) -> CodeLayout:
        return layout_of(assert_read_exactly(written))

    assert layout(gptq(symmetric=True)) == CodeLayout("u4", 8, 32, "float16")
    assert layout(gptq()) == CodeLayout("u4", 0, 32, "float32", has_minimum=True)
    assert layout(gptq(bits=8, symmetric=True, group_size=-1)) == CodeLayout("u8", 128, 64, "float16")
    assert layout(awq(group_size=64)) == CodeLayout("u4", 0, 64, "float32", has_minimum=True)
    assert layout(pack_quantized()) == CodeLayout("u4", 8, 32, "float32")
    assert layout(int_quantized()) == CodeLayout("u8", 128, 64, "float32")
    assert layout(float_quantized()) == CodeLayout("float8_e4m3fn", 0, 64, "float32")
    assert layout(fp8(num_inputs=192)) == CodeLayout("float8_e4m3fn", 0, 64, "float32")


@pytest.mark.parametrize(("written", "group_size"), [(pack_quantized(), 32), (pack_quantized(group_size=-1), -1)])
def test_a_strategy_that_is_not_named_follows_from_the_group_size(written: Written, group_size: int) -> None:
    weights = written.config["config_groups"]["group_0"]["weights"]
    del weights["strategy"]
    weights["group_size"] = group_size
    assert_read_exactly(written)


@pytest.mark.parametrize("writer", [gptq, pack_quantized])
def test_inputs_are_ordered_by_their_groups(writer: Any) -> None:
    stored = assert_read_exactly(writer(act_order=True))
    assert stored.codes is not None
    codes = stored.codes(stored.data)
    assert codes.input_order is not None
    assert sorted(codes.input_order.tolist()) == list(range(64))


@pytest.mark.parametrize("method", [*WRITERS, *TABLE_WRITERS])
def test_the_parts_of_a_matrix_may_lie_in_several_files(method: str, tmp_path: Path) -> None:
    written = {**WRITERS, **TABLE_WRITERS}[method]()
    weight_map = {}
    for number, (suffix, tensor) in enumerate(written.tensors.items()):
        file = f"model-{number}.safetensors"
        save_file({f"{LAYER}.{suffix}": tensor.contiguous()}, tmp_path / file)
        weight_map[f"{LAYER}.{suffix}"] = file
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": written.config}))
    assert torch.equal(stored_of(tmp_path).values(), written.values)


def test_what_is_not_quantized_stays_plain_and_activations_are_not_read(tmp_path: Path) -> None:
    head = torch.randn(4, 8)
    more = {"lm_head.weight": head, f"{LAYER}.input_scale": torch.ones(1), f"{LAYER}.bias": torch.ones(16)}
    folder = save_folder(tmp_path, float_quantized(), **more)
    tensors = dict(HuggingFaceCheckpoint(folder).stored_tensors())
    assert tensors.keys() == {f"{LAYER}.weight", f"{LAYER}.bias", "lm_head.weight"}
    assert torch.equal(tensors["lm_head.weight"].values(), head)


def test_layers_may_differ_by_groups_of_the_configuration(tmp_path: Path) -> None:
    other = "model.layers.0.mlp.down_proj"
    four, eight = pack_quantized(), pack_quantized(bits=8)
    config = dict(four.config)
    groups = {"a": config["config_groups"]["group_0"], "b": dict(eight.config["config_groups"]["group_0"])}
    groups["b"]["targets"] = ["re:.*down_proj$"]
    more = {f"{other}.{suffix}": tensor.contiguous() for suffix, tensor in eight.tensors.items()}
    folder = save_folder(tmp_path, Written({**config, "config_groups": groups}, four.tensors, four.values), **more)
    tensors = dict(HuggingFaceCheckpoint(folder).stored_tensors())
    assert torch.equal(tensors[f"{LAYER}.weight"].values(), four.values)
    assert torch.equal(tensors[f"{other}.weight"].values(), eight.values)


def test_an_older_file_tells_how_gptq_is_stored(tmp_path: Path) -> None:
    written = gptq(group_size=64, version="gptq")
    save_folder(tmp_path, written)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 64, "desc_act": False}))
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    assert checkpoint.hf_config()["quantization_config"]["quant_method"] == "gptq"
    assert torch.equal(dict(checkpoint.tensors())[f"{LAYER}.weight"], written.values)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert "quantization_config" not in HuggingFaceCheckpoint(tmp_path).hf_config()

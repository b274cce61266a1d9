"""NVFP4, MXFP4 and bitsandbytes are read to the bit, and what is wrong with them is told before a weight is loaded."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_llm.errors import CheckpointError, UnsupportedModelError
from cascade_llm.loader.hf_folder import HuggingFaceCheckpoint
from cascade_llm.loader.quantized.select import quantized_format
from cascade_llm.weights.codes import CodeLayout
from tests.loader.quantized.test_bad_quantized import assert_refused
from tests.loader.quantized.test_formats import assert_read_exactly, layout_of, stored_of
from tests.loader.quantized_files import LAYER, Written, float_quantized, pack_quantized, save_folder
from tests.loader.table_files import TABLE_WRITERS, bnb4, llm_int8, modelopt_fp8, modelopt_nvfp4, mxfp4, nvfp4

NAN = float("nan")
STATE = "weight.quant_state.bitsandbytes__nf4"
NESTED = partial(bnb4, nested=True)
WITH_NESTED: Mapping[str, Callable[..., Written]] = {**TABLE_WRITERS, "bnb4-nested": NESTED}


@settings(max_examples=12, deadline=None)
@given(
    writer=st.sampled_from([nvfp4, mxfp4, modelopt_nvfp4, modelopt_fp8, llm_int8]),
    seed=st.integers(0, 99),
    out=st.integers(3, 10),
    blocks=st.integers(1, 4),
)
def test_any_shape_is_read_exactly(writer: Any, seed: int, out: int, blocks: int) -> None:
    assert_read_exactly(writer(seed, out, 32 * blocks))


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 99),
    out=st.integers(3, 8),
    num_inputs=st.sampled_from([64, 128, 192, 96, 80, 30]),
    kind=st.sampled_from(["nf4", "fp4"]),
    block=st.sampled_from([32, 64, 128, 4096]),
    nested=st.booleans(),
)
def test_blocks_of_bitsandbytes_may_end_within_a_row_or_have_several(**options: Any) -> None:
    assert_read_exactly(bnb4(**options))


def test_codes_of_bitsandbytes_lie_in_any_dtype() -> None:
    for container in (torch.bfloat16, torch.float32):
        assert_read_exactly(bnb4(container=container))


def test_layouts() -> None:
    assert layout_of(assert_read_exactly(nvfp4())).group_len == 16
    assert layout_of(assert_read_exactly(mxfp4())).group_len == 32
    assert layout_of(assert_read_exactly(modelopt_fp8())) == CodeLayout("float8_e4m3fn", 0, 64, "float32")
    assert layout_of(assert_read_exactly(llm_int8())) == CodeLayout("u8", 128, 64, "float32")
    assert layout_of(assert_read_exactly(bnb4(num_inputs=192, block=128))).group_len == 64


@pytest.mark.parametrize("name", TABLE_WRITERS)
def test_inputs_are_cut_from_what_is_stored(name: str, tmp_path: Path) -> None:
    written = TABLE_WRITERS[name](0, 8, 128)
    stored = stored_of(save_folder(tmp_path, written))
    for part in (slice(0, 64), slice(64, 128), slice(32, 96)):
        cut = stored.rows(slice(2, 5)).columns(part)
        assert torch.equal(cut.values(), written.values[2:5, part])
        assert cut.codes is not None


@pytest.mark.parametrize(
    ("writer", "suffix", "num_zeros"), [(nvfp4, "weight_scale", 16), (bnb4, "weight.absmax", 64), (llm_int8, "SCB", 64)]
)
def test_a_scale_of_zero_makes_weights_of_zero(writer: Any, suffix: str, num_zeros: int) -> None:
    written = writer()
    scales = written.tensors[suffix]
    scales.view(-1).view(torch.uint8)[: scales.itemsize] = 0
    written.values[0, :num_zeros] = 0
    assert_read_exactly(written)


def test_activations_of_four_bits_stay_as_they_are_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "cascade_llm"):
        for number, written in enumerate((nvfp4(input_bits=None), mxfp4(), nvfp4(), modelopt_nvfp4())):
            save_folder(tmp_path / str(number), written)
            HuggingFaceCheckpoint(tmp_path / str(number))
            said = "rounds activations to 4 bits: here only its weights are rounded so" in caplog.text
            assert said == (number > 1)


def test_modelopt_may_tell_its_bits_in_a_file_of_its_own_and_layer_by_layer(tmp_path: Path) -> None:
    four, eight = modelopt_nvfp4(), modelopt_fp8(1)
    other = LAYER.replace("q_proj", "k_proj")
    layers = {LAYER: {"quant_algo": "NVFP4", "group_size": 16}, other: {"quant_algo": "FP8"}}
    fields = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "MIXED_PRECISION"}}
    fields["quantization"]["quantized_layers"] = layers  # type: ignore[assignment]
    more = {f"{other}.{suffix}": tensor for suffix, tensor in eight.tensors.items()}
    folder = save_folder(tmp_path, four, **more)
    (folder / "config.json").write_text("{}")
    (folder / "hf_quant_config.json").write_text(json.dumps(fields))
    tensors = dict(HuggingFaceCheckpoint(folder).stored_tensors())
    assert tensors.keys() == {f"{LAYER}.weight", f"{other}.weight"}
    assert torch.equal(tensors[f"{LAYER}.weight"].values(), four.values)
    assert torch.equal(tensors[f"{other}.weight"].values(), eight.values)
    del layers[other]
    (folder / "hf_quant_config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=f"quantized_layers has no {other}"):
        HuggingFaceCheckpoint(folder)


def test_layers_that_modelopt_leaves_out_are_named_by_patterns(tmp_path: Path) -> None:
    for pattern, is_refused in (("*.q_proj", True), ("model.layers.0*", True), ("*.q", False)):
        written = modelopt_nvfp4()
        folder = save_folder(
            tmp_path, Written({**written.config, "ignore": [pattern]}, written.tensors, written.values)
        )
        if not is_refused:
            HuggingFaceCheckpoint(folder)
            continue
        with pytest.raises(CheckpointError, match="is not quantized"):
            HuggingFaceCheckpoint(folder)


CT = nvfp4().config
MX = mxfp4().config


def changed(config: dict[str, Any], **fields: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(config))
    copy["config_groups"]["group_0"]["weights"].update(fields)
    return copy  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (changed(CT, group_size=32), "group_size=32"),
        (changed(MX, group_size=16), "group_size=16"),
        (changed(CT, num_bits=8), "num_bits=8"),
        (changed(CT, type="int"), "type='int'"),
        (changed(CT, symmetric=False), "symmetric=False"),
        (changed(CT, strategy="channel"), "strategy='channel'"),
        ({"quant_method": "modelopt"}, "quant_algo=None"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "NVFP4_AWQ"),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4", "group_size": 32}}, "group_size=32"),
        ({**modelopt_nvfp4().config, "config_groups": {"a": {"weights": {"group_size": 8}}}}, "group_size=8"),
        ({**bnb4().config, "bnb_4bit_quant_type": "af4"}, "af4"),
    ],
    ids=str,
)
def test_what_nobody_implements_is_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"choose|are read") as caught:
        quantized_format({"quantization_config": config})
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit"),
        ({"quant_method": "modelopt", "quantization": []}, "must be an object"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "quantized_layers must be"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "config_groups": [1]}, "an object of objects"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "config_groups": {"group_0": 9}}, "an object of objects"),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense(config: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        quantized_format({"quantization_config": config})


@pytest.mark.parametrize(
    ("writer", "suffix", "change", "problem"),
    [
        (nvfp4, "weight_scale", NAN, "all must be positive or 0"),
        (nvfp4, "weight_scale", -1.0, "all must be positive or 0"),
        (nvfp4, "weight_global_scale", 0.0, "all must be positive"),
        (nvfp4, "weight_global_scale", NAN, "all must be positive"),
        (nvfp4, "weight_global_scale", 1e-45, "scales that are not finite"),
        (mxfp4, "weight_scale", 255, "no numbers"),
        (modelopt_nvfp4, "weight_scale", -2.0, "all must be positive or 0"),
        (modelopt_nvfp4, "weight_scale_2", -1.0, "all must be positive"),
        (modelopt_nvfp4, "weight_scale_2", float("inf"), "all must be positive"),
        (modelopt_fp8, "weight_scale", 0.0, "all must be positive"),
        (bnb4, "weight.absmax", -1.0, "all must be positive or 0"),
        (bnb4, "weight.absmax", NAN, "all must be positive or 0"),
        (NESTED, "weight.nested_absmax", -1.0, "all must be positive or 0"),
        (NESTED, "weight.nested_absmax", NAN, "all must be positive or 0"),
        (NESTED, "weight.nested_quant_map", NAN, "values that are not finite"),
        (bnb4, "weight.quant_map", 1.5, "between -1 and 1"),
        (bnb4, "weight.quant_map", NAN, "between -1 and 1"),
        (llm_int8, "SCB", -1.0, "all must be positive or 0"),
        (llm_int8, "SCB", float("inf"), "all must be positive or 0"),
        (llm_int8, "weight_format", 1, "order of a GPU's tiles"),
    ],
)
def test_numbers_that_are_no_scales(tmp_path: Path, writer: Any, suffix: str, change: float, problem: str) -> None:
    written = writer()
    tensor = written.tensors[suffix].clone()
    tensor[...] = change
    written.tensors[suffix] = tensor
    assert_refused(tmp_path, written, suffix, problem)


@pytest.mark.parametrize("name", WITH_NESTED)
def test_tensors_of_another_shape_or_missing(tmp_path: Path, name: str) -> None:
    written = WITH_NESTED[name]()
    for suffix in sorted(set(written.tensors) - {"weight", "weight_packed", "weight_format", STATE}):
        if suffix.startswith("input_"):
            continue
        tensors = dict(written.tensors)
        found = tensors.pop(suffix)
        assert_refused(tmp_path, Written(written.config, tensors, written.values), suffix, "is missing")
        tensors[suffix] = torch.cat([found.view(-1), found.view(-1)])
        assert_refused(tmp_path, Written(written.config, tensors, written.values), suffix, "has shape")
        tensors[suffix] = torch.ones(found.shape, dtype=torch.int8)
        assert_refused(tmp_path, Written(written.config, tensors, written.values), suffix, "has dtype I8")


@pytest.mark.parametrize("name", WITH_NESTED)
def test_a_file_that_ends_within_its_tensors(tmp_path: Path, name: str) -> None:
    path = save_folder(tmp_path, WITH_NESTED[name]()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        HuggingFaceCheckpoint(tmp_path)


@pytest.mark.parametrize("name", TABLE_WRITERS)
def test_codes_of_another_dtype_or_shape(tmp_path: Path, name: str) -> None:
    """What holds the codes is no matrix of bytes."""
    written = TABLE_WRITERS[name]()
    suffix = "weight_packed" if "weight_packed" in written.tensors else "weight"
    codes = written.tensors[suffix]
    written.tensors[suffix] = codes[None].contiguous()
    if name != "bnb4":  # one run of bytes, of any shape
        assert_refused(tmp_path, written, suffix, "it must be a matrix")
    written.tensors[suffix] = torch.ones(codes.shape, dtype=torch.int32)
    assert_refused(tmp_path, written, suffix, "has dtype I32")


@pytest.mark.parametrize(
    ("written", "config", "suffix", "problem"),
    [
        (nvfp4(), mxfp4().config, "weight_scale", "has dtype F8_E4M3"),
        (mxfp4(), nvfp4().config, "weight_global_scale", "is missing"),
        (nvfp4(), pack_quantized().config, "weight_packed", "has dtype U8"),
        (pack_quantized(), mxfp4().config, "weight_packed", "has dtype I32"),
        (modelopt_nvfp4(), modelopt_fp8().config, "weight", "has dtype U8"),
        (modelopt_fp8(), modelopt_nvfp4().config, "weight_scale_2", "is missing"),
        (modelopt_nvfp4(), nvfp4().config, "weight_global_scale", "is missing"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors(
    tmp_path: Path, written: Written, config: dict[str, Any], suffix: str, problem: str
) -> None:
    assert_refused(tmp_path, Written(config, written.tensors, written.values), suffix, problem)


@pytest.mark.parametrize("writer", [nvfp4, mxfp4, float_quantized])
def test_an_order_of_inputs_where_nobody_reads_one_is_refused(tmp_path: Path, writer: Any) -> None:
    written = writer()
    written.tensors["weight_g_idx"] = torch.zeros(64, dtype=torch.int32)
    assert_refused(tmp_path, written, "weight_g_idx", "where nobody reads an order")


def test_layers_that_bitsandbytes_leaves_out_are_plain(tmp_path: Path) -> None:
    for written in (bnb4(), llm_int8()):
        config = {**written.config, "llm_int8_skip_modules": ["self_attn.q_proj"]}
        with pytest.raises(CheckpointError, match=f"says that {LAYER} is not quantized"):
            HuggingFaceCheckpoint(save_folder(tmp_path, Written(config, written.tensors, written.values)))


def test_inputs_that_are_no_groups(tmp_path: Path) -> None:
    for written, group in ((nvfp4(), 16), (mxfp4(), 32)):
        written.tensors["weight_packed"] = written.tensors["weight_packed"][:, :-3].contiguous()
        assert_refused(tmp_path, written, "weight_packed", f"58 inputs, which are no groups of {group}")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"blocksize": 48}, "blocksize 48"),
        ({"quant_type": "fp4"}, "quant_type is 'fp4'"),
        ({"blocksize": "64"}, "blocksize '64'"),
        ({"shape": [16]}, "shape"),
        ({"shape": [16.0, 64]}, "shape"),
        ({"shape": None}, "no description"),
        ({"nested_blocksize": 0}, "nested_blocksize 0"),
        ({"nested_blocksize": 2.5}, "nested_blocksize 2.5"),
        ({"nested_offset": NAN}, "nested_offset nan"),
        ({"nested_offset": "x"}, "no description"),
    ],
)
def test_a_description_that_makes_no_sense(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    written = NESTED()
    fields = json.loads(bytes(written.tensors[STATE].tolist())) | change
    written.tensors[STATE] = torch.tensor(list(json.dumps(fields).encode())).byte()
    assert_refused(tmp_path, written, STATE, problem)


def test_a_description_of_other_tensors(tmp_path: Path) -> None:
    written = bnb4()
    fields = json.loads(bytes(written.tensors[STATE].tolist())) | {"shape": [16, 66]}
    written.tensors[STATE] = torch.tensor(list(json.dumps(fields).encode())).byte()
    assert_refused(tmp_path, written, "weight", "which are not 4 bits of each of [16, 66]")
    written.tensors[STATE] = torch.tensor(list(b"{")).byte()
    assert_refused(tmp_path, written, STATE, "no description")
    other = Written({**bnb4().config, "bnb_4bit_quant_type": "fp4"}, bnb4().tensors, written.values)
    with pytest.raises(CheckpointError, match=f"bnb_4bit_quant_type is fp4, but {LAYER} is stored in another"):
        HuggingFaceCheckpoint(save_folder(tmp_path, other))
    eight = Written(llm_int8().config, bnb4().tensors, written.values)
    with pytest.raises(CheckpointError, match="no tensor is"):
        HuggingFaceCheckpoint(save_folder(tmp_path, eight))

"""Every way in which a quantized folder can be wrong is told before a weight is loaded, by tensor and file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_llm.errors import CheckpointError, ModelError, UnsupportedModelError
from cascade_llm.loader.hf_folder import HuggingFaceCheckpoint, write_hf_folder
from cascade_llm.loader.quantized.select import quantized_format
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
    packed,
    save_folder,
)
from tests.loader.table_files import TABLE_WRITERS

NAN = float("nan")


def group(**weights: Any) -> dict[str, Any]:
    base = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    return {"config_groups": {"a": {"targets": ["Linear"], "weights": {**base, **weights}}}}


CT = {"quant_method": "compressed-tensors", "format": "pack-quantized", **group()}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"quant_method": []}, "[]"),
        ({**CT, "format": []}, "format=[]"),
        ({}, ""),
        ({**GPTQ, "bits": 3}, "bits=3"),
        ({**GPTQ, "bits": 2}, "bits=2"),
        ({**GPTQ, "group_size": 0}, "group_size=0"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ({**GPTQ, "dynamic": {"+:.*down": {"bits": 8}}}, "dynamic"),
        ({**AWQ, "bits": 8}, "bits=8"),
        ({**AWQ, "version": "gemv"}, "version='gemv'"),
        ({**AWQ, "group_size": -2}, "group_size=-2"),
        ({**CT, "format": "mxfp6-pack-quantized"}, "mxfp6-pack-quantized"),
        ({**CT, "format": "marlin-24"}, "marlin-24"),
        ({**CT, **group(num_bits=3)}, "num_bits=3"),
        ({**CT, **group(strategy="tensor_group")}, "tensor_group"),
        ({**CT, **group(group_size=-5)}, "group_size=-5"),
        ({**CT, **group(type="float")}, "type='float'"),
        ({**CT, "format": "float-quantized", **group(type="float", num_bits=4)}, "num_bits=4"),
        ({**CT, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({**CT, "transform_config": {"config_groups": {"R3": {}}}}, "transform_config"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "e5m2"),
    ],
    ids=str,
)
def test_what_nobody_implements_is_refused_by_name(config: dict[str, Any], named: str) -> None:
    if not named:
        assert quantized_format({"quantization_config": config}) is None
        return
    with pytest.raises(UnsupportedModelError, match=r"choose|positive|are read") as caught:
        quantized_format({"quantization_config": config})
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("gptq", "it must be an object"),
        ({"quant_method": "gptq", "group_size": 32}, "bits is None"),
        ({**GPTQ, "group_size": "32"}, "group_size is '32'"),
        ({**GPTQ, "bits": True}, "bits is True"),
        ({**GPTQ, "dynamic": 1}, "dynamic is 1"),
        ({**AWQ, "modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'"),
        ({**CT, "config_groups": {}}, "config_groups"),
        ({**CT, "config_groups": {"a": {"targets": ["Linear"]}}}, "no object weights"),
        ({**CT, "ignore": ["re:("]}, "no regular expression"),
        ({**CT, **group(strategy=None, group_size=[])}, "group_size is []"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({**CT, **group(strategy="block", num_bits=8)}, "block_structure"),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense(config: object, named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        quantized_format({"quantization_config": config})
    assert named in str(caught.value)


SCALES = {
    "gptq": "scales",
    "awq": "scales",
    "pack-quantized": "weight_scale",
    "int-quantized": "weight_scale",
    "float-quantized": "weight_scale",
    "fp8": "weight_scale_inv",
}


def assert_refused(folder: Path, written: Written, suffix: str, problem: str) -> None:
    save_folder(folder, written)
    with pytest.raises(CheckpointError) as caught:
        HuggingFaceCheckpoint(folder)
    message = str(caught.value)
    assert f"{LAYER}.{suffix}" in message
    assert str(folder / "model.safetensors") in message
    assert problem in message
    assert "again" in message


@pytest.mark.parametrize("method", WRITERS)
@pytest.mark.parametrize("value", [0.0, -0.5, NAN, float("inf")])
def test_scales_that_are_not_positive_numbers(tmp_path: Path, method: str, value: float) -> None:
    written = WRITERS[method]()
    written.tensors[SCALES[method]][-1] = value
    assert_refused(tmp_path, written, SCALES[method], "all must be positive")


@pytest.mark.parametrize("method", WRITERS)
def test_scales_of_another_shape(tmp_path: Path, method: str) -> None:
    written = WRITERS[method]()
    scales = written.tensors[SCALES[method]]
    written.tensors[SCALES[method]] = torch.cat([scales, scales])
    assert_refused(tmp_path, written, SCALES[method], "has shape")


@pytest.mark.parametrize("method", WRITERS)
def test_scales_that_are_missing_or_integers(tmp_path: Path, method: str) -> None:
    written = WRITERS[method]()
    scales = written.tensors.pop(SCALES[method])
    assert_refused(tmp_path, written, SCALES[method], "is missing")
    written.tensors[SCALES[method]] = scales.int()
    assert_refused(tmp_path, written, SCALES[method], "has dtype I32")


def test_zero_points_out_of_range(tmp_path: Path) -> None:
    written = gptq()
    written.tensors["qzeros"] = packed(torch.full((2, 16), 15), 4)
    assert_refused(tmp_path, written, "qzeros", "zero points of 16, out of range for 4 bits")
    eight = gptq(bits=8)
    eight.tensors["qzeros"] = packed(torch.full((2, 16), 255), 8)
    assert_refused(tmp_path, eight, "qzeros", "zero points of 256, out of range for 8 bits")
    channel = int_quantized(symmetric=False)
    channel.tensors["weight_zero_point"] = channel.tensors["weight_zero_point"].float() + 300
    assert_refused(tmp_path, channel, "weight_zero_point", "out of range for 8 bits")


@pytest.mark.parametrize(("writer", "suffix"), [(gptq, "g_idx"), (pack_quantized, "weight_g_idx")])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda index: index[:1].fill_(2), "names group 2, there are 2"),
        (lambda index: index[:1].fill_(-3), "names group -3"),
        (lambda index: index.fill_(0).__setitem__(0, 1), "no multiple of 32"),
    ],
)
def test_groups_of_inputs_out_of_range(
    tmp_path: Path, writer: Any, suffix: str, change: Callable[[torch.Tensor], object], problem: str
) -> None:
    written = writer(act_order=True)
    change(written.tensors[suffix])
    assert_refused(tmp_path, written, suffix, problem)


@pytest.mark.parametrize(
    ("written", "changes", "suffix"),
    [
        (gptq(), {"bits": 8}, "scales"),
        (gptq(), {"group_size": 64}, "scales"),
        (gptq(group_size=-1), {"bits": 8}, "qzeros"),
        (awq(), {"group_size": 16}, "scales"),
        (pack_quantized(), group(num_bits=8), "weight_packed"),
        (pack_quantized(), group(group_size=64), "weight_scale"),
        (pack_quantized(), group(symmetric=False), "weight_zero_point"),
        (int_quantized(), {"format": "float-quantized", **group(num_bits=8, type="float")}, "weight"),
        (float_quantized(), {"format": "int-quantized", **group(num_bits=8)}, "weight"),
        (fp8(), {"weight_block_size": [8, 8]}, "weight_scale_inv"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors(
    tmp_path: Path, written: Written, changes: dict[str, Any], suffix: str
) -> None:
    changed = Written({**written.config, **changes}, written.tensors, written.values)
    assert_refused(tmp_path, changed, suffix, "")


def test_a_layer_that_should_not_be_quantized(tmp_path: Path) -> None:
    for written, field in (
        (gptq(), "modules_to_not_convert"),
        (awq(), "modules_to_not_convert"),
        (fp8(), "ignored_layers"),
        (int_quantized(), "ignore"),
    ):
        entry = LAYER if field == "ignore" else "self_attn.q_proj"
        folder = save_folder(tmp_path, Written({**written.config, field: [entry]}, written.tensors, written.values))
        with pytest.raises(CheckpointError, match=f"says that {LAYER} is not quantized"):
            HuggingFaceCheckpoint(folder)


def test_ignored_layers_are_named_by_whole_words_and_patterns(tmp_path: Path) -> None:
    gate = {**awq().config, "modules_to_not_convert": ["self_attn.q", "lm_head"]}
    HuggingFaceCheckpoint(save_folder(tmp_path, Written(gate, awq().tensors, awq().values)))
    pattern = {**int_quantized().config, "ignore": ["re:.*q_proj$"]}
    folder = save_folder(tmp_path, Written(pattern, int_quantized().tensors, int_quantized().values))
    with pytest.raises(CheckpointError, match="is not quantized"):
        HuggingFaceCheckpoint(folder)


def test_a_configuration_without_quantized_tensors(tmp_path: Path) -> None:
    written = Written(gptq().config, {"weight": torch.ones(4, 4)}, torch.ones(4, 4))
    with pytest.raises(CheckpointError, match="no tensor is: remove quantization_config"):
        HuggingFaceCheckpoint(save_folder(tmp_path, written))


def test_a_layer_that_no_group_names(tmp_path: Path) -> None:
    written = int_quantized()
    config = json.loads(json.dumps(written.config))
    config["config_groups"]["group_0"]["targets"] = ["re:.*k_proj"]
    folder = save_folder(tmp_path, Written(config, written.tensors, written.values))
    with pytest.raises(CheckpointError, match=f"has the target {LAYER}"):
        HuggingFaceCheckpoint(folder)


def test_a_file_that_ends_within_its_tensors(tmp_path: Path) -> None:
    path = save_folder(tmp_path, gptq()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        HuggingFaceCheckpoint(tmp_path)


def test_a_copy_of_plain_weights_names_no_quantization(tmp_path: Path) -> None:
    target = tmp_path / "plain"
    target.mkdir()
    written = gptq()
    write_hf_folder(HuggingFaceCheckpoint(save_folder(tmp_path / "a", written)), target, torch.float32)
    copy = HuggingFaceCheckpoint(target)
    assert "quantization_config" not in copy.hf_config()
    assert torch.equal(dict(copy.tensors())[f"{LAYER}.weight"], written.values)


ODD_TENSORS = [
    torch.tensor(1.0),
    torch.ones(0),
    torch.ones(3),
    torch.ones(1, 1, dtype=torch.int32),
    torch.full((2, 2), -1, dtype=torch.int32),
    torch.ones(2, 3, 4),
    torch.ones(16, 64).to(torch.float8_e5m2),
    torch.ones(16, 64, dtype=torch.int8),
    torch.full((2,), 2**62),
    torch.zeros(0, 8, dtype=torch.int32),
]
ODD_FIELDS: list[Any] = [None, -1, 0, 2**70, True, "x", [], {}, [1], {"a": 1}, {"a": {}}, 1.5]


@settings(max_examples=150, deadline=None)
@given(
    method=st.sampled_from([*WRITERS, *TABLE_WRITERS]),
    which=st.integers(0, 9),
    tensor=st.one_of(st.none(), st.integers(0, len(ODD_TENSORS) - 1)),
    field=st.integers(0, 9),
    value=st.one_of(st.none(), st.integers(0, len(ODD_FIELDS) - 1)),
)
def test_whatever_stands_in_a_folder_is_read_or_is_an_error_of_the_model(
    method: str, which: int, tensor: int | None, field: int, value: int | None
) -> None:
    written = {**WRITERS, **TABLE_WRITERS}[method]()
    tensors, config = dict(written.tensors), json.loads(json.dumps(written.config))
    if tensor is not None:
        tensors[sorted(tensors)[which % len(tensors)]] = ODD_TENSORS[tensor]
    if value is not None:
        holders = [config]
        if "config_groups" in config:
            holders += [config["config_groups"]["group_0"], config["config_groups"]["group_0"]["weights"]]
        holder = holders[field % len(holders)]
        holder[sorted(holder)[which % len(holder)]] = ODD_FIELDS[value]
    with TemporaryDirectory() as folder:
        save_folder(Path(folder), Written(config, tensors, written.values))
        try:
            for _, stored in HuggingFaceCheckpoint(folder).stored_tensors():
                stored.values()
        except ModelError:
            return

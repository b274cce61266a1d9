"""Every architecture in every family of weight formats: the engine against transformers with the values of the codes.

`cascade-llm env --models` and the README's table say what is served; a cell of it is a case here, or in
`test_families` (plain float32) and `tests/models/test_decoder.py` (plain bfloat16).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from cascade_llm import SamplingParams
from cascade_llm.loader.gguf_architectures import GGUF_ARCHITECTURES
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.models.architectures import ARCHITECTURES
from cascade_llm.weights.format import StoredTensor
from cascade_llm.weights.quantize import quantized
from tests.engine.test_families import assert_as_transformers
from tests.engine.tiny_llm import CONTEXT, random_forest, tiny_llm
from tests.loader.gguf_files import TensorType, write_model
from tests.loader.quantized_files import Written, awq, gptq, pack_quantized
from tests.loader.table_files import bnb4, llm_int8, modelopt_fp8, modelopt_nvfp4
from tests.models.checkpoints import TINY, tiny_model
from tests.models.families import FAMILIES

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 2}
"""Whole blocks of 32 in every matrix."""
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "num_attention_heads": 16,
}
"""Whole super-blocks."""
WITH_SUPER_BLOCKS = ("in situ q4_k", "GGUF Q4_K_M")
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "qwen2_moe": {"shared_expert_intermediate_size": 64},
    "mixtral": {"sliding_window": 24},  # as Mistral's here: shorter than the longest sequence
}
GGUF_CHANGES: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
}
"""GGUF has no key for their windows, since their files are llama's."""
PROJECTIONS = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
EXACT_NAMES = (".gate.weight", ".router.weight", "shared_expert_gate.weight", "_bias")
"""Routers, and biases of stacks, which no rounding touches."""
HEAD_NAMES = ("embed_tokens.weight", "lm_head.weight")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)

State = Mapping[str, torch.Tensor]


def rounded(method: str, values: torch.Tensor) -> torch.Tensor:
    """What codes of a matrix, or of a stack of them, stand for; blocks lie along the last side."""
    return quantized(method, StoredTensor.plain(values.flatten(0, -2))).values().view(values.shape)


def with_stacks(model: PreTrainedModel, state: State) -> State:
    """Matrices of experts joined, as the model has them: in gpt-oss with inputs first, and outputs in turns."""
    joined, in_turns = dict(state), model.config.model_type == "gpt_oss"
    for name, values in model.state_dict().items():
        block, _, whole = name.rpartition("experts.")
        if not block or name in state:
            continue
        kind = "bias" if whole.endswith("_bias") else "weight"
        parts = ("gate_proj", "up_proj") if whole.startswith("gate_up") else ("down_proj",)
        stack = []
        for expert in range(len(values)):
            own = [joined.pop(f"{block}experts.{expert}.{part}.{kind}") for part in parts]
            stack.append(torch.stack(own, dim=1).flatten(0, 1) if in_turns else torch.cat(own))
        joined[name] = torch.stack(stack).transpose(1, -1 if in_turns else 1)
    return joined


def q4_k_m(name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
    """About as llama.cpp mixes them; rows that are no whole super-blocks have a type of 32."""
    if "ffn_gate_inp" in name:
        return GGMLQuantizationType.F32
    if shape[-1] % 256:
        return GGMLQuantizationType.Q8_0
    is_finer = name.startswith(("output", "token_embd")) or "attn_v" in name or "ffn_down" in name
    return GGMLQuantizationType.Q6_K if is_finer else GGMLQuantizationType.Q4_K


def mxfp4_moe(name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
    """Experts in MXFP4, all else in Q8_0, as llama.cpp ships gpt-oss."""
    if "ffn_gate_inp" in name or name.endswith("bias"):
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.MXFP4 if "_exps" in name else GGMLQuantizationType.Q8_0


def gguf_file(kind: TensorType) -> Callable[[PreTrainedModel, Path], tuple[Path, State]]:
    def write(model: PreTrainedModel, folder: Path) -> tuple[Path, State]:
        path = write_model(folder / "tiny.gguf", model, tensor_type=kind)
        return path, with_stacks(model, {name: values.float() for name, values in open_checkpoint(path).tensors()})

    return write


def in_situ(method: str) -> Callable[[PreTrainedModel, Path], tuple[Path, State]]:
    def write(model: PreTrainedModel, folder: Path) -> tuple[Path, State]:
        model.save_pretrained(folder)
        state = dict(model.state_dict())
        for name, values in state.items():
            if values.dim() > 1 and not name.endswith(EXACT_NAMES):
                state[name] = rounded("q8_0" if name.endswith(HEAD_NAMES) else method, values)
            if model.config.model_type == "gpt_oss" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                state[name] = rounded(method, values.transpose(1, 2).contiguous()).transpose(1, 2)  # inputs first
        return folder, state

    return write


def quantized_folder(
    config: Mapping[str, Any], parts_of: Callable[[torch.Tensor], Mapping[str, torch.Tensor]]
) -> Callable[[PreTrainedModel, Path], tuple[Path, State]]:
    """Projections, those of experts too, as a quantizer of Hugging Face saves them.

    Args:
        config: `quantization_config`
        parts_of: the tensors that a matrix is stored in, by suffix
    """

    def write(model: PreTrainedModel, folder: Path) -> tuple[Path, State]:
        model.save_pretrained(folder)
        tensors = {}
        for name, values in load_file(folder / "model.safetensors").items():
            is_quantized = values.dim() == 2 and name.endswith(PROJECTIONS)
            parts = parts_of(values) if is_quantized else {"weight": values}
            layer = name.removesuffix(".weight")
            tensors |= {f"{layer}.{suffix}": part for suffix, part in parts.items()} if is_quantized else {name: values}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**fields, "quantization_config": config}))
        own_name = ARCHITECTURES[model.config.model_type].tensor_name
        values_of = {own_name(name): values.float() for name, values in open_checkpoint(folder).tensors()}
        return folder, with_stacks(model, values_of)

    return write


def fp8_parts(values: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """A scale for all."""
    scale = values.abs().amax() / 448
    return {"weight": (values / scale).to(torch.float8_e4m3fn), "weight_scale": scale.reshape(1)}


def written_parts(writer: Callable[..., Written]) -> Callable[[torch.Tensor], Mapping[str, torch.Tensor]]:
    """Random codes of the matrix's shape, scaled as the model's own values."""

    def parts_of(values: torch.Tensor) -> Mapping[str, torch.Tensor]:
        return {name: part.contiguous() for name, part in writer(values.shape[0], *values.shape).tensors.items()}

    return parts_of


FORMATS: Mapping[str, Callable[[PreTrainedModel, Path], tuple[Path, State]]] = {
    "GGUF F32": gguf_file(GGMLQuantizationType.F32),
    "GGUF Q8_0": gguf_file(GGMLQuantizationType.Q8_0),
    "GGUF Q4_1": gguf_file(GGMLQuantizationType.Q4_1),
    "GGUF Q4_K_M": gguf_file(q4_k_m),
    "GGUF MXFP4": gguf_file(mxfp4_moe),
    "safetensors FP8": quantized_folder({"quant_method": "fp8", "fmt": "e4m3"}, fp8_parts),
    "safetensors GPTQ": quantized_folder(gptq().config, written_parts(gptq)),
    "safetensors AWQ": quantized_folder(awq().config, written_parts(awq)),
    "safetensors compressed-tensors": quantized_folder(pack_quantized().config, written_parts(pack_quantized)),
    "safetensors modelopt NVFP4": quantized_folder(modelopt_nvfp4().config, written_parts(modelopt_nvfp4)),
    "safetensors modelopt FP8": quantized_folder(modelopt_fp8().config, written_parts(modelopt_fp8)),
    "safetensors bitsandbytes NF4": quantized_folder(bnb4().config, written_parts(partial(bnb4, nested=True))),
    "safetensors bitsandbytes int8": quantized_folder(llm_int8().config, written_parts(llm_int8)),
    "in situ q8_0": in_situ("q8_0"),
    "in situ int4": in_situ("int4"),
    "in situ q4_k": in_situ("q4_k"),
}


def has_experts(architecture: str) -> bool:
    return bool({"num_experts", "num_local_experts"} & FAMILIES[architecture].fields.keys())


SERVED_GGUF = {name for held in GGUF_ARCHITECTURES.values() for name in (held.hf_class, *held.also_holds)}
OF_EXPERTS = ("in situ q4_k", "GGUF MXFP4")
"""What is tested of architectures with experts alone: of what are no experts it is in `test_quantization`."""


def is_served(architecture: str, name: str) -> bool:
    """gpt-oss has MXFP4 of its own, below."""
    if name in OF_EXPERTS and not has_experts(architecture):
        return False
    if name.startswith("GGUF"):
        return ARCHITECTURES[architecture].hf_class in SERVED_GGUF
    return not (architecture == "gpt_oss" and name.startswith("safetensors"))


FAST = {("phi3", "GGUF Q8_0"), ("glm4", "in situ int4"), ("mistral", "safetensors FP8"), ("mixtral", "GGUF Q4_K_M")}
"""One case of each way in which fused tensors are cut, one with a window, and experts in super-blocks, in every run."""
CELLS = [
    pytest.param(architecture, name, marks=[] if (architecture, name) in FAST else pytest.mark.slow)
    for architecture in FAMILIES
    for name in FORMATS
    if is_served(architecture, name)
]


@pytest.mark.parametrize(("architecture", "name"), CELLS)
def test_codes_are_served_as_their_values(architecture: str, name: str, tmp_path: Path) -> None:
    wide = WIDE if name in WITH_SUPER_BLOCKS else {}
    ggufs = GGUF_CHANGES.get(architecture, {}) if name.startswith("GGUF") else {}
    own = {"max_position_embeddings": CONTEXT, **SIZES, **CHANGES.get(architecture, {}), **ggufs, **wide}
    model = tiny_model(architecture, **own)
    source, state = FORMATS[name](model, tmp_path)
    prompts = random_forest(1, 4, TINY["vocab_size"], 20)
    method = name.removeprefix("in situ ") if name.startswith("in situ") else None
    with tiny_llm(source, exact_activations=True, quantization=method) as llm:
        outputs = llm.generate(prompts, GREEDY)
    missing = model.load_state_dict(dict(state), strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}
    assert_as_transformers(model, prompts, outputs)


def test_mxfp4_folder(tmp_path: Path) -> None:
    """gpt-oss as it is shipped: experts in MXFP4, all else plain; transformers has what the bytes stand for."""
    own = {"max_position_embeddings": CONTEXT, **SIZES, "num_local_experts": 4}
    model = tiny_model("gpt_oss", **own)
    model.save_pretrained(tmp_path)
    tensors, generator = load_file(tmp_path / "model.safetensors"), torch.Generator().manual_seed(0)
    state = dict(model.state_dict())
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(122, 125, blocks.shape[:3], dtype=torch.uint8, generator=generator)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        state[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    prompts = random_forest(1, 3, TINY["vocab_size"], 20)
    with tiny_llm(tmp_path, exact_activations=True) as llm:
        outputs = llm.generate(prompts, GREEDY)
    model.load_state_dict(state)
    assert_as_transformers(model, prompts, outputs)

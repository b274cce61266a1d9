#!/usr/bin/env python
"""Quantize a dense folder by a format's own tool, and keep what the tool's own reading of the result foretells.

    python -m venv /some/venv && /some/venv/bin/pip install torch==2.13.0 transformers PACKAGES
    PYTHONPATH=. /some/venv/bin/python scripts/quantized_folders.py TOOL DENSE_FOLDER OUT_FOLDER [SCHEME ...]

    TOOL            PACKAGES                              how
    bitsandbytes    bitsandbytes==0.50.2 accelerate       transformers rounds while it loads, and saves
    llmcompressor   llmcompressor==0.14.0.1               `oneshot`
    modelopt        nvidia-modelopt[hf]==0.47.0           `quantize`, `export_hf_checkpoint`

Every scheme becomes a folder. Beside its weights lies `twin_logprobs.json`: token ids, and the log-probability of each
after the first, computed in float32 from the weights that the tool itself dequantizes, inputs as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TWIN_FILE"]

TWIN_FILE = "twin_logprobs.json"
NUM_PROMPTS, PROMPT_LEN = 4, 64
NUM_SAMPLES, SAMPLE_LEN = 8, 128
"""Of the text that quantizers look at."""
HEAD = "lm_head"


def tokens_of(tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> torch.Tensor:
    """int64 [count, length] of the end of Python's language reference; `benchmarks perplexity` reads its beginning."""
    text = "\n\n".join(topics[name] for name in sorted(topics)[-20:])
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: count * length]).view(count, length)


@torch.inference_mode()
def write_twin(folder: Path, model: PreTrainedModel, token_ids: torch.Tensor) -> None:
    """Log-probabilities of `token_ids` [n, length] by a model whose weights are plain."""
    logits = model.eval().float()(token_ids).logits[:, :-1]
    logprobs = logits.float().log_softmax(-1).gather(-1, token_ids[:, 1:, None])[..., 0]
    record = {"token_ids": token_ids.tolist(), "logprobs": logprobs.tolist()}
    (folder / TWIN_FILE).write_text(json.dumps(record), encoding="utf-8")


BITS_AND_BYTES: Mapping[str, Mapping[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def by_bitsandbytes(scheme: str, dense: Path, folder: Path) -> PreTrainedModel:
    """Rounded while loading."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**BITS_AND_BYTES[scheme])
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    return again.dequantize()


GROUP_LEN = 64
"""Of integers: SmolLM2's 576 inputs are no multiple of 128."""
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP_LEN}
LLM_COMPRESSOR: Mapping[str, str | Mapping[str, Any]] = {
    "w4a16": {**INT4, "symmetric": True},
    "w8a8": "W8A8",
    "fp8-dynamic": "FP8_DYNAMIC",
    "nvfp4": "NVFP4A16",
    "mxfp4": "MXFP4A16",
}
LOOKED_AT = ("w4a16",)
"""Schemes that are rounded by GPTQ, on samples; the others to the nearest."""


def by_llmcompressor(scheme: str, dense: Path, folder: Path) -> PreTrainedModel:
    """By its modifiers, in the layouts of compressed-tensors."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers.utils.quantization_config import CompressedTensorsConfig

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    preset = LLM_COMPRESSOR[scheme]
    how: dict[str, Any] = {"targets": "Linear", "scheme": preset}
    if not isinstance(preset, str):
        how = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": dict(preset)}}}
    if scheme in LOOKED_AT:
        samples = tokens_of(AutoTokenizer.from_pretrained(dense), NUM_SAMPLES, SAMPLE_LEN)
        rows = [{"input_ids": row, "attention_mask": [1] * SAMPLE_LEN} for row in samples.tolist()]
        oneshot(model=model, recipe=GPTQModifier(**how, ignore=[HEAD]), dataset=Dataset.from_list(rows))
    else:
        oneshot(model=model, recipe=QuantizationModifier(**how, ignore=[HEAD]))
    model.save_pretrained(folder, save_compressed=True)
    plain = CompressedTensorsConfig(run_compressed=False)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=plain, dtype=torch.float32)


MODELOPT = {"fp8": "FP8_DEFAULT_CFG", "nvfp4": "NVFP4_DEFAULT_CFG"}


def by_modelopt(scheme: str, dense: Path, folder: Path) -> PreTrainedModel:
    """Scales of inputs are set on samples; the twin has none."""
    import modelopt.torch.quantization as quantization
    from modelopt.torch.export import export_hf_checkpoint

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    samples = tokens_of(AutoTokenizer.from_pretrained(dense), NUM_SAMPLES, SAMPLE_LEN)

    def look(looked_at: PreTrainedModel) -> None:
        for row in samples:
            looked_at(row[None])

    model = quantization.quantize(model, getattr(quantization, MODELOPT[scheme]), look)
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=folder)
    return modelopt_twin(folder, dense)


def modelopt_twin(folder: Path, dense: Path) -> PreTrainedModel:
    """What was exported, decoded by the package's own tensors: its simulation of NVFP4 runs on CUDA alone."""
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    tensors = load_file(folder / "model.safetensors")
    twin = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    own = dict(twin.named_parameters())
    for layer in (name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")):
        codes, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"]
        if (factor := tensors.get(f"{layer}.weight_scale_2")) is not None:
            packed = NVFP4QTensor(own[f"{layer}.weight"].shape, torch.float32, codes)
            values = packed.dequantize(scale=scale, double_scale=factor, block_sizes={-1: 16})
        else:
            values = FP8QTensor(codes.shape, torch.float32, codes).dequantize(scale=scale.view(-1, 1))
        own[f"{layer}.weight"].data.copy_(values)
    return twin


TOOLS: Mapping[str, tuple[Sequence[str], Callable[[str, Path, Path], PreTrainedModel]]] = {
    "bitsandbytes": (tuple(BITS_AND_BYTES), by_bitsandbytes),
    "llmcompressor": (tuple(LLM_COMPRESSOR), by_llmcompressor),
    "modelopt": (tuple(MODELOPT), by_modelopt),
}


def main(arguments: Sequence[str], tell: Callable[[str], object] = print) -> int:
    """One line for each folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("dense", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("schemes", nargs="*")
    given = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    tokenizer = AutoTokenizer.from_pretrained(given.dense)
    prompts = tokens_of(tokenizer, NUM_PROMPTS, PROMPT_LEN)
    schemes, quantize = TOOLS[given.tool]
    for scheme in given.schemes or schemes:
        folder, before = given.out / f"{given.tool}-{scheme}", time.process_time()
        twin = quantize(scheme, given.dense, folder)
        write_twin(folder, twin, prompts)
        tokenizer.save_pretrained(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        tell(f"{folder.name}: {size / 1e6:.1f} MB, {time.process_time() - before:.0f} s of processors")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

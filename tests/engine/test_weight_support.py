from __future__ import annotations

import pytest
import torch

from cascade_llm.engine import weight_support as weight_support_module
from cascade_llm.engine.weight_support import held_matrix, weight_support
from cascade_llm.loader.stored_types import stored_types
from cascade_llm.models.architectures import ARCHITECTURES
from cascade_llm.weights.format import WeightOptions
from tests.doubles.torch_products import cuda_products


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_type_is_served_or_says_why(dtype: str) -> None:
    rows = {(row.container, row.type): row for row in weight_support(dtype, "cpu")}
    assert {("GGUF", name) for name in ("F32", "Q4_0", "Q4_K", "Q6_K", "IQ4_NL", "MXFP4")} <= rows.keys()
    assert {("safetensors", name) for name in ("F32", "F16", "BF16", "GPTQ-4", "W8A8")} <= rows.keys()
    for row in rows.values():
        if row.held_as is None:
            assert row.note is not None
            assert row.note.startswith("not read: ")
            assert row.architectures == ()
        else:
            assert set(row.architectures) <= set(ARCHITECTURES)
            assert row.file_bits is not None
            assert row.memory_bits is not None
            is_slow = row.type == "bitsandbytes NF4"
            assert (row.note is None) == (row.memory_bits <= 1.5 * row.file_bits and not is_slow)
            assert ("prompts are slower" in (row.note or "")) == is_slow
    assert rows["GGUF", "Q8_0"].file_bits == 8.5
    assert rows["safetensors", "BF16"].file_bits == 16
    assert rows["safetensors", "F32"].architectures == tuple(ARCHITECTURES)


def test_on_a_hopper_gpu_four_bits_and_float8_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of decision 0024; nothing is computed, since memory of "meta" has no content."""
    monkeypatch.setattr(weight_support_module, "resolve_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(weight_support_module, "compute_capability", lambda device: (9, 0))
    with cuda_products():
        held = {row.type: row.held_as for row in weight_support("bfloat16", "cuda") if row.held_as is not None}
    assert {name for name, kind in held.items() if kind == "cuda_int4"} == {
        *("Q4_0", "Q4_1", "Q4_K", "GPTQ-4", "AWQ-4", "W4A16")
    }
    assert {name for name, kind in held.items() if kind == "cuda_fp8"} == {"FP8"}
    assert set(held.values()) == {"cuda_int4", "cuda_fp8", "dense"}


def test_an_example_multiplies_as_its_values_do() -> None:
    """The bits of the table are those of matrices that work, in every type."""
    options = WeightOptions(dtype=torch.float32, device=torch.device("cpu"), exact_activations=True)
    generator = torch.Generator().manual_seed(0)
    examples = [stored_type.example for stored_type in stored_types() if stored_type.example is not None]
    assert len(examples) > 20
    for example in examples:
        x = torch.randn(2, example.shape[1], generator=generator)
        with torch.inference_mode():
            y = held_matrix(example, options).multiply(x)
        weights = example.values().float().T
        largest = x.abs() @ weights.abs()  # a kernel may round its inputs, to 8 bits
        assert largest.min() > 0, example.format
        assert (y - x @ weights).abs().le(0.02 * largest).all(), example.format

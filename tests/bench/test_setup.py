from __future__ import annotations

from pathlib import Path

import pytest

from cascade_llm.bench.setup import open_model
from cascade_llm.weights.packed_kernels import reason_against_packed
from tests.engine.tiny_llm import save_tiny
from tests.native_code import expect_native


def test_weights_are_counted_in_the_bytes_that_they_take(tmp_path: Path) -> None:
    """SmolLM2's file has Q4_1 in the layers and Q8_0 in the embedding, which is the head: 5 and 8.5 bits."""
    expect_native(reason_against_packed())
    smollm2 = open_model("smollm2", {}).shape()
    assert smollm2.weight_bytes == 106_168_320 * 5 / 8
    assert smollm2.head_bytes == 49_152 * 576 * 8.5 / 8
    folder = save_tiny(tmp_path, hidden_size=96, intermediate_size=160)
    plain, rounded = (
        open_model(str(folder), {"dtype": "float32", "quantization": quantization}).shape()
        for quantization in (None, "int4")
    )
    assert rounded.weight_bytes == pytest.approx(plain.weight_bytes * 5 / 32, rel=1e-3)
    assert rounded.head_bytes == pytest.approx(plain.head_bytes * 8.5 / 32, rel=1e-3)

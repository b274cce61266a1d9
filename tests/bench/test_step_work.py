"""The least work of a step, against counting by hand and against the engine's own reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from cascade_llm.bench.instruments import recorded_plans
from cascade_llm.bench.step_work import ModelShape, Work, floor_s, step_work, total_work
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.sampling_params import SamplingParams
from tests.engine.tiny_llm import tiny_llm
from tests.models.checkpoints import decoder_of, hf_config_of, tiny_model

SHAPE = ModelShape(
    weight_bytes=1000,
    head_bytes=100,
    layer_flops_per_row=10,
    head_flops_per_row=7,
    kv_bytes_per_token=8,
    attention_flops_per_row_token=3,
)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_shape_counts_the_weights_that_the_decoder_has(architecture: str) -> None:
    model = tiny_model(architecture)
    decoder, config = decoder_of(model), model_config_from_hf(hf_config_of(model))
    shape = ModelShape.of(config, layer_weight_bytes=0.5, head_weight_bytes=4, kv_dtype_bytes=2)
    *layer_sizes, head = (linear.spec.in_features * linear.spec.out_features for linear in decoder.linears)
    layers = sum(layer_sizes)
    assert (shape.weight_bytes, shape.head_bytes) == (layers / 2, 4 * head)
    assert (shape.layer_flops_per_row, shape.head_flops_per_row) == (2 * layers, 2 * head)
    assert shape.kv_bytes_per_token == 2 * 3 * 2 * config.head_dim * 2  # K and V, layers, KV heads, head_dim, bytes


@pytest.mark.parametrize("cascade", [True, False])
def test_a_prefix_is_read_once_whatever_the_plan_does(tiny: Path, cascade: bool) -> None:
    prefix, suffixes = list(range(3, 23)), [[30 + i, 40 + i] for i in range(5)]
    with tiny_llm(tiny, enable_cascade_attention=cascade, max_num_batched_tokens=256) as llm:
        with recorded_plans(llm) as plans:
            llm.generate([prefix + own for own in suffixes], SamplingParams(max_tokens=3, ignore_eos=True))
        assert len(plans) == 3
        prefill, *decodes = [step_work(plan, SHAPE) for plan in plans]
        assert llm.engine.scheduler.schedule() is None, "the engine is as it was"
    num_rows = 20 + 5 * 2
    assert prefill.linear_flops == num_rows * 10 + 5 * 7
    assert prefill.kv_bytes == num_rows * 8, "what the step itself writes is not read again"
    positions = [*range(20), *[20, 21] * 5]
    assert prefill.attention_flops == 3 * sum(position + 1 for position in positions)
    for step, work in enumerate(decodes, start=1):
        # all but the rows' own tokens are read: the prefix once, and of each sequence what is its own
        assert work.kv_bytes == 8 * (20 + 5 * (2 + step - 1) + 5)
        assert work.weight_bytes == 1100
        assert work.attention_flops == 5 * 3 * (22 + step)


def test_floor_takes_the_larger_of_bytes_and_flops_step_by_step() -> None:
    bound_by_bytes, bound_by_flops = Work(1, 90, 10, 5, 5), Work(1, 1, 1, 60, 40)
    seconds = floor_s([bound_by_bytes, bound_by_flops], bytes_per_s=50.0, flops_per_s=20.0)
    assert seconds == 100 / 50 + 100 / 20
    seconds = floor_s([bound_by_bytes, bound_by_flops], bytes_per_s=50.0, flops_per_s=20.0, linear_flops_per_s=30.0)
    assert seconds == 100 / 50 + 60 / 30 + 40 / 20
    assert total_work([bound_by_bytes, bound_by_flops]) == Work(2, 91, 11, 65, 45)
    assert total_work([]) == Work(0, 0, 0, 0, 0)

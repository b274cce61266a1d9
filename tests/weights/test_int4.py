from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cascade_llm.weights.int4 import GROUP_LEN, MAX_ROWS, Int4, quantize
from tests.weights.matrices import filled, matrix_in, matrix_spec


def random_weight(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(outputs, inputs, generator=generator)
    return rows * torch.rand(outputs, 1, generator=generator) + 0.1 * torch.randn(outputs, 1, generator=generator)


def codes_on_grid(outputs: int, inputs: int) -> torch.Tensor:
    """Codes [outputs, groups, 32] of which every group uses the smallest and the largest."""
    codes = torch.randint(0, 16, (outputs, inputs // GROUP_LEN, GROUP_LEN))
    codes[..., 3], codes[..., 17] = 0, 15
    return codes


@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (48, 96), (960, 576), (4112, 64)])
def test_every_weight_is_within_half_a_step_of_its_group(outputs: int, inputs: int) -> None:
    weight = random_weight(outputs, inputs)
    *_, values = quantize(weight)
    groups = weight.unflatten(1, (-1, GROUP_LEN))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    root_mean_square = (values.unflatten(1, (-1, GROUP_LEN)) - groups).square().mean(-1, keepdim=True).sqrt()
    rounding = groups.abs().amax(-1, keepdim=True) * 2**-7  # scale and zero are held in bfloat16
    assert (root_mean_square <= (high - low) / 15 / 2 + rounding).all()


def test_values_of_q4_1_blocks_come_back_but_for_the_rounding_of_scale_and_minimum() -> None:
    torch.manual_seed(1)
    scale = torch.rand(64, 6, 1).half().float() / 20
    minimum = -(scale * torch.randint(5, 11, scale.shape)).half().float()
    weight = (minimum + scale * codes_on_grid(64, 192)).flatten(1)
    *_, values = quantize(weight)
    bound = (15 * scale * 2**-8 + 2**-8 * minimum.abs()).expand(-1, -1, GROUP_LEN).flatten(1)
    assert ((values - weight).abs() <= bound).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_values_of_q4_0_blocks_with_bfloat16_scales_come_back_exactly(sign: int) -> None:
    torch.manual_seed(2)
    codes = torch.randint(0, 14, (32, 4, GROUP_LEN))  # code 15 is rarely used by Q4_0: its grid is not the spanning one
    codes[..., 5] = 0
    scale = sign * (torch.rand(32, 4, 1) + 0.01).bfloat16().float()
    weight = ((codes - 8) * scale).flatten(1)
    *_, values = quantize(weight)
    assert torch.equal(values, weight)


def test_groups_of_one_value_are_exact() -> None:
    weight = torch.zeros(16, 64)
    weight[:, 32:] = 0.75
    *_, values = quantize(weight)
    assert torch.equal(values, weight)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 2, 5, MAX_ROWS])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (80, 64), (960, 576), (576, 1536)])
def test_the_kernel_computes_with_the_values_that_are_told(outputs: int, inputs: int, rows: int) -> None:
    weight = random_weight(outputs, inputs, seed=rows)
    *_, values = quantize(weight)
    spec = matrix_spec(inputs, outputs, torch.bfloat16, quantization="int4", stored_dtype=torch.float32)
    matrix = filled(matrix_in(spec, "int4"), weight)
    x = torch.randn(rows, inputs).bfloat16()
    expected = x.double() @ values.double().T
    scale = x.double().abs() @ values.double().abs().T  # of the sums that rounding errors are relative to
    assert ((matrix.multiply(x) - expected).abs() <= 2**-7 * scale).all()


def test_a_weight_takes_five_bits() -> None:
    codes, scales_and_zeros, _ = quantize(random_weight(64, 128))
    assert (codes.nbytes + scales_and_zeros.nbytes) * 8 == 5 * 64 * 128


def test_what_cannot_be_served_is_named() -> None:
    assert Int4.reasons_against(matrix_spec(64, 96, torch.bfloat16)) == []
    spec = matrix_spec(48, 40, torch.float32)
    reasons = Int4.reasons_against(replace(spec, options=replace(spec.options, device=torch.device("cuda"))))
    assert len(reasons) == 4
    for reason, part in zip(reasons, ("cuda", "float32", "matrix has 48 inputs", "matrix has 40 outputs"), strict=True):
        assert part in reason

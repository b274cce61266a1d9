"""Constants are found again from times that they made, and measuring works on a small scale. No times are asserted."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.torch_backend import TorchAttentionBackend
from cascade_llm.bench import calibration as bench
from cascade_llm.bench.attention_cases import AttentionCase
from cascade_llm.bench.attention_timing import time_plans
from cascade_llm.bench.calibration import CheckedCase, CheckReport, calibrate, check_choices, fit_costs
from cascade_llm.config import EngineOptions
from cascade_llm.errors import ConfigError
from cascade_llm.scheduler.cascade.cost_model import AttentionShape, CostModel, PlanWork, plan_work
from cascade_llm.scheduler.cascade.device_costs import DEVICE_COSTS, DeviceCosts

SHAPE = AttentionShape(num_qo_heads=9, num_kv_heads=3, head_dim=64, kv_dtype_bytes=2)
TRUE = DeviceCosts(
    shared_bytes_per_s=30e9,
    shared_flops_per_s=250e9,
    leaf_bytes_per_s=9e9,
    leaf_flops_per_s=1e12,
    segment_s=3e-6,
    level_s=20e-6,
    merge_bytes_per_s=5e9,
    tile_rows=8,
    cached_bytes_per_s=21e9,
    llc_bytes=8 << 20,
    leaf_segment_s=0.5e-6,
    step_s=12e-6,
)
SPEC = AttentionSpec(
    num_layers=3,
    num_qo_heads=4,
    num_kv_heads=2,
    head_dim=16,
    sm_scale=0.25,
    dtype=torch.float32,
    device=torch.device("cpu"),
)


def fit_plans() -> list[PlanWork]:
    cases = [AttentionCase.parse(name) for name in bench.FIT_CASES]
    return [plan_work(case.plan(depths)) for case in cases for depths in case.subsets(2)]


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"level_s": 0.0}, marks=pytest.mark.slow), {"tile_rows": 1, "step_s": 0.0}, {"llc_bytes": 0}],
)
def test_constants_are_found_from_the_times_that_they_make(changes: dict[str, float]) -> None:
    true = CostModel(SHAPE, replace(TRUE, **changes))  # type: ignore[arg-type]
    measured = [(work, true.plan_s(work)) for work in fit_plans()]
    start = CostModel(SHAPE, replace(DEVICE_COSTS["cpu"], llc_bytes=TRUE.llc_bytes))
    fitted = fit_costs(start, measured)
    assert max(abs(fitted.plan_s(work) / seconds - 1) for work, seconds in measured) < 0.02
    held_out = [AttentionCase.parse(name) for name in bench.HELD_OUT_CASES]
    works = [plan_work(case.plan(depths)) for case in held_out for depths in case.subsets(2)]
    assert sum(abs(fitted.plan_s(work) / true.plan_s(work) - 1) < 0.05 for work in works) > 0.9 * len(works)


def test_no_constant_is_negative_whatever_was_measured() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1000, generator=generator).tolist()
    measured = [(work, 1e-4 * (0.1 + noise.pop())) for work in fit_plans()]
    costs = fit_costs(CostModel(SHAPE, DEVICE_COSTS["cpu"]), measured).costs
    for name in bench.FITTED:
        assert getattr(costs, name) >= 0
        assert not math.isnan(getattr(costs, name))


def test_measuring_a_small_case() -> None:
    case = AttentionCase.parse("1,2,4/64,16,8")
    plans = {depths: case.plan(depths) for depths in case.subsets(2)}
    times = time_plans(case, plans, SPEC, TorchAttentionBackend, measure_s=0.0)
    assert list(times) == [(), (0,), (1,), (0, 1)]
    assert all(0 < taken.prepare_s / SPEC.num_layers < taken.layer_s < 1 for taken in times.values())


def test_a_case_that_does_not_fit_the_memory() -> None:
    case = AttentionCase.parse("4000/1000000")
    with pytest.raises(ConfigError, match="too many for the free memory"):
        time_plans(case, {(): AttentionCase.parse("1/1").plan()}, SPEC, TorchAttentionBackend, measure_s=0.0)


def test_calibration_and_check_on_a_few_cases() -> None:
    seen: list[str] = []
    cases = ("2/64", "1,4/64,8", "1,8/256,8", "1,2,8/32,32,8")
    calibration = calibrate(SPEC, "torch", TorchAttentionBackend, cases=cases, measure_s=0.0, on_case=seen.append)
    assert calibration.num_measured == 1 + 2 + 2 + 4
    assert calibration.key.backend == "torch"
    assert (calibration.key.num_qo_heads, calibration.key.head_dim) == (4, 16)
    assert calibration.median_error <= calibration.worst_error
    model = CostModel(AttentionShape(num_qo_heads=4, num_kv_heads=2, head_dim=16, kv_dtype_bytes=4), calibration.costs)
    report = check_choices(model, SPEC, TorchAttentionBackend, cases=("1,6/64,8",), measure_s=0.0, on_case=seen.append)
    (checked,) = report.cases
    assert list(checked.measured_s) == list(checked.predicted_s) == ["", "0"]
    assert checked.chosen in checked.measured_s
    assert checked.regret >= 0
    assert report.as_dict()["num_right"] in (0, 1)
    assert seen == [*cases, "1,6/64,8"]


def test_a_gpu_is_not_calibrated_by_the_time_that_its_host_takes() -> None:
    with pytest.raises(ConfigError, match="how fast the host launches"):
        calibrate(replace(SPEC, device=torch.device("cuda:0")), "torch", TorchAttentionBackend, measure_s=0.0)


def test_regret_and_verdicts() -> None:
    def case(chosen: str, **measured_s: float) -> CheckedCase:
        times = {name.removeprefix("d"): seconds for name, seconds in measured_s.items()}
        return CheckedCase(case="", predicted_s=dict.fromkeys(times, 2.0), measured_s=times, chosen=chosen)

    right = case("0", d=3.0, d0=2.0, d1=2.5)
    near = case("0", d=2.0, d0=2.02)
    other_nodes = case("1", d=3.0, d0=2.0, d1=2.5)
    lost = case("0", d=2.0, d0=3.0)
    assert [c.best for c in (right, near, other_nodes, lost)] == ["0", "", "0", ""]
    assert [c.regret for c in (right, near, other_nodes, lost)] == pytest.approx([0, 0.01, 0.25, 0.5])
    assert [c.loss for c in (right, near, other_nodes, lost)] == pytest.approx([0, 0.01, 0, 0.5])
    report = CheckReport(cases=(right, near, other_nodes, lost), tolerance=0.03)
    assert (report.num_right, report.num_shared_rightly) == (2, 3)
    summary = report.as_dict()
    assert summary["mean_regret"] == pytest.approx(0.19)
    assert summary["worst_loss"] == pytest.approx(0.5)


def test_attention_of_a_model() -> None:
    options = EngineOptions(device="cpu", dtype="float32", attention_backend="torch")
    spec, choice = bench.attention_of("smollm2", options)
    assert (spec.num_layers, spec.num_qo_heads, spec.num_kv_heads, spec.head_dim) == (30, 9, 3, 64)
    assert spec.dtype == torch.float32
    assert choice.backend is TorchAttentionBackend

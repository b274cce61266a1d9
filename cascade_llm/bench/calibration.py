"""Measure the constants of the cost model on this machine, and check the choices that it makes with them.

Attention of some dozens of plans is timed, layer by layer. A plan's predicted time is a sum of amounts (bytes, flops,
segments, levels) times the constants; which amounts count, bytes or flops, depends on the constants again. So they are
found in turns: amounts under the constants so far, then constants by least squares of the relative errors, none
negative.

The check is made on other trees. For each, all plans that differ in which nodes are segments are timed; the plan that
the model chooses is compared with the fastest.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch

from cascade_llm.attention.backend import AttentionBackend, AttentionSpec
from cascade_llm.attention.select import BackendChoice, select_backend
from cascade_llm.bench.attention_cases import AttentionCase
from cascade_llm.bench.attention_timing import time_plans
from cascade_llm.config import EngineOptions
from cascade_llm.device.device_name import last_level_cache_bytes
from cascade_llm.device.devices import resolve_device, resolve_dtype
from cascade_llm.engine.cost_setup import attention_shape, calibration_key, table_costs
from cascade_llm.errors import ConfigError
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.scheduler.cascade.calibration import Calibration
from cascade_llm.scheduler.cascade.cost_model import CostModel, PlanWork, plan_work
from cascade_llm.scheduler.cascade.device_costs import DeviceCosts

__all__ = [
    "FIT_CASES",
    "HELD_OUT_CASES",
    "CheckReport",
    "CheckedCase",
    "attention_of",
    "calibrate",
    "check_choices",
    "fit_costs",
]

FIT_CASES = (
    # nothing to share
    "1/512",
    "1/4096",
    "4/2048",
    "16/256",
    "16/1024",
    "64/128",
    "64/512",
    # one prefix
    "1,2/256,32",
    "1,2/4096,32",
    "1,4/1024,64",
    "1,8/256,16",
    "1,8/2048,32",
    "1,16/512,128",
    "1,32/1024,32",
    "1,64/256,32",
    "1,64/2048,16",
    # several prefixes, and prefixes below others
    "4,16/512,32",
    "8,32/256,32",
    "16,64/128,32",
    "1,4,32/512,256,32",
    "1,8,64/256,128,32",
    "2,8,32/1024,128,16",
)
"""Trees that constants are fitted to; each with every choice of levels."""

HELD_OUT_CASES = (
    # PAT's yardstick (ASPLOS'26), an eighth of its nodes, and prefixes as they are
    "1,10/4096,416",
    "1,32/256,32",
    "1,128/2048,32",
    "1,2,8/1024,256,256",
    "1,4,32/32,256,32",
    "1,4,64/32,512,256",
    "1,4,64/32,2048,256",
    "1,4,64/512,512,256",
    "1,2,4,32/32,256,256,32",
    "1,2,4,64/1024,256,128,32",
    "1,2,8,32,128/32,256,32,64,32",
    "2,4,8,32/256,256,32,32",
    "2,4,32,64/512,32,128,32",
    "2,4,8,32/512,512,256,32",
    "32/1024",
    "32/4096",
    # where sharing loses elsewhere: short prefixes of many, few rows, batch 1
    "1,128/128,32",
    "1,64/512,256",
    "1,8/4000,96",
    "1,2/128,512",
    "1,3/32,300",
    "1/3000",
    # loads of users: rollouts, chat with a system prompt, agents that branch
    "1,16/1024,200",
    "8,64/640,48",
    "1,24/1536,700",
    "1,3,12/2048,512,100",
    "4,8,16/96,96,96",
)
"""Trees that choices are checked on; none of them is fitted to."""

FITTED = (
    "shared_bytes_per_s",
    "shared_flops_per_s",
    "leaf_bytes_per_s",
    "leaf_flops_per_s",
    "cached_bytes_per_s",
    "segment_s",
    "level_s",
    "merge_bytes_per_s",
    "leaf_segment_s",
    "step_s",
)
TILE_ROWS = (1, 4, 8, 16, 32, 64)
NUM_TURNS = 12

Measured = Sequence[tuple[PlanWork, float]]
"""The work of a plan, and its seconds per layer."""


@dataclass(frozen=True, kw_only=True)
class CheckedCase:
    """One tree: all its plans by the depths that are levels ("" is plain attention), in seconds per layer."""

    case: str
    predicted_s: dict[str, float]
    measured_s: dict[str, float]
    chosen: str

    @property
    def best(self) -> str:
        """The fastest as measured."""
        return min(self.measured_s, key=self.measured_s.__getitem__)

    @property
    def regret(self) -> float:
        """How much longer the chosen plan takes than the fastest, relative."""
        return self.measured_s[self.chosen] / self.measured_s[self.best] - 1

    @property
    def loss(self) -> float:
        """How much longer the chosen plan takes than plain attention, relative; 0 where it does not."""
        return max(0.0, self.measured_s[self.chosen] / self.measured_s[""] - 1)


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """All checked trees."""

    cases: tuple[CheckedCase, ...]
    tolerance: float
    """Times that differ by less count as equal."""

    @property
    def errors(self) -> list[float]:
        """Relative errors of all predictions."""
        return [
            abs(case.predicted_s[name] / seconds - 1)
            for case in self.cases
            for name, seconds in case.measured_s.items()
        ]

    @property
    def num_right(self) -> int:
        """Trees whose chosen plan is the fastest, or as fast."""
        return sum(case.regret <= self.tolerance for case in self.cases)

    @property
    def num_shared_rightly(self) -> int:
        """Trees for which it was right to share, or right not to."""
        return sum(bool(case.chosen) == bool(case.best) or case.regret <= self.tolerance for case in self.cases)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "cases": [
                {**asdict(case), "best": case.best, "regret": case.regret, "loss": case.loss} for case in self.cases
            ],
            "tolerance": self.tolerance,
            "num_right": self.num_right,
            "num_shared_rightly": self.num_shared_rightly,
            "mean_regret": statistics.fmean(case.regret for case in self.cases),
            "worst_regret": max(case.regret for case in self.cases),
            "worst_loss": max(case.loss for case in self.cases),
            "median_error": statistics.median(self.errors),
        }


def attention_of(model: str, options: EngineOptions) -> tuple[AttentionSpec, BackendChoice]:
    """The attention of a model as an engine with these options would run it; its weights are not read."""
    checkpoint = open_checkpoint(model, load_format=options.load_format, revision=options.revision)
    config = model_config_from_hf(checkpoint.hf_config(), checkpoint.generation_config())
    device = resolve_device(options.device)
    spec = AttentionSpec.for_model(config, resolve_dtype(options.dtype, config.dtype, device), device)
    return spec, select_backend(options.attention_backend, spec)


def calibrate(
    spec: AttentionSpec,
    backend_name: str,
    backend: type[AttentionBackend],
    *,
    cases: Sequence[str] = FIT_CASES,
    max_levels: int = 2,
    measure_s: float = 20.0,
    on_case: Callable[[str], None] = lambda case: None,
) -> Calibration:
    """Measure and fit.

    Args:
        spec: the model's attention; K/V are of the same dtype
        max_levels: shared levels of the plans that are timed
        measure_s: about how long to measure, over all cases
        on_case: called with each case before it is timed

    Raises:
        ConfigError: on CUDA
    """
    if spec.device.type == "cuda":
        raise ConfigError(
            "calibration on CUDA would time how fast the host launches eager kernels, not the graphs that an engine "
            "replays: leave it out, the table's constants of the device serve; or calibrate with --device cpu"
        )
    measured: list[tuple[PlanWork, float]] = []
    for name in cases:
        on_case(name)
        case = AttentionCase.parse(name)
        plans = {depths: case.plan(depths) for depths in case.subsets(max_levels)}
        times = time_plans(case, plans, spec, backend, measure_s=measure_s / len(cases))
        measured += [(plan_work(plans[depths]), taken.layer_s) for depths, taken in times.items()]
    _, start = table_costs(spec.device)
    start = replace(start, llc_bytes=last_level_cache_bytes(spec.device) // 2)
    model = fit_costs(CostModel(attention_shape(spec), start), measured)
    errors = [abs(model.plan_s(work) / seconds - 1) for work, seconds in measured]
    return Calibration(
        key=calibration_key(spec, backend_name),
        costs=model.costs,
        median_error=statistics.median(errors),
        worst_error=max(errors),
        num_measured=len(measured),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def fit_costs(start: CostModel, measured: Measured) -> CostModel:
    """The model whose constants tell the measured times best; constants that nothing tells of are `start`'s.

    The number of rows in a tile, and whether anything is read from the last-level cache, are tried out.
    """
    tiles = TILE_ROWS if start.costs.num_processors == 1 else (start.costs.tile_rows,)
    starts = [
        replace(start, costs=replace(start.costs, tile_rows=rows, llc_bytes=num_bytes))
        for rows in tiles
        for num_bytes in sorted({0, start.costs.llc_bytes})
    ]
    return min((_fit_rates(model, measured) for model in starts), key=lambda model: _squared_error(model, measured))


def check_choices(
    model: CostModel,
    spec: AttentionSpec,
    backend: type[AttentionBackend],
    *,
    cases: Sequence[str] = HELD_OUT_CASES,
    max_levels: int = 2,
    measure_s: float = 20.0,
    tolerance: float = 0.03,
    on_case: Callable[[str], None] = lambda case: None,
) -> CheckReport:
    """Predict and choose by the model, and measure what would have been best; arguments as for `calibrate`."""
    checked = []
    for name in cases:
        on_case(name)
        case = AttentionCase.parse(name)
        plans = {_label(depths): case.plan(depths) for depths in case.subsets(max_levels)}
        times = time_plans(case, plans, spec, backend, measure_s=measure_s / len(cases))
        checked.append(
            CheckedCase(
                case=name,
                predicted_s={label: model.plan_s(plan_work(plan)) for label, plan in plans.items()},
                measured_s={label: taken.layer_s for label, taken in times.items()},
                chosen=_label(case.chosen(model, max_levels)),
            )
        )
    return CheckReport(cases=tuple(checked), tolerance=tolerance)


def _label(depths: Sequence[int]) -> str:
    return ",".join(map(str, depths))


def _fit_rates(model: CostModel, measured: Measured) -> CostModel:
    """In turns, what counts under the constants and the constants; the best of all turns."""
    models = [model]
    for _ in range(NUM_TURNS):
        model = replace(model, costs=_solve(model, measured))
        models.append(model)
    return min(models, key=lambda model: _squared_error(model, measured))


def _solve(model: CostModel, measured: Measured) -> DeviceCosts:
    """Constants by least squares of the relative errors, with what counts under the model's constants."""
    amounts = torch.tensor(
        [[model.amounts(work).get(name, 0) / seconds for name in FITTED] for work, seconds in measured],
        dtype=torch.float64,
    )
    used = [column for column in range(len(FITTED)) if amounts[:, column].any()]
    scales = amounts.norm(dim=0).clamp_min(1e-300)
    while used:
        solution = torch.linalg.lstsq(
            amounts[:, used] / scales[used], torch.ones(len(measured), 1, dtype=torch.float64), driver="gelsd"
        ).solution.squeeze(1)
        lowest = int(solution.argmin())
        if solution[lowest] >= 0:
            break
        del used[lowest]  # it would have to be negative: it is nothing
    found = {FITTED[column]: float(value / scales[column]) for column, value in zip(used, solution, strict=True)}
    seen = {name for column, name in enumerate(FITTED) if amounts[:, column].any()}
    constants: dict[str, Any] = {name: _constant(name, found.get(name, 0.0)) for name in seen}
    return replace(model.costs, **constants)


def _constant(name: str, value_s: float) -> float:
    """A constant of `DeviceCosts` from the seconds of one unit; the inverse of `unit_s`."""
    if not name.endswith("_per_s"):
        return value_s
    return 1 / value_s if value_s > 0 else float("inf")


def _squared_error(model: CostModel, measured: Measured) -> float:
    return sum((model.plan_s(work) / seconds - 1) ** 2 for work, seconds in measured)

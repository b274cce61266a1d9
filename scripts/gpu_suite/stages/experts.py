"""The grouped product of a layer's experts, routing included: right from a replayed graph, and how fast."""

from __future__ import annotations

from typing import Any

import torch

from cascade_llm.layers.routing import Routing, TorchRouter
from cascade_llm.weights.format import MatrixSpec, WeightOptions
from cascade_llm.weights.stack import Grouped, group_rows
from scripts.gpu_suite.stage import StageRun

__all__ = ["run"]

TOLERANCE = 0.02
"""Of the worst output's error, as a share of the mean output, in bfloat16."""


def run(stage: StageRun) -> dict[str, Any]:
    """See the module."""
    machine, (hidden, inner, count, chosen) = stage.machine, stage.sizes.experts
    options = WeightOptions(dtype=machine.dtype, device=machine.device, on_stream=True, arch=machine.arch)
    spec = MatrixSpec("experts", hidden, {"gate": inner, "up": inner}, options)
    if reasons := Grouped.reasons_against(spec):
        return {"verdict": "not run", "headline": {"reasons": reasons}}
    torch.manual_seed(0)
    stack = Grouped(spec, count)
    stack.values.normal_(std=hidden**-0.5)
    routing = Routing(num_experts=count, num_chosen=chosen, divides_by_sum=True)
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for rows in stage.sizes.product_rows:
            if stage.has_time():
                results.append(_measured(stage, stack, routing, rows))
                stage.save(_told(results))
    return _told(results)


def _measured(stage: StageRun, stack: Grouped, routing: Routing, rows: int) -> dict[str, Any]:
    """A number of rows that raises is a result, and the next one comes."""
    machine, router = stage.machine, TorchRouter()
    _, outputs, inputs = stack.values.shape
    x = torch.randn(rows, inputs, device=machine.device).to(machine.dtype)
    logits = torch.randn(rows, routing.num_experts, device=machine.device).to(machine.dtype)
    found = torch.full((rows * routing.num_chosen, outputs), torch.nan, dtype=x.dtype, device=x.device)

    def work() -> None:
        routed = router.route(logits, routing)
        found.copy_(stack.multiply(x, routed.ends, routed.sources))

    try:
        seconds = machine.seconds(work)
    except Exception as error:
        return {"rows": rows, "refused": f"{type(error).__name__}: {error}"[:500]}
    routed = router.route(logits, routing)
    groups = list(group_rows(routed.ends))
    errors, sizes = [], []
    for expert, own in groups:
        expected = x[routed.sources[own]].double() @ stack.values[expert].double().T
        errors.append((found[own].double() - expected).norm(dim=1).max())
        sizes.append(expected.norm(dim=1).mean())
    read = len(groups) * stack.values[0].nbytes
    return {
        "rows": rows,
        "experts": len(groups),
        "error": float(torch.stack(errors).max() / torch.stack(sizes).mean()),
        "us": 1e6 * seconds,
        "floor_us": 1e6 * read / machine.card.copy_bytes_per_s,
    }


def _told(results: list[dict[str, Any]]) -> dict[str, Any]:
    wrong = [entry["rows"] for entry in results if not entry.get("error", TOLERANCE + 1) <= TOLERANCE]
    shares = {entry["rows"]: round(entry["floor_us"] / entry["us"], 2) for entry in results if "us" in entry}
    verdict = "failed" if wrong else "passed" if results else "not run"
    return {"verdict": verdict, "headline": {"wrong": wrong, "share_of_the_floor": shares}, "products": results}

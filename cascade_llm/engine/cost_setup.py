"""Which cost model an engine plans with: measured on this machine where that was done, else from the table."""

from __future__ import annotations

from pathlib import Path

import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.device.device_name import device_name
from cascade_llm.device.devices import thread_count
from cascade_llm.device.user_cache import cache_folder
from cascade_llm.scheduler.cascade.calibration import (
    CalibrationFileError,
    CalibrationKey,
    read_calibration,
    read_entries,
)
from cascade_llm.scheduler.cascade.cost_model import AttentionShape, CostModel
from cascade_llm.scheduler.cascade.device_costs import DEVICE_COSTS, DeviceCosts, known_device

__all__ = [
    "attention_shape",
    "calibration_key",
    "calibration_path",
    "choose_cost_model",
    "describe_calibrations",
    "table_costs",
]


def choose_cost_model(spec: AttentionSpec, backend: str, *, num_threads: int | None = None) -> tuple[CostModel, str]:
    """The cost model for attention of this kind on this machine, and where its constants come from."""
    calibration, found = read_calibration(calibration_path(), calibration_key(spec, backend, num_threads))
    shape = attention_shape(spec)
    if calibration is not None:
        return CostModel(shape, calibration.costs), found
    name, costs = table_costs(spec.device)
    return CostModel(shape, costs), f"table entry {name!r}; {found}"


def calibration_path() -> Path:
    """Where calibrations are kept."""
    return cache_folder() / "calibration.json"


def describe_calibrations() -> list[str]:
    """What is in the calibration file, a line for each entry, and whether it is this machine's; or why nothing is."""
    path = calibration_path()
    try:
        entries = read_entries(path)
    except CalibrationFileError as error:
        return [str(error)]
    lines = []
    for entry in entries:
        key = entry.key
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        here = (device_name(device), torch.__version__) == (key.device, key.torch_version)
        heads = f"{key.num_qo_heads}/{key.num_kv_heads} heads of {key.head_dim}"
        lines.append(
            f"{'calibrated' if here else 'not used: calibrated elsewhere'}: {key.device}, {key.num_threads} threads, "
            f"{key.backend}, {key.dtype}, {heads}, torch {key.torch_version}, "
            f"median error {entry.median_error:.0%} ({path})"
        )
    return lines


def calibration_key(spec: AttentionSpec, backend: str, num_threads: int | None = None) -> CalibrationKey:
    """What constants measured here, for attention of this kind, hold for."""
    return CalibrationKey(
        device=device_name(spec.device),
        num_threads=thread_count(num_threads),
        backend=backend,
        dtype=str(spec.dtype).removeprefix("torch."),
        num_qo_heads=spec.num_qo_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        torch_version=torch.__version__,
    )


def attention_shape(spec: AttentionSpec) -> AttentionShape:
    """One layer, as the cost model takes it."""
    return AttentionShape(
        num_qo_heads=spec.num_qo_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        kv_dtype_bytes=spec.kv_number_bytes,
    )


def table_costs(device: torch.device) -> tuple[str, DeviceCosts]:
    """The entry of the table for a device, with its name."""
    name = "cpu" if device.type == "cpu" else known_device(device_name(device))
    return name, DEVICE_COSTS[name]

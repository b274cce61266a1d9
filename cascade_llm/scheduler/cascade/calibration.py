"""Constants that were measured on a machine, kept in a file, and given out for that machine alone."""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cascade_llm.errors import CascadeError
from cascade_llm.scheduler.cascade.device_costs import DeviceCosts

__all__ = [
    "Calibration",
    "CalibrationFileError",
    "CalibrationKey",
    "read_calibration",
    "read_entries",
    "write_calibration",
]

log = logging.getLogger("cascade_llm")

FORMAT = 1
LARGEST = 1e30
"""Of any number of a file."""


@dataclass(frozen=True, kw_only=True)
class CalibrationKey:
    """What measured constants hold for."""

    device: str
    """The processor's or the GPU's name."""
    num_threads: int
    backend: str
    dtype: str
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    torch_version: str


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured constants, and how well they tell the times that they were fitted to."""

    key: CalibrationKey
    costs: DeviceCosts
    median_error: float
    """Of predicted against measured times, relative."""
    worst_error: float
    num_measured: int
    measured_at: str
    """ISO 8601, UTC."""


class CalibrationFileError(CascadeError):
    """The file is missing or broken; the message says which, and the cure. Never fatal: the table's constants serve."""


def read_entries(path: Path) -> list[Calibration]:
    """All calibrations in a file; raises `CalibrationFileError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        return [_entry(item) for item in content["calibrations"]]
    except FileNotFoundError:
        raise CalibrationFileError("not calibrated on this machine (cascade-llm bench calibrate)") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CalibrationFileError(
            f"{path} cannot be used ({error}): calibrate again (cascade-llm bench calibrate)"
        ) from None


def read_calibration(path: Path, key: CalibrationKey) -> tuple[Calibration | None, str]:
    """The calibration for this key, or None; with what was found or what was wrong, for the user.

    Nothing in a file that is broken, or was made elsewhere, is used, and none of it is an error.
    """
    try:
        entries = read_entries(path)
    except CalibrationFileError as error:
        if path.exists():
            log.warning(str(error))
        return None, str(error)
    found = [entry for entry in entries if entry.key == key]
    if found:
        entry = found[-1]
        return entry, f"measured here at {entry.measured_at}, median error {entry.median_error:.0%}"
    nearest = min(entries, key=lambda entry: len(_differences(entry.key, key)), default=None)
    listed = f": {', '.join(_differences(nearest.key, key))}" if nearest else ""
    return None, f"calibrated for something else{listed}; to do it here: cascade-llm bench calibrate"


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Add a calibration to the file, in the place of one with the same key; a file that is broken is replaced.

    Raises `OSError` where it cannot be written; a reader never meets half a file.
    """
    try:
        entries = [entry for entry in read_entries(path) if entry.key != calibration.key]
    except CalibrationFileError:
        entries = []
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    text = json.dumps(
        {"format": FORMAT, "calibrations": [asdict(entry) for entry in (*entries, calibration)]}, indent=2
    )
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _entry(item: dict[str, Any]) -> Calibration:
    costs = DeviceCosts(**{**item["costs"], "measured": True})
    for field in fields(costs):
        if field.name == "measured":
            continue
        value = getattr(costs, field.name)
        unlimited = field.name.endswith("_per_s") and value == math.inf
        if not unlimited and not _is_number(value):
            raise ValueError(f"{field.name} is {value!r}")
        if value == 0 and (field.name.endswith("_per_s") or field.name in ("tile_rows", "num_processors")):
            raise ValueError(f"{field.name} is 0")
    entry = Calibration(**{**item, "key": CalibrationKey(**item["key"]), "costs": costs})
    for name in ("median_error", "worst_error", "num_measured"):
        if not _is_number(getattr(entry, name)):
            raise ValueError(f"{name} is {getattr(entry, name)!r}")
    return entry


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < LARGEST


def _differences(theirs: CalibrationKey, ours: CalibrationKey) -> list[str]:
    return [
        f"{name} {value} there, {getattr(ours, name)} here"
        for name, value in asdict(theirs).items()
        if value != getattr(ours, name)
    ]

"""Everything that can be replayed of a plan file: attention always, the engine where a model is given."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cascade_llm import __version__
from cascade_llm.config import EngineOptions
from cascade_llm.device.devices import resolve_device, thread_limit
from cascade_llm.errors import ConfigError
from cascade_llm.validation.engine_replay import replay_engine
from cascade_llm.validation.options import REPLAY_OPTIONS
from cascade_llm.validation.replay import replay_attention
from cascade_llm.validation.report import Progress, Section, ValidationReport

__all__ = ["replay"]


def replay(
    path: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    max_steps: int | None = None,
    allow_truncated: bool = False,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> ValidationReport:
    """Run the steps of a plan file again.

    Args:
        path: a file of `LLM(record_plans=...)`
        model: what it was recorded with, to replay the engine too; the file must have token ids then
        options: those of `options.REPLAY_OPTIONS`
        max_steps: end after so many steps
        allow_truncated: use what is there of a file that breaks off
        seed: of the random K, V and queries

    Raises:
        PlanError: the file is not whole or not of this model; nothing from the wrong line on has run
        CascadeError: as `LLM`, for model and options
    """
    given = dict(options or {})
    for name in given:
        if name not in REPLAY_OPTIONS:
            raise ConfigError(f"{name} is replayed as it was recorded: leave it out")
    engine_options = EngineOptions(**given)
    with thread_limit(engine_options.num_threads):
        start = time.perf_counter()
        header, checks = replay_attention(
            path,
            device=resolve_device(engine_options.device),
            backend=engine_options.attention_backend,
            max_steps=max_steps,
            allow_truncated=allow_truncated,
            seed=seed,
            progress=progress,
        )
        sections = [Section("attention on random K and V", checks, time.perf_counter() - start)]
        if model is not None:
            start = time.perf_counter()
            engine_checks = replay_engine(
                path, model, given, max_steps=max_steps, allow_truncated=allow_truncated, progress=progress
            )
            sections.append(Section("engine", engine_checks, time.perf_counter() - start))
    subject = {"cascade_llm": __version__, "file": os.fspath(path), "recorded": asdict(header), "seed": seed}
    return ValidationReport(subject, sections)

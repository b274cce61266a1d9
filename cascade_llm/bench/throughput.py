"""Throughput of one load with cascade attention on against off.

The load is generated: requests behind one shared prefix, token ids at random. Two engines differ in
`enable_cascade_attention` alone and take turns, so that what else the machine does meets both. A repeat is a *cold* run
(the prefix cache is empty, so prefill is part of it) and a *warm* one (prompts are cached, so it is nearly all decode).
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cascade_llm.bench.machine import describe_machine
from cascade_llm.config import EngineOptions, ModelConfig
from cascade_llm.errors import ConfigError
from cascade_llm.llm import LLM
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.outputs import RequestOutput
from cascade_llm.sampling_params import SamplingParams

__all__ = [
    "RUNS",
    "Reading",
    "SharedPrefixLoad",
    "Spread",
    "ThroughputReport",
    "measure",
    "measure_throughput",
    "num_runs",
    "speed",
    "take_turns",
]

RUNS = ("cold", "warm")

COUNTERS = (
    "steps",
    "cascade_steps",
    "prefilled_tokens",
    "cached_tokens",
    "generated_tokens",
    "preemptions",
    "kv_bytes_read",
    "kv_bytes_saved",
)


@dataclass(frozen=True, kw_only=True)
class SharedPrefixLoad:
    """Requests that share one prefix, each with a suffix of its own; lengths in tokens."""

    prefix_len: int = 2048
    num_requests: int = 32
    suffix_len: int = 32
    output_len: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_requests", "suffix_len", "output_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be 1 or larger")
        if self.prefix_len < 0:
            raise ConfigError(f"prefix_len is {self.prefix_len}: it must be 0 or larger")

    @property
    def sequence_len(self) -> int:
        """Tokens of each sequence in the end."""
        return self.prefix_len + self.suffix_len + self.output_len

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Token ids; the same for the same load."""
        draw = random.Random(self.seed)
        prefix = draw.choices(range(vocab_size), k=self.prefix_len)
        return [prefix + draw.choices(range(vocab_size), k=self.suffix_len) for _ in range(self.num_requests)]

    def check_fits(self, model: ModelConfig, options: EngineOptions) -> None:
        """Raise `ConfigError` where the sequences exceed the context."""
        context = min(options.max_model_len or model.max_position_embeddings, model.max_position_embeddings)
        if self.sequence_len > context:
            raise ConfigError(
                f"prefix_len {self.prefix_len} + suffix_len {self.suffix_len} + output_len {self.output_len} = "
                f"{self.sequence_len} tokens exceed the context of {context}: lower one of them"
            )


@dataclass(frozen=True)
class Reading:
    """One run of a load."""

    elapsed_s: float
    counters: Mapping[str, int]
    """What `LLM.stats()` gained."""

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over the whole time, prefill included."""
        return self.counters["generated_tokens"] / self.elapsed_s


@dataclass(frozen=True)
class Spread:
    """Several readings of one quantity."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Median, smallest and largest."""
        return Spread(statistics.median(values), min(values), max(values))


def speed(readings: Sequence[Reading]) -> Spread:
    """Output tokens per second over several readings."""
    return Spread.of([reading.tokens_per_s for reading in readings])


@dataclass(frozen=True, kw_only=True)
class ThroughputReport:
    """All readings, and what they were made with."""

    model: str
    load: SharedPrefixLoad
    options: Mapping[str, Any]
    """Engine options that differ from their defaults, beside the one that is compared."""
    unshared_steps: Mapping[str, int]
    """Why how many steps of the cascade engine shared nothing."""
    readings: Mapping[str, Mapping[str, Sequence[Reading]]]
    """By engine ("on", "off"), then by run ("cold", "warm")."""
    machine: Mapping[str, Any]

    def tokens_per_s(self, engine: str, run: str) -> Spread:
        """Output tokens per second."""
        return speed(self.readings[engine][run])

    def ratio(self, run: str) -> float:
        """Median with cascade attention over median without: above 1 it is faster."""
        return self.tokens_per_s("on", run).median / self.tokens_per_s("off", run).median

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "load": asdict(self.load),
            "options": dict(self.options),
            "results": {
                engine: {
                    run: {
                        "tokens_per_s": asdict(self.tokens_per_s(engine, run)),
                        "elapsed_s": [reading.elapsed_s for reading in readings],
                        "counters": dict(readings[0].counters),
                    }
                    for run, readings in runs.items()
                }
                for engine, runs in self.readings.items()
            },
            "unshared_steps": dict(self.unshared_steps),
            "ratio": {run: self.ratio(run) for run in RUNS},
            "machine": dict(self.machine),
        }


def measure_throughput(
    model: str,
    load: SharedPrefixLoad,
    options: Mapping[str, Any],
    *,
    repeat: int = 3,
    on_run: Callable[[str], None] = lambda run: None,
) -> ThroughputReport:
    """Run the load `repeat` times on each of two engines, in turns, after a short run that is not counted.

    Args:
        options: of both engines; the context and the number of lanes are the load's where they are not given
        on_run: called with a name before each of the `num_runs(repeat)` runs

    Raises:
        ConfigError: the load does not fit the context; nothing has been loaded then
    """
    if repeat < 1:
        raise ConfigError(f"repeat is {repeat}: it must be 1 or larger")
    checkpoint = open_checkpoint(model, load_format=EngineOptions(**options).load_format)
    config = model_config_from_hf(checkpoint.hf_config(), checkpoint.generation_config())
    load.check_fits(config, EngineOptions(**options))
    prompts = load.prompts(config.vocab_size)
    options = {"max_model_len": load.sequence_len, "max_num_seqs": min(load.num_requests, 256), **options}
    with (
        LLM(model, **options, enable_cascade_attention=True) as on,
        LLM(model, **options, enable_cascade_attention=False) as off,
    ):
        engines = {"on": on, "off": off}
        params = SamplingParams(temperature=0.0, max_tokens=load.output_len, ignore_eos=True)
        for name, llm in engines.items():
            on_run(f"cascade {name}, not counted")
            measure(llm, prompts, replace(params, max_tokens=min(2, load.output_len)))
        readings = take_turns(engines, prompts, params, repeat=repeat, on_run=on_run)
        unshared_steps = on.plan_report()["unshared_steps"]
    return ThroughputReport(
        model=model,
        load=load,
        options=EngineOptions(**options).given(),
        unshared_steps=unshared_steps,
        readings=readings,
        machine=describe_machine(),
    )


def num_runs(repeat: int) -> int:
    """Runs of `measure_throughput`, the uncounted ones included."""
    return 2 * (1 + len(RUNS) * repeat)


def measure(
    llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams, *, progress: bool = False
) -> tuple[list[RequestOutput], Reading]:
    """One run, timed from the first prompt's arrival to the last token."""
    before = llm.stats()
    start_s = time.perf_counter()
    outputs = llm.generate(prompts, params, progress=progress)
    elapsed_s = time.perf_counter() - start_s
    after = llm.stats()
    return outputs, Reading(elapsed_s, {name: after[name] - before[name] for name in COUNTERS})


def take_turns(
    engines: Mapping[str, LLM],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    repeat: int,
    on_run: Callable[[str], None] = lambda run: None,
) -> dict[str, dict[str, list[Reading]]]:
    """A cold and a warm run on each engine, `repeat` times; by the engine's name, then by run."""
    readings: dict[str, dict[str, list[Reading]]] = {name: {run: [] for run in RUNS} for name in engines}
    for _ in range(repeat):
        for name, llm in engines.items():
            llm.reset_prefix_cache()
            for run in RUNS:
                on_run(f"cascade {name}, {run}")
                readings[name][run].append(measure(llm, prompts, params)[1])
    return readings

"""Another engine as a side of a measurement."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.peer_environment import PeerInterpreter, find_peer
from benchmarks.peer_process import PeerProcess
from cascade_llm.bench.load import Load
from cascade_llm.bench.online import AllAtOnce, Arrivals, OnlineRun, RequestTiming
from cascade_llm.bench.reading import Reading
from cascade_llm.bench.setup import BenchModel, options_for
from cascade_llm.bench.sides import Run, Side
from cascade_llm.engine.tokenizer import load_tokenizer
from cascade_llm.errors import ConfigError
from cascade_llm.loader.checkpoint import Checkpoint
from cascade_llm.loader.hf_folder import HuggingFaceCheckpoint, write_hf_folder

__all__ = ["PeerSide", "peer_for"]

START_S, RUN_S = 900.0, 3600.0


def peer_for(
    name: str,
    model: BenchModel,
    *,
    python: Path | None = None,
    install: bool = False,
    on_install: Callable[[str], None] = lambda what: None,
) -> PeerInterpreter:
    """The interpreter of a peer that can run this model; raises before anything is started. See `find_peer`."""
    if model.checkpoint.is_dummy:
        raise ConfigError("another engine needs real weights: leave out load_format=dummy")
    if name == "llama.cpp" and _gguf_file(model.checkpoint) is None:
        raise ConfigError("llama.cpp reads .gguf files only: give one as the model")
    return find_peer(name, python, install=install, gpu=model.device.type == "cuda", on_install=on_install)


class PeerSide(Side):
    """Starts another engine with the same model, threads and dtype, at its own defaults otherwise."""

    def __init__(self, peer: PeerInterpreter, model: BenchModel, *loads: Load, online: bool = False) -> None:
        """Start it with room for each of the loads, and take the first; raises `BackendError` where it does not.

        `online` starts an engine as it serves requests that come one by one; conversations need that too.
        """
        super().__init__(peer.name, loads[0], {})
        self._stack = ExitStack()
        self._process: PeerProcess | None = None
        try:
            self._start(peer, model, loads, online=online or any(load.has_turns for load in loads))
            self.use_load(loads[0])
        except BaseException:
            self.close()
            raise

    def use_load(self, load: Load) -> None:
        """See `Side`."""
        super().use_load(load)
        command = {"op": "load", "requests": load.as_dicts(), "temperature": load.temperature, "top_p": load.top_p}
        self._ask(command, RUN_S)

    def run(self, run: Run) -> Reading:
        """See `Side`; an engine without a prefix cache runs cold each time."""
        if self.load.has_turns:
            return self._run_online(AllAtOnce(), reset=run == "cold").reading
        answer = self._ask({"op": "run", "reset": run == "cold", "output_len": 1 if run == "first" else None}, RUN_S)
        return Reading(float(answer["elapsed_s"]), int(answer["num_generated"]))

    def run_online(self, arrivals: Arrivals) -> OnlineRun:
        """See `Side`; times of tokens are those at which the engine handed them out, as its driver saw it."""
        return self._run_online(arrivals, reset=True)

    def _run_online(self, arrivals: Arrivals, *, reset: bool) -> OnlineRun:
        command = {
            "op": "online",
            "reset": reset,
            "times_s": arrivals.times_of(self.load),
            "max_running": arrivals.max_running,
            "by_clock": arrivals.by_clock,
        }
        answer = self._ask(command, RUN_S)
        timings = [
            RequestTiming(told["arrival_s"], told["token_times_s"] or [], told["end_s"]) for told in answer["timings"]
        ]
        return OnlineRun(Reading(float(answer["elapsed_s"]), int(answer["num_generated"])), timings)

    def peak_memory_bytes(self) -> int:
        """Of the engine and its children, as far as it can be told."""
        return int(self._ask({"op": "memory"}, RUN_S)["peak_bytes"])

    def close(self) -> None:
        """See `Side`."""
        self._stack.close()

    def _ask(self, command: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert self._process is not None
        return self._process.ask(command, timeout_s=timeout_s)

    def _start(self, peer: PeerInterpreter, model: BenchModel, loads: Sequence[Load], *, online: bool) -> None:
        options = options_for(model, *loads)
        num_threads = int(options.get("num_threads") or torch.get_num_threads())
        start = {
            "op": "start",
            "online": online,
            "model": str(self._model_path(peer.name, model)),
            "has_tokenizer": model.checkpoint.tokenizer_source is not None,
            "device": model.device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "num_threads": num_threads,
            "max_model_len": options["max_model_len"],
            "max_num_seqs": options["max_num_seqs"],
            "kv_cache_bytes": options.get("kv_cache_bytes"),
        }
        self._process = PeerProcess(peer, _environment(peer.name, num_threads, options.get("kv_cache_bytes")))
        self._stack.callback(self._process.close)
        self.flags.update(self._ask(start, START_S)["flags"])

    def _model_path(self, name: str, model: BenchModel) -> Path:
        """What the engine can read: the model's own folder or file, else a copy that lasts as long as this side."""
        checkpoint = model.checkpoint
        file = _gguf_file(checkpoint)
        if name in ("llama.cpp", "checkout") and file is not None:
            return file
        if isinstance(checkpoint, HuggingFaceCheckpoint):
            return checkpoint.folder
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="cascade-llm-")))
        write_hf_folder(checkpoint, folder, model.dtype)
        tokenizer = load_tokenizer(checkpoint.tokenizer_source)
        if tokenizer is not None:
            tokenizer.save(folder)
        return folder


def _gguf_file(checkpoint: Checkpoint) -> Path | None:
    source = checkpoint.tokenizer_source
    return source if source is not None and source.is_file() else None


def _environment(name: str, num_threads: int, kv_cache_bytes: int | None) -> dict[str, str]:
    """Variables that say what an engine takes from nowhere else."""
    variables = {"OMP_NUM_THREADS": str(num_threads), "HF_HUB_OFFLINE": "1"}
    if name == "vllm":
        if kv_cache_bytes is not None:  # whole GiB
            variables["VLLM_CPU_KVCACHE_SPACE"] = str(-(-kv_cache_bytes // (1 << 30)))
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        if len(cores) > num_threads:  # else its own choice, a thread for each core, is the same number
            variables["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores[:num_threads]))
        variables["VLLM_NO_USAGE_STATS"] = "1"
    return variables

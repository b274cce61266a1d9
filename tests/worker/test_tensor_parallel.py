"""Ranks in processes: the outputs of one, and an error that says which rank and why when one of them fails."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cascade_llm import LLM, SamplingParams, __version__
from cascade_llm.config import EngineOptions
from cascade_llm.errors import CapacityError, CheckpointError, ConfigError, GenerationError, WorkerError
from cascade_llm.worker.process_executor import ProcessExecutor
from cascade_llm.worker.rank_process import CLOSE, FAILED, RankSetup, run_rank
from cascade_llm.worker.rank_watch import Pulse, RankWatch
from tests.engine.tiny_llm import assert_equal_outputs, save_tiny, tiny_llm
from tests.worker.rank_processes import LONG, PARAMS, PROMPTS, is_gone, pids_of


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def shared(tiny: Path) -> Iterator[LLM]:
    with tiny_llm(tiny, tensor_parallel_size=2, schedule_lag=1) as llm:
        yield llm


def test_outputs_are_those_of_one_rank(tiny: Path, shared: LLM) -> None:
    with tiny_llm(tiny) as local:
        expected = local.generate(PROMPTS, PARAMS)
    found = shared.generate(PROMPTS, PARAMS)
    assert_equal_outputs(found, expected)
    assert found[3].prompt_logprobs is not None
    assert len(found[3].prompt_logprobs) == len(PROMPTS[3])
    assert shared.stats()["cascade_steps"] > 0
    assert shared.stats()["held_pages"] == 0


def test_a_rank_that_is_killed_in_a_batch_ends_all_and_is_named(shared: LLM) -> None:
    pids = pids_of(shared)
    streams = [shared.stream([5, 6, 7 + i], LONG) for i in range(4)]
    next(streams[0])
    os.kill(pids[1], signal.SIGKILL)
    for stream in streams:
        with pytest.raises(GenerationError, match=rf"rank 1 \(process {pids[1]}\) ended by signal 9 \(SIGKILL\)"):
            for _ in stream:
                pass
    with pytest.raises(GenerationError, match="create another LLM"):
        shared.generate([5, 6], LONG)
    assert all(is_gone(pid) for pid in pids)


@pytest.mark.slow
def test_three_ranks_without_lag_preempt_as_one_does(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, num_key_value_heads=3)
    options = {"schedule_lag": 0, "max_model_len": 100, "kv_cache_bytes": 70_000}
    with tiny_llm(folder, **options) as local:
        expected = local.generate(PROMPTS, PARAMS)
    with tiny_llm(folder, tensor_parallel_size=3, **options) as llm:
        assert_equal_outputs(llm.generate(PROMPTS, PARAMS), expected)
        assert llm.stats()["preemptions"] > 0
        assert llm.facts.total_pages == local.facts.total_pages
        pids = pids_of(llm)
    assert all(is_gone(pid, within_s=1.0) for pid in pids)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    ("architecture", "fields", "options"),
    [
        ("mistral", {"sliding_window": 24}, {}),
        ("gemma3_text", {"sliding_window": 12}, {}),
        ("gemma3_text", {"sliding_window": 12}, {"enable_cascade_attention": False}),
        ("qwen3_moe", {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, {}),
        ("llama", {"hidden_size": 96, "head_dim": 32, "intermediate_size": 192}, {"quantization": "q8_0"}),
    ],
)
def test_windows_pools_experts_and_quantized_weights(
    architecture: str, fields: dict[str, int], options: dict[str, Any], count: int, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path, architecture, **fields, **({"num_key_value_heads": 3} if count == 3 else {}))
    with tiny_llm(folder, exact_activations=True, **options) as local:
        expected = local.generate(PROMPTS, PARAMS)
    with tiny_llm(folder, exact_activations=True, tensor_parallel_size=count, **options) as llm:
        assert_equal_outputs(llm.generate(PROMPTS, PARAMS), expected)
        assert len(llm.facts.pool_pages) == (2 if architecture == "gemma3_text" else 1)
        assert llm.facts.pool_pages == local.facts.pool_pages


@pytest.mark.slow
def test_a_rank_that_stops_is_named(tiny: Path) -> None:
    with tiny_llm(tiny, tensor_parallel_size=2, rank_timeout_s=15) as llm:
        llm.generate([5, 6], SamplingParams(max_tokens=1))
        pids = pids_of(llm)
        os.kill(pids[1], signal.SIGSTOP)
        with pytest.raises(GenerationError, match=rf"rank 1 \(process {pids[1]}\) has not answered for 15 s"):
            llm.generate([5, 6, 7], LONG)
        assert all(is_gone(pid) for pid in pids)


@pytest.mark.slow
def test_a_rank_that_is_killed_while_it_loads_ends_the_start(tiny: Path) -> None:
    killed: list[int] = []

    def kill(*progress: object) -> None:
        if not killed:
            ours = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
            killed.extend(int(pid) for pid in ours[-1:])
            os.kill(killed[0], signal.SIGKILL)

    options = EngineOptions(dtype="float32", device="cpu", tensor_parallel_size=2, max_num_seqs=4)
    with pytest.raises(WorkerError, match=r"rank 1 \(process \d+\) ended by signal 9 \(SIGKILL\) while it started"):
        ProcessExecutor(tiny, options, on_start=kill)


@pytest.mark.slow
def test_what_a_start_refuses_names_the_rank(tiny: Path) -> None:
    with pytest.raises(CapacityError, match=r"rank [01]: the KV pool of 50 bytes holds"):
        tiny_llm(tiny, tensor_parallel_size=2, kv_cache_bytes=100)


def test_a_rank_of_another_version_is_refused_before_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = multiprocessing.Pipe()
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    setup = RankSetup(
        model="/no/model", options=EngineOptions(), index=0, count=1, meeting_point=Path("none"), version="0.0.1"
    )
    ours.send_bytes(CLOSE)
    run_rank(theirs, setup)
    message = ours.recv_bytes()
    assert message[:1] == FAILED
    said = str(pickle.loads(message[1:]).error)
    assert said.startswith(f"the engine is cascade-llm 0.0.1, this rank runs {__version__}: the package was changed")


def test_heads_are_checked_before_a_rank_starts(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"6 query heads and 2 KV heads cannot .* this model takes 1, 2, 6"):
        tiny_llm(tiny, tensor_parallel_size=4)


def test_a_broken_checkpoint_is_told_before_a_rank_starts(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        tiny_llm(folder, tensor_parallel_size=2)


# -- the watch, at made-up times ---------------------------------------------------------------------------------------


def test_a_silent_rank_is_found_but_not_for_what_was_before() -> None:
    pulses = [Pulse(heard_at=10.0), Pulse(heard_at=1000.0)]
    watch = RankWatch(pulses, 60.0, in_step=True, now=1000.0)
    assert watch.look(1059.0) is None
    pulses[1].heard_at = 1058.0
    assert watch.look(1061.0) == (0, "has not answered for 60 s")


def test_a_rank_that_has_not_begun_is_not_silent() -> None:
    watch = RankWatch([Pulse(), Pulse()], 60.0, in_step=False, now=0.0)
    assert watch.look(3600.0) is None


def test_the_rank_that_others_wait_for_is_found_unless_something_moves() -> None:
    pulses = [Pulse(0.0, 7), Pulse(0.0, 6)]
    watch = RankWatch(pulses, 60.0, in_step=True, now=0.0)
    for pulse in pulses:
        pulse.heard_at = 200.0
    assert watch.look(50.0) is None
    pulses[1].num_exchanges = 7
    assert watch.look(90.0) is None
    pulses[0].num_exchanges = 8
    assert watch.look(149.0) is None
    assert watch.look(200.0) is None
    assert watch.look(210.0) == (1, "has kept the others waiting for 60 s in a step")


def test_one_rank_alone_may_take_its_time() -> None:
    watch = RankWatch([Pulse(0.0)], 1.0, in_step=True, now=0.0)
    watch_pulse = Pulse(10.0)
    assert RankWatch([watch_pulse], 1.0, in_step=True, now=9.5).look(10.5) is None
    assert watch.look(0.5) is None

"""Steps in a process of their own: the same outputs, and a rank that dies is an error for everybody who waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cascade_llm import LLM, SamplingParams
from cascade_llm.errors import CapacityError, GenerationError, PlanError, WorkerError
from cascade_llm.plan import int_column
from tests.engine.tiny_llm import assert_equal_outputs, save_tiny, tiny_llm
from tests.worker.rank_processes import LONG, PARAMS, PROMPTS, executor_of, is_gone, pids_of


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def remote(tiny: Path) -> Iterator[LLM]:
    with tiny_llm(tiny, distributed_executor_backend="mp", schedule_lag=1) as llm:
        yield llm


def test_outputs_are_those_of_this_process(tiny: Path, remote: LLM) -> None:
    with tiny_llm(tiny) as local:
        expected = local.generate(PROMPTS, PARAMS)
    found = remote.generate(PROMPTS, PARAMS)
    assert_equal_outputs(found, expected)
    assert found[3].prompt_logprobs is not None
    assert len(found[3].prompt_logprobs) == len(PROMPTS[3])
    assert remote.stats()["cascade_steps"] > 0
    assert remote.stats()["held_pages"] == 0


def test_a_plan_that_is_refused_there_is_an_error_here(remote: LLM) -> None:
    plans = []
    remote.engine.on_step.append(lambda event: plans.append(event.plan))
    remote.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    remote.engine.on_step.clear()
    broken = replace(plans[-1], step_id=plans[-1].step_id + 1, slots=int_column([0] * len(plans[-1].slots)))
    executor = executor_of(remote)
    with pytest.raises(PlanError, match="writes slot 0"):
        executor.submit(broken).result()
    (again,) = remote.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    assert again.error is None


def test_what_a_start_refuses_comes_as_itself(tiny: Path) -> None:
    with pytest.raises(CapacityError, match="one sequence of max_model_len"):
        tiny_llm(tiny, distributed_executor_backend="mp", kv_cache_bytes=100)


def test_a_rank_that_is_killed_ends_all_that_wait(remote: LLM) -> None:
    """The last one here that asks for this engine."""
    (pid,) = pids_of(remote)
    streams = [remote.stream([5, 6, 7 + i], LONG) for i in range(remote.options.max_num_seqs + 3)]
    next(streams[0])
    assert remote.stats()["waiting_sequences"] > 0
    os.kill(pid, signal.SIGKILL)
    for stream in streams:
        with pytest.raises(GenerationError, match=r"rank 0 \(process \d+\) ended by signal 9 \(SIGKILL\)"):
            for _ in stream:
                pass
    with pytest.raises(GenerationError, match="create another LLM"):
        remote.generate([5, 6], LONG)
    assert remote.stats()["running_sequences"] == remote.stats()["waiting_sequences"] == 0
    assert is_gone(pid)


def test_closing_ends_the_process(tiny: Path) -> None:
    llm = tiny_llm(tiny, distributed_executor_backend="mp")
    (pid,) = pids_of(llm)
    llm.close()
    assert is_gone(pid, within_s=1.0)
    llm.close()


ORPHAN = """
import os, sys
from cascade_llm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", distributed_executor_backend="mp", max_num_seqs=4)
    stream = llm.stream([5, 6, 7], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
    next(stream)
    print(*llm.engine.executor.pids, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_rank_does_not_outlive_its_engine(tiny: Path, tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    done = subprocess.run([sys.executable, str(script), str(tiny)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert is_gone(int(done.stdout))


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_told(tiny: Path, tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(f"from cascade_llm import LLM\nLLM({str(tiny)!r}, distributed_executor_backend='mp')\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert WorkerError.__name__ in done.stderr
    assert 'if __name__ == "__main__"' in done.stderr

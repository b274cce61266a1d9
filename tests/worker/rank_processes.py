"""Loads for ranks in processes of their own, and whether these processes are still there."""

from __future__ import annotations

import time
from pathlib import Path

from cascade_llm import LLM, SamplingParams
from cascade_llm.worker.process_executor import ProcessExecutor
from tests.patience import PATIENCE_S

SHARED = [3 + (i * 7) % 80 for i in range(40)]
PROMPTS = [[*SHARED, *range(50 + 5 * i, 53 + 5 * i)] for i in range(5)] + [[9, 8, 7]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=0.8, seed=5, n=3, max_tokens=9, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=2, presence_penalty=0.5),
    SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=2, prompt_logprobs=1),
    SamplingParams(temperature=1.0, seed=1, top_p=0.9, max_tokens=15, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=2, logit_bias={5: 1.0}),
]
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


def executor_of(llm: LLM) -> ProcessExecutor:
    assert isinstance(llm.engine.executor, ProcessExecutor)
    return llm.engine.executor


def pids_of(llm: LLM) -> list[int]:
    return [pid for pid in executor_of(llm).pids if pid is not None]


def is_gone(pid: int, within_s: float = PATIENCE_S) -> bool:
    """Whether a process ends in that time; one that nobody has waited for counts as ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False

"""What each stage of a start takes: processor time and resident memory, of one process on Linux.

    python scripts/start_memory.py [--model smollm2] [--num-threads 1]

"file" are pages of libraries and of the model's file that the process has mapped and others may share.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KIB_KEYS = ("VmHWM", "VmRSS", "RssFile")
PROMPT_LEN, MAX_TOKENS = 128, 128


def main() -> None:
    """Run one start, and print a line for each stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--num-threads", type=int, default=1)
    given = parser.parse_args()
    print(f"{'stage':32} {'CPU s':>6} {'MiB':>6} {'file':>6} {'peak':>6}")
    with stage("import torch"):
        import torch  # noqa: F401
    with stage("import cascade_llm.llm"):
        import cascade_llm.llm
    with stage("LLM(...)"):
        llm = cascade_llm.llm.LLM(
            given.model, num_threads=given.num_threads, kv_cache_bytes=64 << 20, max_model_len=512, max_num_seqs=4
        )
    prompt = list(range(1000, 1000 + PROMPT_LEN))
    for count in (8, MAX_TOKENS):
        params = cascade_llm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        with stage(f"{PROMPT_LEN} tokens in, {count} out"):
            llm.generate(prompt, params)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Print what a stage has taken, and what is resident at its end."""
    begin = time.process_time()
    yield
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    peak, resident, of_files = (kib >> 10 for kib in _values({words[0][:-1]: words for words in lines if words}))
    print(f"{name:32} {time.process_time() - begin:6.2f} {resident:6} {of_files:6} {peak:6}")


def _values(status: dict[str, list[str]]) -> Iterator[int]:
    return (int(status[key][1]) for key in KIB_KEYS)


if __name__ == "__main__":
    main()

"""What a process takes that loads a small model and answers: modules and memory, looked at in a fresh interpreter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cascade_llm.loader.resolve import open_checkpoint
from tests.native_code import needs_compiler

NOT_NEEDED = {
    *("transformers", "huggingface_hub", "modelscope_hub", "sentencepiece", "matplotlib", "click", "fastapi"),
    *("pydantic", "torch._dynamo", "torch._inductor", "sympy"),
}
"""Each takes 10 to 100 MB or a tenth of a second to a second."""
MOST_TOKENS = 512
POOL_BYTES = MOST_TOKENS * 30 * 2 * 3 * 64 * 4
"""Of 30 layers with 3 KV heads of 64 float32 values."""

SCRIPT = f"""
import json, sys
from pathlib import Path
from cascade_llm import LLM, SamplingParams

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

import cascade_llm.llm
before = peak()
options = dict(dtype="float32", num_threads=1, max_num_seqs=1, max_model_len={MOST_TOKENS}, kv_cache_bytes={POOL_BYTES})
with LLM("smollm2", **options) as llm:
    llm.generate("Hello", SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
    print(json.dumps([peak() - before, sorted(sys.modules)]))
"""


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from Linux's /proc")
def test_an_answer_takes_little_more_than_file_and_pool_and_imports_what_it_needs(
    run_python: Callable[[str], str],
) -> None:
    grown, modules = json.loads(run_python(SCRIPT))
    assert [name for name in modules if name in NOT_NEEDED] == []
    assert grown < 1.2 * open_checkpoint("smollm2").num_bytes + POOL_BYTES

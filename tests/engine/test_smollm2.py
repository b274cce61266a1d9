"""The demo model from its GGUF file, through the whole engine, against transformers on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cascade_llm import LLM, SamplingParams
from cascade_llm.loader.resolve import open_checkpoint

PROMPTS = [
    "The capital of France is",
    "In one sentence: what is a radix tree, and what is it good for?",
    "def fibonacci(n):\n    ",
    "The capital of France is Paris, and the capital of Italy is",
]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    options = {"max_num_seqs": 8, "max_model_len": 1024, "kv_cache_bytes": 200_000_000}
    with LLM("smollm2", dtype="float32", exact_activations=True, **options) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    checkpoint = open_checkpoint("smollm2")
    fields = {k: v for k, v in checkpoint.hf_config().items() if k not in ("architectures", "model_type")}
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    missing, unexpected = model.load_state_dict(dict(checkpoint.tensors()), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model


def test_last_position_logits_are_within_a_thousandth(llm: LLM, reference: LlamaForCausalLM) -> None:
    engine = llm._engine
    for prompt in PROMPTS:
        params = SamplingParams(max_tokens=1)
        read = llm._input.read_prompt(prompt, params)
        state = engine.add(llm._input.request(read, params))
        plan = engine.scheduler.schedule()
        assert plan is not None
        ours = engine.executor.runner.logits(plan, plan.sample_rows)[0]
        engine.scheduler.fail(plan)  # the step was run by hand: nothing of it is to be committed
        with torch.inference_mode():
            theirs = reference(torch.tensor([read.token_ids])).logits[0, -1]
        assert (ours - theirs).abs().max() < 1e-3
        assert state.output.outputs[0].finish_reason is None
        engine.abort(state.request.request_id)


@pytest.mark.slow
def test_every_token_of_a_long_text_has_transformers_logprob(repo_root: Path, reference: LlamaForCausalLM) -> None:
    """2,000 tokens, prefilled in chunks."""
    text = (repo_root / "claude_docs" / "architecture.md").read_text(encoding="utf-8")
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 512, "max_model_len": 2048, "kv_cache_bytes": 200_000_000}
    with LLM("smollm2", dtype="float32", exact_activations=True, **options) as llm:
        ids = llm.tokenizer.encode(text)[:2000]
        assert len(ids) == 2000
        (output,) = llm.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=0))
    with torch.inference_mode():
        theirs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    reported = output["prompt_logprobs"]
    assert len(reported) == len(ids)
    for place, entry in enumerate(reported[1:]):
        assert entry.token_id == ids[place + 1]
        assert abs(entry.logprob - float(theirs[place, entry.token_id])) < 1e-3


def test_greedy_tokens_are_transformers_best(llm: LLM, reference: LlamaForCausalLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    for output in llm.generate(PROMPTS, params):
        ids = output.prompt_token_ids + output["token_ids"]
        with torch.inference_mode():
            logprobs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place, token_id in enumerate(output["token_ids"], start=len(output.prompt_token_ids) - 1):
            best, second = logprobs[place].topk(2).values.tolist()
            assert token_id == int(logprobs[place].argmax()) or best - second < 2e-3


START = """
from pathlib import Path
from cascade_llm import LLM, SamplingParams
with LLM("smollm2", dtype={dtype!r}) as llm:
    llm.generate("a", SamplingParams(max_tokens=1))
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024)
"""
"""`ru_maxrss` would count what the parent held when it forked."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's own peak")
@pytest.mark.parametrize(
    ("dtype", "most_bytes"), [pytest.param("bfloat16", 0.6e9, marks=pytest.mark.slow), ("float32", 0.6e9)]
)
def test_a_start_with_default_options_holds_little_more_than_the_weights(
    run_python: Callable[[str], str], dtype: str, most_bytes: float
) -> None:
    assert int(run_python(START.format(dtype=dtype))) < most_bytes

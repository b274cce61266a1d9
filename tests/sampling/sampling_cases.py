"""Generated cases of the sampler's tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from cascade_llm.plan import LaneStart
from cascade_llm.sampling_params import SamplingParams

PROMPT_LEN = 5
ENDING_TOKEN_IDS = frozenset({0, 3})


def lane_start(
    lane: int,
    params: SamplingParams,
    *,
    seed: int = 7,
    sample_index: int = 0,
    prompt: Sequence[int] = (1, 2, 3, 2, 1),
    output: Sequence[int] = (),
) -> LaneStart:
    return LaneStart(lane, 0, params, seed, sample_index, prompt, output, ENDING_TOKEN_IDS)


def random_logits(
    num_rows: int, vocab_size: int, seed: int, *, scale: float = 3.0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Quarters, so that float32 penalties are exact and ties are many."""
    generator = torch.Generator().manual_seed(seed)
    return ((torch.randn(num_rows, vocab_size, generator=generator) * scale * 4).round() / 4).to(dtype)


GREEDY = st.just(0.0)
TEMPERATURES = st.sampled_from([0.5, 0.8, 1.0, 2.0, 5.0])


@st.composite
def sampling_params(draw: st.DrawFn, vocab_size: int) -> SamplingParams:
    def perhaps(name: str, strategy: st.SearchStrategy[object]) -> dict[str, object]:
        return {name: draw(strategy)} if draw(st.booleans()) else {}

    fields = {
        "temperature": draw(GREEDY | TEMPERATURES),
        **perhaps("top_k", st.integers(1, vocab_size + 2) | st.integers(1, 8)),
        **perhaps("top_p", st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.95, 0.999])),
        **perhaps("min_p", st.sampled_from([0.001, 0.05, 0.5, 1.0])),
        **perhaps("presence_penalty", st.sampled_from([-2.0, 0.5, 1.0])),
        **perhaps("frequency_penalty", st.sampled_from([-0.25, 0.5, 2.0])),
        **perhaps("repetition_penalty", st.sampled_from([0.5, 2.0, 4.0])),
        **perhaps(
            "logit_bias", st.dictionaries(st.integers(0, vocab_size - 1), st.sampled_from([-100.0, 1.5]), max_size=4)
        ),
        **perhaps("min_tokens", st.integers(0, 4)),
    }
    return SamplingParams(**fields)  # type: ignore[arg-type]


@st.composite
def starts(draw: st.DrawFn, vocab_size: int, num_lanes: int) -> list[LaneStart]:
    """One start per lane, each with parameters and tokens of its own."""
    tokens = st.integers(0, vocab_size - 1)
    return [
        lane_start(
            lane,
            draw(sampling_params(vocab_size)),
            seed=draw(st.integers(-(2**63), 2**63 - 1)),
            sample_index=draw(st.integers(0, 3)),
            prompt=draw(st.lists(tokens, min_size=PROMPT_LEN, max_size=PROMPT_LEN)),
            output=draw(st.lists(tokens, max_size=5)),
        )
        for lane in range(num_lanes)
    ]

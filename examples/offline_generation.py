"""Complete a list of prompts, each with sampling of its own."""

from __future__ import annotations

from cascade_llm import LLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "Once upon a time, in a small house by the sea,",
    "The three primary colours are",
]


def main() -> None:
    greedy = SamplingParams(temperature=0, max_tokens=16, stop="\n")
    story = SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=32)
    params = [story if prompt.startswith("Once") else greedy for prompt in PROMPTS]

    with LLM("smollm2", max_model_len=512, max_num_seqs=8) as llm:
        for output in llm.generate(PROMPTS, params):
            print(f"{output.prompt!r}\n  -> {output['text']!r} ({output['finish_reason']})")


if __name__ == "__main__":
    main()

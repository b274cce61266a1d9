"""Several samples of one prompt: it is prefilled once, and its pages are shared by all samples."""

from __future__ import annotations

from cascade_llm import LLM, SamplingParams

MESSAGES = [{"role": "user", "content": "Invent a name for a small blue boat. Answer with the name only."}]


def main() -> None:
    params = SamplingParams(n=8, temperature=0.9, top_p=0.95, seed=7, max_tokens=12, logprobs=0)
    with LLM("smollm2", max_model_len=256, max_num_seqs=8) as llm:
        (output,) = llm.chat(MESSAGES, params)
        stats = llm.stats()
    samples = sorted(output.outputs, key=lambda sample: -(sample.cumulative_logprob or 0.0))
    for sample in samples:
        print(f"{sample.cumulative_logprob:8.2f}  {sample.text!r}")
    print("The number is the log-probability of the whole sample.")
    print(
        f"{len(samples)} samples of {len(output.prompt_token_ids)} prompt tokens: {stats['prefilled_tokens']} prefilled"
    )


if __name__ == "__main__":
    main()

"""A conversation, streamed. Its history stays token ids, so each turn computes only what is new."""

from __future__ import annotations

from cascade_llm import LLM, SamplingParams

TURNS = ["Name one planet of our solar system.", "Is it larger than the Earth?", "Thank you!"]


def main() -> None:
    params = SamplingParams(temperature=0, max_tokens=32)
    with LLM("smollm2", max_model_len=1024, max_num_seqs=4) as llm:
        assert llm.tokenizer is not None
        messages: list[dict[str, str]] = []
        history: list[int] = []
        for text in TURNS:
            messages.append({"role": "user", "content": text})
            print(f"> {text}")
            with llm.stream(llm.tokenizer.encode_continuation(history, messages), params) as stream:
                for delta in stream:
                    print(delta.text, end="", flush=True)
            output = stream.output
            print(f"\n  [{output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens were cached]")
            messages.append({"role": "assistant", "content": output["text"]})
            history = [*output.prompt_token_ids, *output["token_ids"]]


if __name__ == "__main__":
    main()

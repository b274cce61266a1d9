"""What a user holds: `LLM` on small real models."""

from __future__ import annotations

import copy
import gc
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_llm import LLM, CascadeError, RequestOutput, SamplingParams
from cascade_llm.errors import (
    BackendError,
    CapacityError,
    ConfigError,
    EngineClosedError,
    GenerationError,
    ModelNotFoundError,
    PromptError,
    RequestError,
    SamplingParamsError,
)
from tests.engine.tiny_llm import CONTEXT, save_tiny, tiny_llm
from tests.models.checkpoints import tiny_model

SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def llm(tiny: Path) -> Iterator[LLM]:
    with tiny_llm(tiny) as llm:
        yield llm
        stats = llm.stats()
        assert stats["free_pages"] + stats["held_pages"] + stats["cached_pages"] == stats["total_pages"]


@pytest.fixture(scope="module")
def smollm2() -> Iterator[LLM]:
    options = {"dtype": "float32", "exact_activations": True, "max_num_seqs": 32, "kv_cache_bytes": 500_000_000}
    with LLM("smollm2", **options) as llm:
        yield llm


# -- one or many ------------------------------------------------------------------------------------------------------


def test_token_ids_are_one_prompt_and_lists_of_them_many(llm: LLM) -> None:
    (one,) = llm.generate([5, 6, 7], SHORT)
    assert one.prompt_token_ids == [5, 6, 7]
    assert len(one["token_ids"]) == 4
    many = llm.generate([[5, 6, 7], [8, 9]], SHORT)
    assert many[0].outputs[0].token_ids == one["token_ids"]
    assert llm.generate([], SHORT) == []


def test_texts_are_tokenized_and_come_back_as_text(smollm2: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    (one,) = smollm2.generate("The capital of France is", params)
    assert "Paris" in one["text"]
    assert one.prompt == "The capital of France is"
    (answer,) = smollm2.chat([{"role": "user", "content": "What is the capital of France?"}], params)
    assert answer.outputs[0].text == "The capital of France is Paris."
    assert answer["finish_reason"] == "stop"
    two = smollm2.chat([[{"role": "user", "content": "Say hi."}], [{"role": "user", "content": "Say bye."}]], params)
    assert len(two) == 2


def test_params_are_one_for_all_or_one_per_prompt(llm: LLM) -> None:
    lengths = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 3)]
    assert [len(out["token_ids"]) for out in llm.generate([[5], [6]], lengths)] == [1, 3]
    with pytest.raises(SamplingParamsError, match="2 entries for 3 prompts"):
        llm.generate([[5], [6], [7]], lengths)
    with pytest.raises(SamplingParamsError, match="params must be one SamplingParams"):
        llm.generate([[5]], {"temperature": 0})  # type: ignore[arg-type]


def test_a_lower_priority_number_runs_earlier(tiny: Path) -> None:
    with tiny_llm(tiny, max_num_seqs=1) as llm:
        streams = [llm.stream([5, 6], SHORT, priority=rank) for rank in (2, 0, 1)]
        for _ in streams[0]:
            pass
        assert all(stream.output.finished for stream in streams)
    with tiny_llm(tiny, max_num_seqs=1) as llm, pytest.raises(ConfigError, match="priority has 1 entries"):
        llm.generate([[5], [6]], SHORT, priority=[1])


def test_n_samples_share_the_prompt(tiny: Path) -> None:
    params = SamplingParams(n=5, temperature=1.0, seed=3, max_tokens=6, ignore_eos=True)
    prompt = list(range(10, 32))
    with tiny_llm(tiny) as llm:
        (out,) = llm.generate(prompt, params)
        stats = llm.stats()
    assert len({tuple(sample.token_ids) for sample in out.outputs}) > 1
    assert [sample.index for sample in out.outputs] == [0, 1, 2, 3, 4]
    assert stats["prefilled_tokens"] == len(prompt)
    assert stats["kv_bytes_saved"] > 0
    with tiny_llm(tiny, max_num_seqs=2) as llm:  # fewer lanes than samples: the same draws, some later
        (queued,) = llm.generate(prompt, params)
    assert [s.token_ids for s in queued.outputs] == [s.token_ids for s in out.outputs]


@pytest.mark.parametrize("length", [1, 4, 8, 63, 64, 65, 130, CONTEXT - 1])
def test_prompts_of_awkward_lengths(llm: LLM, length: int) -> None:
    prompt = [3 + i % 90 for i in range(length)]
    first, again = (llm.generate(prompt, SHORT)[0] for _ in range(2))
    assert first["token_ids"] == again["token_ids"]
    assert again.num_cached_tokens == (length - 1) // 4 * 4
    assert len(first["token_ids"]) == min(4, CONTEXT - length)
    assert first["finish_reason"] == "length"


# -- ends -------------------------------------------------------------------------------------------------------------


def test_ending_ids_and_stop_ids_end_a_sample(llm: LLM) -> None:
    (free,) = llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    third = free["token_ids"][2]
    first_place = free["token_ids"].index(third)
    (stopped,) = llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=8, stop_token_ids=[third]))
    assert stopped["token_ids"] == free["token_ids"][: first_place + 1]
    assert (stopped["finish_reason"], stopped.outputs[0].stop_reason) == ("stop", third)
    bias = {2: 100.0}  # the checkpoint's own end
    (ended,) = llm.generate([5, 6, 7], SamplingParams(temperature=0, logit_bias=bias))
    assert (ended["token_ids"], ended["finish_reason"], ended.outputs[0].stop_reason) == ([2], "stop", None)
    (later,) = llm.generate([5, 6, 7], SamplingParams(temperature=0, logit_bias=bias, min_tokens=3))
    assert later["token_ids"].index(2) == 3


def test_a_stop_string_ends_text_and_sequence(smollm2: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=60)
    (free,) = smollm2.generate("Count: one, two, three,", params)
    stop = free["text"][7:12]
    (cut,) = smollm2.generate(
        "Count: one, two, three,", SamplingParams(temperature=0, max_tokens=60, stop=[stop, "never there"])
    )
    assert cut["text"] == free["text"][: free["text"].index(stop)]
    assert (cut["finish_reason"], cut.outputs[0].stop_reason) == ("stop", stop)
    assert len(cut["token_ids"]) < len(free["token_ids"])
    assert smollm2.stats()["running_sequences"] == 0


# -- log-probabilities ------------------------------------------------------------------------------------------------


def test_logprobs_are_the_raw_models(tiny: Path) -> None:
    model = tiny_model("llama", max_position_embeddings=CONTEXT)
    prompt = list(range(20, 50))
    params = SamplingParams(
        temperature=0.5, top_k=3, seed=1, max_tokens=5, ignore_eos=True, logprobs=4, prompt_logprobs=2
    )
    with tiny_llm(tiny, max_num_batched_tokens=16) as llm:
        llm.generate(prompt, SHORT)  # what is cached must not hide a prompt's log-probabilities
        (out,) = llm.generate(prompt, params)
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompt + out["token_ids"]])).logits[0].log_softmax(-1)
    assert out.prompt_logprobs is not None
    assert out.prompt_logprobs[0] is None
    reported = [*out.prompt_logprobs[1:], *out["logprobs"]]
    assert len(reported) == len(prompt) - 1 + 5
    for place, entry in enumerate(reported):
        assert entry is not None
        row = logprobs[place]
        assert entry.token_id == (prompt + out["token_ids"])[place + 1]
        assert abs(entry.logprob - float(row[entry.token_id])) < 1e-4
        assert entry.rank == 1 + int((row > row[entry.token_id]).sum())
        assert [token for token, _ in entry.top] == row.topk(len(entry.top)).indices.tolist()
    assert {len(entry.top) for entry in out["logprobs"]} == {4}
    assert out["cumulative_logprob"] == pytest.approx(sum(entry.logprob for entry in out["logprobs"]))


# -- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_yields_what_generate_returns(smollm2: LLM) -> None:
    params = SamplingParams(temperature=0.9, seed=5, max_tokens=20, n=2)
    (whole,) = smollm2.generate("Once upon a time", params)
    texts, tokens, ends = ["", ""], [[], []], [None, None]
    stream = smollm2.stream("Once upon a time", params)
    for delta in stream:
        assert ends[delta.index] is None
        texts[delta.index] += delta.text
        tokens[delta.index] += delta.token_ids
        ends[delta.index] = delta.finish_reason
    assert texts == [sample.text for sample in whole.outputs]
    assert tokens == [sample.token_ids for sample in whole.outputs]
    assert ends == [sample.finish_reason for sample in whole.outputs]
    assert stream.output.finished


def test_closing_a_stream_frees_its_pages(llm: LLM) -> None:
    stream = llm.stream(list(range(5, 40)), SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    assert llm.stats()["held_pages"] > 0
    stream.close()
    assert llm.stats()["held_pages"] == 0
    assert stream.output.outputs[0].finish_reason == "abort"
    forgotten = llm.stream([5, 6], SHORT)
    next(forgotten)
    del forgotten
    gc.collect()
    assert llm.stats()["running_sequences"] == 0


def test_streams_run_side_by_side_with_generate(llm: LLM) -> None:
    stream = llm.stream([5, 6, 7], SHORT)
    next(stream)
    (beside,) = llm.generate([5, 6, 7], SHORT)
    rest = [token for delta in stream for token in delta.token_ids]
    assert stream.output.outputs[0].token_ids == beside["token_ids"]
    assert beside["token_ids"][-len(rest) :] == rest


def test_a_conversation_finds_its_history_cached(smollm2: LLM) -> None:
    messages = [{"role": "user", "content": "Name three colours, and say a word about each of them."}]
    params = SamplingParams(temperature=0, max_tokens=32)
    (first,) = smollm2.chat(messages, params)
    messages += [{"role": "assistant", "content": first["text"]}, {"role": "user", "content": "And a fourth?"}]
    (second,) = smollm2.chat(messages, params)
    assert second.num_cached_tokens >= len(first.prompt_token_ids) // 16 * 16


# -- life -------------------------------------------------------------------------------------------------------------


def test_two_engines_live_in_one_process(tiny: Path) -> None:
    with tiny_llm(tiny) as a, tiny_llm(tiny, enable_cascade_attention=False) as b:
        assert a.generate([5, 6, 7], SHORT)[0]["token_ids"] == b.generate([5, 6, 7], SHORT)[0]["token_ids"]
        assert a.stats()["steps"] == b.stats()["steps"]


def test_no_setting_of_the_process_is_changed(tiny: Path) -> None:
    before = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed())
    with tiny_llm(tiny, num_threads=2) as llm:
        llm.generate([5, 6, 7], SHORT)
    after = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed())
    assert before == after


def test_a_closed_engine_says_so(tiny: Path) -> None:
    llm = tiny_llm(tiny)
    stream = llm.stream([5, 6], SHORT)
    llm.close()
    llm.close()
    with pytest.raises(EngineClosedError, match="create another"):
        llm.generate([5, 6], SHORT)
    assert [delta.finish_reason for delta in stream] == ["abort"]
    assert llm.stats()["running_sequences"] == 0


def test_the_prefix_cache_can_be_forgotten_or_switched_off(llm: LLM, tiny: Path) -> None:
    prompt = list(range(5, 40))
    llm.generate(prompt, SHORT)
    assert llm.stats()["cached_pages"] > 0
    llm.reset_prefix_cache()
    assert llm.stats()["cached_pages"] == 0
    assert llm.generate(prompt, SHORT)[0].num_cached_tokens == 0
    with tiny_llm(tiny, enable_prefix_caching=False) as off:
        off.generate(prompt, SHORT)
        assert off.generate(prompt, SHORT)[0].num_cached_tokens == 0
        assert off.stats()["cached_pages"] == 0


def test_dummy_weights_need_a_configuration_only(tiny: Path) -> None:
    with tiny_llm(tiny / "config.json", load_format="dummy") as llm:
        assert len(llm.generate([5, 6], SHORT)[0]["token_ids"]) == 4


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty"),
        ([5, 97], "token id 97: the model's vocabulary is 0 to 96"),
        ([-1], "token id -1"),
        ([3] * CONTEXT, f"{CONTEXT} tokens, the context is max_model_len {CONTEXT}"),
        ("text", "needs a tokenizer, and this checkpoint has none: give token ids"),
        ([5, "x"], "not a list with 'x'"),
    ],
)
def test_bad_prompts_are_named_before_anything_runs(llm: LLM, prompt: Any, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        llm.generate([prompt], SHORT)
    with pytest.raises(PromptError, match=f"1 of 3 prompts cannot be served .nothing has run.: prompt 1: .*{words}"):
        llm.generate([[5], prompt, [6]], SHORT)
    assert llm.stats()["steps"] == 0
    outputs = llm.generate([[5], prompt, [6]], SHORT, on_error="return")
    assert [out.error is None for out in outputs] == [True, False, True]
    assert words in str(outputs[1].error) or "x" in str(outputs[1].error)
    assert [len(out["token_ids"]) for out in outputs[::2]] == [4, 4]


def test_prompts_of_other_types_are_refused(llm: LLM) -> None:
    with pytest.raises(PromptError, match="prompts is a int"):
        llm.generate(5, SHORT)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="prompt 0 is a float"):
        llm.generate([0.5], SHORT)  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="on_error"):
        llm.generate([5], SHORT, on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="messages must be a list"):
        llm.chat([], SHORT)


def test_parameters_that_only_the_model_can_refuse(llm: LLM) -> None:
    with pytest.raises(SamplingParamsError, match="stop_token_ids has the token id 97"):
        llm.generate([5], SamplingParams(stop_token_ids=[97]))
    with pytest.raises(SamplingParamsError, match="logit_bias has the token id 1000"):
        llm.generate([5], SamplingParams(logit_bias={1000: 1.0}))
    with pytest.raises(SamplingParamsError, match="stop strings need a tokenizer"):
        llm.generate([5], SamplingParams(stop="end"))
    with pytest.raises(RequestError, match="2 of 2 prompts"):
        llm.generate([[5], [97]], SamplingParams(stop="end"))


def test_options_and_models_that_cannot_be(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'page_size'"):
        LLM(tiny, page_sise=16)
    with pytest.raises(ModelNotFoundError):
        LLM(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="made for 256 positions"):
        LLM(tiny, max_model_len=300)
    with pytest.raises(CapacityError, match="raise kv_cache_bytes, or set max_model_len to 8 or less"):
        LLM(tiny, dtype="float32", page_size=4, kv_cache_bytes=2 * 4 * 2 * 3 * 2 * 8 * 4)
    with pytest.raises(CapacityError, match="are free: lower it"):
        LLM(tiny, kv_cache_bytes=10**15, max_num_seqs=8192 * 1024, max_num_batched_tokens=8192 * 1024)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="use cpu"):
            LLM(tiny, device="cuda")


def test_logits_that_are_not_finite_end_that_request_alone(tmp_path: Path) -> None:
    model = tiny_model("llama", max_position_embeddings=CONTEXT)
    with torch.no_grad():
        model.model.embed_tokens.weight[11] = torch.nan
    model.save_pretrained(tmp_path)
    prompts = [[5, 6, 7, 8, 9], [5, 6, 7, 8, 11], [5, 6, 7, 8, 10], [11] * 20]
    with tiny_llm(tmp_path) as llm:
        outputs = llm.generate(prompts, SHORT, on_error="return")
        assert [out["finish_reason"] for out in outputs] == ["length", "error", "length", "error"]
        assert "not finite (first in: embedding)" in str(outputs[1].error)
        assert llm.stats()["held_pages"] == 0
        again = llm.generate([[11] * 20, [5, 6, 7, 8, 9]], SHORT, on_error="return")
        assert again[0].num_cached_tokens == 0, "pages of a failed request must not be found again"
        assert again[1]["token_ids"] == outputs[0]["token_ids"]
        with pytest.raises(GenerationError, match="2 of 4 requests ended early") as raised:
            llm.generate(prompts, SHORT)
        survivor = raised.value.outputs[0]
        assert isinstance(survivor, RequestOutput)
        assert survivor["token_ids"] == outputs[0]["token_ids"]


@pytest.mark.parametrize("lag", [0, 1])
def test_a_step_that_raises_ends_its_requests_and_no_other(
    tiny: Path, lag: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tiny_llm(tiny, schedule_lag=lag, max_num_seqs=2) as llm:
        runner = llm._engine.executor.runner
        original, calls = type(runner).submit, []

        def submit(self: Any, plan: Any) -> Any:
            calls.append(plan)
            if len(calls) == 3:
                raise RuntimeError("out of luck")
            return original(self, plan)

        monkeypatch.setattr(type(runner), "submit", submit)
        outputs = llm.generate([[5, 6], [7, 8], [9, 10]], SHORT, on_error="return")
        assert [out["finish_reason"] for out in outputs] == ["error", "error", "length"]
        assert "the step failed: RuntimeError: out of luck" in str(outputs[0].error)
        assert llm.stats()["held_pages"] == 0
        (after,) = llm.generate([5, 6], SHORT)
        assert after["finish_reason"] == "length"


def test_an_interruption_leaves_a_clean_engine(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_llm(tiny) as llm:
        runner = llm._engine.executor.runner
        original, calls = type(runner).submit, []

        def submit(self: Any, plan: Any) -> Any:
            calls.append(plan)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return original(self, plan)

        monkeypatch.setattr(type(runner), "submit", submit)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[5, 6], [7, 8]], SHORT)
        assert llm.stats()["held_pages"] == llm.stats()["running_sequences"] == llm.stats()["waiting_sequences"] == 0
        assert llm.generate([5, 6], SHORT)[0]["finish_reason"] == "length"


def test_every_error_is_one_of_ours() -> None:
    for error in (ConfigError, RequestError, ModelNotFoundError, CapacityError, GenerationError, EngineClosedError):
        assert issubclass(error, CascadeError)


FORKED = """
import os, sys
from cascade_llm import LLM, SamplingParams
from cascade_llm.errors import BackendError

options = dict(num_threads=2, dtype="float32", max_num_seqs=2)
llm = LLM({folder!r}, **options)
stream = llm.stream([5, 6, 7])
llm.generate([list(range(5, 60))] * 2, SamplingParams(max_tokens=4, ignore_eos=True))

def refused(use):
    try:
        use()
    except BackendError as error:
        assert "spawn" in str(error), error
        return True
    return False

child = os.fork()
if child == 0:
    uses = (lambda: llm.generate([5]), lambda: llm.stats(), llm.step, lambda: LLM({folder!r}, **options))
    everything = all(refused(use) for use in uses)
    stream.close()
    llm.close()
    os._exit(0 if everything else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(list(stream)) > 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_is_told_to_spawn(tiny: Path, run_python: Callable[[str], str]) -> None:
    assert run_python(FORKED.format(folder=str(tiny))).split() == ["0", "True"]


def test_pickling_and_copying_say_what_to_do_instead(tiny: Path) -> None:
    with tiny_llm(tiny) as llm:
        for use in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(BackendError, match="hand on the model's name"):
                use(llm)

"""Outputs: both ways of reading them, and when a request has ended."""

from __future__ import annotations

import pytest

from cascade_llm.errors import GenerationError
from cascade_llm.outputs import CompletionOutput, RequestOutput, TokenLogprob


def output(*reasons: str | None) -> RequestOutput:
    samples = [
        CompletionOutput(index=i, text=f"text {i}", token_ids=[i], finish_reason=reason)
        for i, reason in enumerate(reasons)
    ]
    return RequestOutput(request_id="r", prompt="p", prompt_token_ids=[1, 2], outputs=samples)


def test_both_spellings_are_the_first_sample() -> None:
    out = output("stop", "length")
    assert out["text"] == out.outputs[0].text == "text 0"
    assert out["token_ids"] is out.outputs[0].token_ids
    assert out["finish_reason"] == "stop"
    assert out["prompt_token_ids"] == [1, 2]
    assert out["outputs"][1].text == "text 1"


def test_reads_like_a_mapping() -> None:
    out = output("stop")
    assert len(set(out.keys())) == len(out.keys())
    assert {name: out[name] for name in out} == dict(out)
    assert dict(out)["request_id"] == "r"
    assert "text" in out
    assert "txt" not in out


@pytest.mark.parametrize("key", ["txt", "__init__", "finished", "keys"])
def test_unknown_key_is_a_key_error(key: str) -> None:
    with pytest.raises(KeyError, match=key):
        output("stop")[key]


@pytest.mark.parametrize(
    ("reasons", "finished"),
    [((), False), ((None,), False), (("stop",), True), (("stop", None), False), (("stop", "length"), True)],
)
def test_finished_when_every_sample_is(reasons: tuple[str | None, ...], finished: bool) -> None:
    assert output(*reasons).finished is finished


def test_an_error_ends_a_request_and_is_raised_where_there_is_no_text() -> None:
    failed = output()
    failed.error = GenerationError("logits were not finite")
    assert failed.finished
    assert failed["error"] is failed.error
    with pytest.raises(GenerationError, match="not finite"):
        failed["text"]
    half = output(None)
    half.error = GenerationError("logits were not finite")
    assert half.finished
    assert half["text"] == "text 0"


def test_samples_do_not_share_their_lists() -> None:
    first, second = CompletionOutput(index=0), CompletionOutput(index=1)
    first.token_ids.append(1)
    assert second.token_ids == []


def test_token_logprob_is_a_plain_tuple() -> None:
    assert TokenLogprob(token_id=3, logprob=-0.5, rank=1, top=((3, -0.5),)) == (3, -0.5, 1, ((3, -0.5),))

"""The client against a server on a real socket: every token timed, every failure told."""

from __future__ import annotations

import pytest

from cascade_llm.bench.load import Load, LoadRequest
from cascade_llm.bench.online import AllAtOnce, AtConcurrency, AtRate
from cascade_llm.bench.serve_client import CompletionsServer, run_against_server
from cascade_llm.bench.workloads import ChatWorkload, Vocabulary
from cascade_llm.errors import BackendError, ConfigError
from tests.bench.fake_openai_server import fake_openai_server

LOAD = Load("test", tuple(LoadRequest([i, i + 1], 3, n=1 + i % 2) for i in range(6)), temperature=0.5)


@pytest.mark.parametrize("behaviour", ["well", "no usage"])
def test_every_token_of_every_sample_is_timed(behaviour: str) -> None:
    with fake_openai_server(behaviour=behaviour) as fake:
        run = run_against_server(CompletionsServer(fake.url), LOAD, AllAtOnce())
    assert run.errors == []
    for request, answer in zip(LOAD.requests, run.answers, strict=True):
        timing = answer.timing
        assert [len(times) for times in timing.token_times_s] == [3] * request.n
        assert timing.arrival_s <= timing.token_times_s[0][0] <= timing.end_s <= run.elapsed_s
        assert answer.num_generated == 3 * request.n
        assert timing.ttft_s > 0


def test_requests_say_what_the_load_says() -> None:
    with fake_openai_server() as fake:
        server = CompletionsServer(fake.url + "/v1/", model="second", api_key="secret")
        run_against_server(server, LOAD, AtConcurrency(1))
        unforced = Load("one", LOAD.requests[:1])
        run_against_server(server, unforced, AllAtOnce(), ignore_eos=False)
    assert fake.paths == ["/v1/models"]
    assert fake.authorizations == ["Bearer secret"]
    body = fake.bodies[1]
    assert body.pop("stream_options") == {"include_usage": True}
    assert body == {
        "model": "second",
        "prompt": [1, 2],
        "max_tokens": 3,
        "n": 2,
        "stream": True,
        "temperature": 0.5,
        "top_p": 1.0,
        "ignore_eos": True,
    }
    assert "ignore_eos" not in fake.bodies[-1]


def test_concurrency_is_kept_and_a_rate_spreads_arrivals() -> None:
    with fake_openai_server(token_s=0.005) as fake:
        server = CompletionsServer(fake.url)
        run_against_server(server, LOAD, AtConcurrency(2))
        assert fake.most_running == 2
        arrivals = AtRate(200.0, seed=5)
        run = run_against_server(server, LOAD, arrivals)
    assert [answer.timing.arrival_s for answer in run.answers] == arrivals.times_s(6)


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [("refuses", "status 429"), ("breaks off", "without \\[DONE\\]"), ("says error", "out of pages")],
)
def test_a_failed_request_is_counted_not_timed(behaviour: str, words: str) -> None:
    with fake_openai_server(behaviour=behaviour) as fake:
        run = run_against_server(CompletionsServer(fake.url), LOAD, AllAtOnce())
    assert run.succeeded == []
    assert len(run.errors) == 6
    for error in run.errors:
        assert pytest.raises(ValueError, match=words).matches(ValueError(error)), error


def test_the_others_go_on_where_some_fail() -> None:
    with fake_openai_server(behaviour="fails every third") as fake:
        run = run_against_server(CompletionsServer(fake.url), LOAD, AtConcurrency(1))
    assert (len(run.succeeded), len(run.errors)) == (4, 2)


def test_a_server_that_is_not_there_or_none_is_refused_at_once() -> None:
    with fake_openai_server() as fake:
        url = fake.url
        with pytest.raises(BackendError, match="it serves first, second"):
            CompletionsServer(url, model="third")
    with pytest.raises(BackendError, match="nothing answers"):
        CompletionsServer(url, timeout_s=5)
    with (
        fake_openai_server(behaviour="speaks nonsense") as fake,
        pytest.raises(BackendError, match="OpenAI's protocol"),
    ):
        CompletionsServer(fake.url)
    for bad in ("localhost:8000", "ftp://x", ""):
        with pytest.raises(ConfigError, match="no URL"):
            CompletionsServer(bad)


CHAT = ChatWorkload(conversations=2, turns=3, system_len=4, user_len=2, output_len=3, think_s=0.01)


def prompts_of(load: Load, answer: list[int]) -> list[list[int]]:
    """Of each request, where every answer is the same."""
    prompts: list[list[int]] = []
    for request in load.requests:
        before = [] if request.follows is None else [*prompts[request.follows], *answer]
        prompts.append([*before, *request.token_ids])
    return prompts


def test_turns_go_on_from_the_answers_that_the_server_told() -> None:
    load = CHAT.load(Vocabulary(50))
    with fake_openai_server(behaviour="tells ids") as fake:
        run = run_against_server(CompletionsServer(fake.url), load, AtRate(500.0))
    assert run.errors == []
    assert sorted(body["prompt"] for body in fake.bodies) == sorted(prompts_of(load, [7, 8, 9]))
    assert [body.get("return_token_ids", False) for body in sorted(fake.bodies, key=lambda b: len(b["prompt"]))] == [
        *[True] * 4,
        *[False] * 2,
    ]
    timings = [answer.timing for answer in run.answers]
    for index, request in enumerate(load.requests):
        if request.follows is not None:
            assert timings[index].arrival_s >= timings[request.follows].end_s + request.delay_s


def test_turns_go_on_from_recorded_answers_where_a_server_tells_none() -> None:
    load = CHAT.load(Vocabulary(50))
    with fake_openai_server() as fake:
        server = CompletionsServer(fake.url)
        failed = run_against_server(server, load, AllAtOnce())
        assert "--history recorded" in failed.errors[0]
        assert len(failed.errors) == 6
        assert sum("the turn before it failed" in error for error in failed.errors) == 4
        assert len(fake.bodies) == 2
        fake.bodies.clear()
        recorded = load.with_recorded_history()
        assert run_against_server(server, recorded, AtConcurrency(1)).errors == []
    assert sorted(body["prompt"] for body in fake.bodies) == sorted(list(r.token_ids) for r in recorded.requests)
    assert not any("return_token_ids" in body for body in fake.bodies)

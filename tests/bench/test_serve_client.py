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


def test_conversations_are_refused() -> None:
    load = ChatWorkload(conversations=1, turns=2, system_len=4, user_len=4, output_len=4).load(Vocabulary(50))
    with fake_openai_server() as fake, pytest.raises(ConfigError, match="goes on from answers"):
        run_against_server(CompletionsServer(fake.url), load, AllAtOnce())

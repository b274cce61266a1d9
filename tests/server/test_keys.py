"""Files of keys, and what is left of a quota: a key that comes when it was told to is let in."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cascade_llm.errors import ConfigError
from cascade_llm.scheduler.sequence import Client
from cascade_llm.server.api_errors import ApiError
from cascade_llm.server.keys import Quota, Visitor, read_keys
from cascade_llm.server.options import ServerOptions
from cascade_llm.server.quotas import QuotaKeeper

FULL = """
keys:
  - {key: secret-1, name: alice, tenant: acme, weight: 2, requests_per_minute: 60, tokens_per_minute: 1000,
     max_concurrent: 4, most_urgent_priority: 5}
  - {key: secret-2, name: bob}
tenants:
  - {name: acme, cache_share: 0.25}
"""


def options(tmp_path: Path, text: str, name: str = "keys.yaml", **others: object) -> ServerOptions:
    (tmp_path / name).write_text(text)
    return ServerOptions(api_key_file=str(tmp_path / name), **others)  # type: ignore[arg-type]


def test_a_file_names_keys_tenants_and_quotas(tmp_path: Path) -> None:
    keys = read_keys(options(tmp_path, FULL, api_key=["plain"]))
    quota = Quota(requests_per_minute=60, tokens_per_minute=1000, max_concurrent=4)
    assert keys.find("secret-1") == Visitor(
        client=Client(name="alice", tenant="acme", weight=2.0), quota=quota, most_urgent=5
    )
    assert keys.find("secret-2") == Visitor(client=Client(name="bob"))
    assert keys.find("plain") == Visitor(client=Client(name="key-1"))
    assert keys.tenant_shares == {"acme": 0.25}
    assert (keys.find("secret-3"), keys.find(""), len(keys), keys.has_tenants) == (None, None, 3, True)


def test_lines_are_keys_of_one_tenant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASCADE_LLM_API_KEY", "from-the-environment")
    keys = read_keys(options(tmp_path, "one\ntwo\n", "keys", api_key=["three"]))
    found = [keys.find(key) for key in ("three", "from-the-environment", "one", "two")]
    assert [visitor.client.name for visitor in found if visitor] == ["key-1", "key-2", "key-3", "key-4"]
    assert not keys.has_tenants


def test_without_keys_everybody_is_one_visitor() -> None:
    keys = read_keys(ServerOptions())
    assert (keys.find(""), keys.find("any"), len(keys)) == (Visitor(), Visitor(), 0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("keys: []", "no key"),
        ("- secret", "object"),
        ("keys: [secret]", "keys"),
        ("keys: [{key: secret}]", "name"),
        ("keys: [{key: secret, name: a b}]", "name"),
        ("keys: [{key: secret, name: a, tenent: b}]", "tenent"),
        ("keys: [{key: secret, name: a, weight: 0}]", "weight"),
        ("keys: [{key: secret, name: a, requests_per_minute: 0}]", "requests_per_minute"),
        ("keys: [{key: secret, name: a}, {key: secret, name: b}]", "same key"),
        ("keys: [{key: secret, name: a}, {key: other, name: a}]", "same name"),
        ("keys: {", "keys.yaml"),
        ("keys: [{key: secret, name: a}]\ntenants: [{name: b, cache_share: 0.5}]", "'b' has a cache_share and no key"),
        ("keys: [{key: secret, name: a, tenant: b}]\ntenants: [{name: b, cache_share: 0}]", "cache_share"),
        ("keys: [{key: secret, name: a, tenant: b}]\ntenants: [{name: b, cache_share: 1.5}]", "cache_share"),
        ("keys: [{key: secret, name: a, tenant: b}]\ntenants: [{name: b}]", "cache_share"),
        (
            "keys: [{key: secret, name: a, tenant: b}]\n"
            "tenants: [{name: b, cache_share: 0.1}, {name: b, cache_share: 0.2}]",
            "twice",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_named_and_no_key(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as raised:
        read_keys(options(tmp_path, text))
    assert "secret" not in str(raised.value)


def test_a_priority_is_as_urgent_as_a_key_may_be() -> None:
    visitor = Visitor(most_urgent=3)
    assert [visitor.priority(asked) for asked in (None, 3, 9)] == [3, 3, 9]
    with pytest.raises(ApiError, match="3 or larger"):
        visitor.priority(2)
    assert [Visitor().priority(asked) for asked in (None, -5)] == [0, -5]
    assert Visitor(most_urgent=-2).priority(None) == 0


# quotas


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def refusal(keeper: QuotaKeeper, num_tokens: int) -> ApiError | None:
    try:
        keeper.check(num_tokens)
    except ApiError as error:
        return error
    return None


def test_a_bucket_fills_evenly_and_answers_say_how_full_it_is() -> None:
    clock = Clock()
    keeper = QuotaKeeper(Quota(requests_per_minute=6, tokens_per_minute=600), clock)
    keeper.take(200).settle(150)
    assert keeper.headers == {
        "x-ratelimit-limit-requests": "6",
        "x-ratelimit-remaining-requests": "5",
        "x-ratelimit-reset-requests": "10.000s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "450",
        "x-ratelimit-reset-tokens": "15.000s",
    }
    error = refusal(keeper, 500)
    assert error is not None
    assert (error.code, error.headers["retry-after"]) == ("rate_limit_exceeded", "5")
    assert error.headers["x-ratelimit-remaining-tokens"] == "450"
    for _ in range(5):
        keeper.take(1).settle(1)
    error = refusal(keeper, 1)
    assert error is not None
    assert error.headers["retry-after"] == "10"


def test_one_that_asks_for_more_than_a_minute_is_let_in_and_owes() -> None:
    clock = Clock()
    keeper = QuotaKeeper(Quota(tokens_per_minute=60), clock)
    keeper.take(1000).settle(90)
    assert keeper.headers["x-ratelimit-remaining-tokens"] == "0"
    error = refusal(keeper, 1)
    assert error is not None
    assert error.headers["retry-after"] == "31", "30 are owed, and one is asked for"


def test_requests_under_way_are_counted_until_they_are_settled() -> None:
    keeper = QuotaKeeper(Quota(max_concurrent=2), Clock())
    leases = [keeper.take(5), keeper.take(5)]
    assert refusal(keeper, 5) is not None
    leases[0].settle(5)
    leases[0].settle(5)
    assert refusal(keeper, 5) is None
    keeper.take(5)
    assert refusal(keeper, 5) is not None


@pytest.mark.parametrize("seed", range(20))
def test_who_comes_when_told_is_let_in_and_who_comes_earlier_is_not(seed: int) -> None:
    rng, clock = random.Random(seed), Clock()
    limits = {"requests": rng.choice((None, 3, 17, 1000)), "tokens": rng.choice((None, 7, 100, 12345))}
    keeper = QuotaKeeper(Quota(requests_per_minute=limits["requests"], tokens_per_minute=limits["tokens"]), clock)
    taken: dict[str, list[tuple[float, float]]] = {"requests": [], "tokens": []}
    for _ in range(200):
        clock.now_s += rng.choice((0.0, 0.3, 5.0, 70.0))
        num_tokens = rng.randrange(1, 300)
        error = refusal(keeper, num_tokens)
        if error is not None:
            clock.now_s += int(error.headers["retry-after"]) - 1
            assert refusal(keeper, num_tokens) is not None, "earlier by a second"
            clock.now_s += 1
        keeper.take(num_tokens).settle(num_tokens)
        for what, amount in (("requests", 1.0), ("tokens", float(num_tokens))):
            taken[what].append((clock.now_s, amount))
    for what, limit in limits.items():
        if limit is not None:  # in no stretch of time more than a minute's worth and what filled up in it
            times = taken[what]
            for first in range(0, len(times), 7):
                begin_s = times[first][0]
                total = sum(amount for when_s, amount in times[first:-1])
                owed = 300 if what == "tokens" else 0
                assert total <= limit + owed + limit * (times[-1][0] - begin_s) / 60 + 1e-3

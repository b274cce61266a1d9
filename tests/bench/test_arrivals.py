"""The queue of arrivals: who is due when, against a slow simulation of the same rules."""

from __future__ import annotations

import random
from typing import Any

import pytest

from cascade_llm.bench.arrivals import Arrival, ArrivalQueue


def request(follows: int | None = None, *, goes_on: bool = True, delay_s: float = 0.0) -> dict[str, Any]:
    return {"token_ids": [1], "follows": follows, "delay_s": delay_s, "goes_on": goes_on and follows is not None}


@pytest.mark.parametrize("seed", range(30))
def test_every_request_is_sent_once_at_its_time_and_below_the_limit(seed: int) -> None:
    """Time goes by in steps of 1; an answer takes some of them; a conversation's turn comes after the one before."""
    rng = random.Random(seed)
    requests: list[dict[str, Any]] = []
    for index in range(rng.randint(1, 12)):
        follows = rng.randrange(index) if index and rng.random() < 0.6 else None
        requests.append(request(follows, goes_on=rng.random() < 0.5, delay_s=float(rng.randint(0, 3))))
    times_s = sorted(float(rng.randint(0, 5)) for r in requests if r["follows"] is None)
    limit, by_clock = rng.choice([None, 1, 2]), rng.random() < 0.5
    queue = ArrivalQueue(requests, times_s, max_running=limit, by_clock=by_clock)
    due_s = dict(zip([i for i, r in enumerate(requests) if r["follows"] is None], times_s, strict=True))
    running: dict[int, int] = {}
    said: dict[int, list[int]] = {}
    now_s, sent = 0.0, []
    while len(said) < len(requests):
        for arrival in queue.take(now_s, len(running)):
            index = arrival.request_index
            follows = requests[index]["follows"]
            assert due_s[index] <= now_s
            assert arrival.arrival_s == (due_s[index] if limit is None else now_s)
            assert arrival.token_ids == [*(said[follows] if requests[index]["goes_on"] else []), 1]
            running[index] = rng.randint(1, 4)
            sent.append(index)
        assert limit is None or len(running) <= limit
        late = [index for index in due_s if index not in sent and due_s[index] <= now_s]
        assert not late or len(running) == limit, "nobody who is due waits but for the limit"
        waiting = [due_s[index] - now_s for index in due_s if index not in sent]
        has_room = limit is None or len(running) < limit
        assert queue.wait_s(now_s, len(running)) == (min(waiting) if waiting and has_room else None)
        assert len(queue) == len(waiting)
        now_s += 1
        for index in [index for index, left in running.items() if left == 1]:
            said[index] = [index, 7]
            queue.end(index, now_s, said[index])
            later = [i for i, r in enumerate(requests) if r["follows"] == index]
            due_s.update({i: now_s + (requests[i]["delay_s"] if by_clock else 0.0) for i in later})
        running = {index: left - 1 for index, left in running.items() if left > 1}
    assert sorted(sent) == list(range(len(requests)))
    assert not queue


def test_what_follows_a_failure_never_comes() -> None:
    requests = [request(), request(0), request(1), request(0), request()]
    queue = ArrivalQueue(requests, [0.0, 0.0], max_running=None, by_clock=True)
    assert [arrival.request_index for arrival in queue.take(0.0, 0)] == [0, 4]
    assert sorted(queue.fail(0)) == [1, 2, 3]
    queue.end(4, 1.0, [1])
    assert not queue
    assert list[Arrival](queue.take(9.0, 0)) == []

"""The loop of every driver: commands as JSON lines on standard input, answers on standard output.

Drivers run in the interpreter of the engine that they drive, where cascade-llm is not installed: the standard library,
the engine, and this file beside them are all there is.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from arrivals import ArrivalQueue


class Driver:
    """What a driver says and does; an instance is made once and told what to run."""

    requests: list[dict[str, Any]]
    """Of the load: {"token_ids", "output_len", "n"}, and what `ArrivalQueue` wants to know of each."""

    def start(self, command: dict[str, Any]) -> dict[str, Any]:
        """Start the engine; returns its flags, everything that was chosen for it.

        Where `command["online"]` is true, only `run_online` will be asked for, else only `run`.
        """
        raise NotImplementedError

    def load(self, requests: list[dict[str, Any]], temperature: float, top_p: float) -> None:
        """Get ready for what is to be run."""
        raise NotImplementedError

    def run(self, output_len: int | None) -> int:
        """Run it once, with that many tokens each where `output_len` is given.

        Returns the number of generated tokens. The time of this call is what is measured.
        """
        raise NotImplementedError

    def run_online(self, queue: ArrivalQueue, now_s: Callable[[], float]) -> dict[int, Timing]:
        """Run requests as the queue lets them arrive; `now_s` is the run's clock. Returns a timing for each request."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget cached prefixes; not timed."""

    def score(self, windows: list[list[int]]) -> list[list[float]]:
        """The log-probability of each token after the first of each window, which is all that stands before it.

        Asked without a load.
        """
        raise NotImplementedError


class Timing:
    """One request, in seconds of the run's clock."""

    def __init__(self, arrival_s: float, num_samples: int) -> None:
        self.arrival_s, self.end_s = arrival_s, 0.0
        self.token_times_s: list[list[float]] | None = [[] for _ in range(num_samples)]
        """When each token of each sample was handed out; None for an engine that hands out whole answers."""


def serve(driver: Driver) -> None:
    """Answer commands until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an engine prints must not mix with the answers
    for line in sys.stdin:
        try:
            answer = _answer(driver, json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(driver: Driver, command: dict[str, Any]) -> dict[str, Any]:
    operation = command["op"]
    if operation == "start":
        return {"flags": driver.start(command)}
    if operation == "load":
        driver.requests = command["requests"]
        driver.load(command["requests"], command["temperature"], command["top_p"])
        return {}
    if operation == "run":
        if command["reset"]:
            driver.reset()
        start_s = time.perf_counter()
        num_generated = driver.run(command["output_len"])
        return {"elapsed_s": time.perf_counter() - start_s, "num_generated": num_generated}
    if operation == "online":
        return _online(driver, command)
    if operation == "score":
        return {"logprobs": driver.score(command["windows"])}
    if operation == "memory":
        return {"peak_bytes": peak_memory_bytes()}
    raise ValueError(f"unknown command {operation}")


def _online(driver: Driver, command: dict[str, Any]) -> dict[str, Any]:
    if command["reset"]:
        driver.reset()
    queue = ArrivalQueue(
        driver.requests, command["times_s"], max_running=command["max_running"], by_clock=command["by_clock"]
    )
    start_s = time.perf_counter()
    timings = driver.run_online(queue, lambda: time.perf_counter() - start_s)
    return {
        "elapsed_s": max(timing.end_s for timing in timings.values()),
        "num_generated": sum(request["n"] * request["output_len"] for request in driver.requests),
        "timings": [vars(timings[index]) for index in range(len(driver.requests))],
    }


def peak_memory_bytes() -> int:
    """The most that this process and each of its children held, added up; Linux tells of living processes too."""
    total = 0
    for pid in [os.getpid(), *_descendants(os.getpid())]:
        try:
            with open(f"/proc/{pid}/status") as status:
                total += sum(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
        except OSError:
            continue
    return total or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as stat:
                parent = int(stat.read().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found += [int(entry), *_descendants(int(entry))]
    return found

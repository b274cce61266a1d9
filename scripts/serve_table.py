#!/usr/bin/env python3
"""What serving costs: `LLM.generate` against streaming clients of `cascade-llm serve`, on the same loads, in turn.

    scripts/serve_table.py [--clients 64] [--shared 512] [--own 16] [--out 64] [--rounds 5]

Each round has a load of its own, random token ids behind a shared prefix, which both sides compute from cold: first
one, then the other, the order changing. The clients are raw sockets of one thread, so that they take little of the
processors that the server has to share with them; what the API process took of these is told too. Then short requests,
one at a time: the time to the first token.
"""

from __future__ import annotations

import argparse
import json
import random
import selectors
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from typing import Any

import psutil

from cascade_llm import LLM, SamplingParams

CODE = "import sys; from cascade_llm.cli.main import main; sys.exit(main())"
ENGINE: dict[str, Any] = {"kv_cache_bytes": 1 << 30, "max_num_seqs": 128}
VOCABULARY = 40_000
SINGLES = 40
"""Requests of 16 tokens, one at a time, whose first tokens are timed."""


def make_load(seed: int, args: argparse.Namespace) -> list[list[int]]:
    """Token ids of every client's prompt."""
    draw = random.Random(seed)
    shared = [draw.randrange(100, VOCABULARY) for _ in range(args.shared)]
    return [[*shared, *(draw.randrange(100, VOCABULARY) for _ in range(args.own))] for _ in range(args.clients)]


def generate(llm: LLM, prompts: Sequence[Sequence[int]], num_out: int) -> tuple[float, float]:
    """(seconds in all, seconds to the first token) of the engine itself; the second for one prompt alone."""
    params = SamplingParams(temperature=0, max_tokens=num_out, ignore_eos=True)
    start_s = time.perf_counter()
    if len(prompts) > 1:
        llm.generate(list(map(list, prompts)), params)
        return time.perf_counter() - start_s, 0.0
    with llm.stream(list(prompts[0]), params) as stream:
        next(stream)
        first_s = time.perf_counter() - start_s
        for _ in stream:
            pass
    return time.perf_counter() - start_s, first_s


def ask(port: int, prompts: Sequence[Sequence[int]], num_out: int) -> tuple[float, float]:
    """The same by streaming clients that all ask at once."""
    waiting = selectors.DefaultSelector()
    bodies = [
        json.dumps({"prompt": list(p), "max_tokens": num_out, "temperature": 0, "ignore_eos": True, "stream": True})
        for p in prompts
    ]
    received: dict[socket.socket, bytes] = {}
    start_s, firsts_s = time.perf_counter(), []
    for body in bodies:
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            b"content-type: application/json\r\n" + f"content-length: {len(body)}\r\n\r\n{body}".encode()
        )
        waiting.register(client, selectors.EVENT_READ, client)
        received[client] = b""
    while waiting.get_map():
        for key, _ in waiting.select():
            client = key.data
            data = client.recv(1 << 16)
            if b"data: " in data and b"data: " not in received[client]:
                firsts_s.append(time.perf_counter() - start_s)
            received[client] += data
            if not data:
                waiting.unregister(client)
                client.close()
    elapsed_s = time.perf_counter() - start_s
    for answer in received.values():
        assert answer.count(b"[DONE]") == 1, answer[-500:]
    return elapsed_s, min(firsts_s)


def start_server(model: str) -> tuple[subprocess.Popen[str], int]:
    """A server that is ready, and its port."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
    command = [sys.executable, "-c", CODE, "serve", model, "--port", "0", "--log-level", "warning", *flags]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    line = server.stderr.readline()
    port = int(line.rsplit(":", 1)[1])
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready")
            return server, port
        except OSError:
            assert server.poll() is None, "the server has ended"
            time.sleep(0.2)


def cpu_s(process: psutil.Process) -> float:
    """Processor time that a process has taken, in seconds; without its children's."""
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    for name, value in (("clients", 64), ("shared", 512), ("own", 16), ("out", 64), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    server, port = start_server(args.model)
    try:
        with LLM(args.model, **ENGINE) as llm:
            sides = {"LLM.generate": lambda p, n: generate(llm, p, n), "clients": lambda p, n: ask(port, p, n)}
            api = psutil.Process(server.pid)
            before_s = 0.0
            speeds: dict[str, list[float]] = {name: [] for name in sides}
            used: dict[str, list[float]] = {name: [] for name in sides}
            firsts: dict[str, list[float]] = {name: [] for name in sides}
            for turn in range(-1, args.rounds):  # the first warms both up
                if turn == 0:
                    before_s = cpu_s(api)
                order = list(sides) if turn % 2 else list(sides)[::-1]
                load = make_load(turn, args)
                for name in order:
                    processes = [psutil.Process()] if name == "LLM.generate" else [api, *api.children()]
                    used_s = sum(map(cpu_s, processes))
                    elapsed_s, _ = sides[name](load, args.out)
                    if turn >= 0:
                        used[name].append(sum(map(cpu_s, processes)) - used_s)
                        speeds[name].append(args.clients * args.out / elapsed_s)
            api_s = cpu_s(api) - before_s
            for turn in range(SINGLES):
                prompt = random.Random(turn).sample(range(100, VOCABULARY), 16)
                for name in list(sides)[:: 1 - 2 * (turn % 2)]:
                    _, first_s = sides[name]([prompt], 2)
                    firsts[name].append(1000 * first_s)
    finally:
        server.terminate()
        server.wait()
    print(f"{args.clients} x ({args.shared} shared + {args.own} own), {args.out} out, {args.rounds} rounds")
    for name in sides:
        rates = " ".join(f"{speed:.0f}" for speed in speeds[name])
        print(f"{name:14} tok/s median {statistics.median(speeds[name]):.0f} ({rates})")
    shares = [b / a for a, b in zip(speeds["LLM.generate"], speeds["clients"], strict=True)]
    print(f"clients / generate, of each round: median {statistics.median(shares):.3f}")
    for name in sides:
        print(f"{name:14} first token of one request, ms: median {statistics.median(firsts[name]):.1f}")
    added = [b - a for a, b in zip(firsts["LLM.generate"], firsts["clients"], strict=True)]
    print(f"added to the first token, ms: median {statistics.median(added):.1f}, most {max(added):.1f}")
    num_tokens = args.rounds * args.clients * args.out
    for name in sides:
        shown = " ".join(f"{seconds:.1f}" for seconds in used[name])
        print(f"{name:14} processor time of a round, s: median {statistics.median(used[name]):.2f} ({shown})")
    print(f"API process: {1e6 * api_s / num_tokens:.0f} us of a processor for each token")


if __name__ == "__main__":
    main()

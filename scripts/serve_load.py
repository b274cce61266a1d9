#!/usr/bin/env python3
"""Many clients of every kind against one server for some time, and what must hold meanwhile and at the end.

    scripts/serve_load.py [--seconds 300] [--clients 200] [--model smollm2] [--phases load,drain,kill] [--json FILE]

`load`: streaming clients with shared prefixes, of which three of ten leave at a random moment; some send what is no
JSON, or too large, or with a wrong key, and some read slowly. At the end every request must have ended in one of the
ways that its client can tell, and the pool's pages must be free or cached, and sum up to what they were. Memory of both
processes is written down every 5 seconds, that of the engine by what it is for; what nothing explains must not grow in
the last third. `drain`: SIGTERM while clients stream; who streams gets the end, who comes later is refused, and the
server ends with 0. `kill`: SIGKILL to the engine process while clients stream; each is told, and after the restart each
is served again.

Everything is on the loopback of this machine; at most `--clients` connections are open at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

CODE = "import sys; from cascade_llm.cli.main import main; sys.exit(main())"
KEY = "load"
SAMPLE_S = 5.0
LONGEST_ANSWER_S = 240.0
MOST_BODY_BYTES = 200_000
POOL_BYTES = 128 << 20
"""Small, so that all of its pages have been written soon, and what grows then is something else."""
PREFIXES, PREFIX_LEN, OWN_LEN, LONG_LEN, CONTEXT_LEN = 8, 192, 24, 256, 512
SHARE_OF_LEAVERS = 0.3
KINDS = {"streams": 80, "reads slowly": 5, "is no JSON": 5, "is too large": 5, "has a wrong key": 5}
"""Of a hundred requests."""
EXPECTED = {"is no JSON": 400, "is too large": 413, "has a wrong key": 401}


@dataclass
class Tally:
    """What became of requests: by kind and end."""

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_tokens: int = 0

    @property
    def lost(self) -> dict[str, int]:
        """Requests that ended in none of the ways that are told."""
        return {f"{kind}: {end}": count for (kind, end), count in self.ends.items() if end.startswith("LOST")}


class Server:
    """The command in a process of its own."""

    def __init__(self, model: str, *options: str) -> None:
        flags = ("--port", "0", "--log-level", "warning", "--api-key", KEY, f"--max-body-bytes={MOST_BODY_BYTES}")
        pool = (f"--kv-cache-bytes={POOL_BYTES}", f"--max-model-len={CONTEXT_LEN}")
        command = [sys.executable, "-c", CODE, "serve", model, *flags, *pool, *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.port = int(self.process.stderr.readline().rsplit(":", 1)[1])
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Raises `AssertionError` where the process ends before."""
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready").close()
                return
            assert self.process.poll() is None, "the server has ended"
            time.sleep(0.2)

    @property
    def engine(self) -> psutil.Process:
        """The process with the engine: the child that is no helper of multiprocessing's."""
        children = psutil.Process(self.process.pid).children()
        (engine,) = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
        return engine

    def metrics(self) -> dict[str, float]:
        """Values by name and labels, without the prefix."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/metrics", headers={"authorization": f"Bearer {KEY}"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read().decode()
        return {name: float(value) for name, value in re.findall(r"^cascade_llm_(\S+) (\S+)$", text, re.MULTILINE)}

    def pages(self) -> dict[str, int]:
        """Of the pool, by state."""
        metrics = self.metrics()
        return {state: int(metrics[f'pages{{state="{state}"}}']) for state in ("free", "held", "cached")}

    def end(self) -> int:
        """Its exit status after SIGTERM."""
        self.process.terminate()
        return self.process.wait(120)


class Clients:
    """Requests of many kinds; each is counted once, by how it ended."""

    def __init__(self, port: int, seed: int) -> None:
        self._port, self._draw = port, random.Random(seed)
        self._prefixes = [self._ids(PREFIX_LEN) for _ in range(PREFIXES)]
        self.tally = Tally()
        self.num_open = 0

    async def keep_on(self, end_s: float) -> None:
        """One client after another until then."""
        while time.monotonic() < end_s:
            kind = self._draw.choices(list(KINDS), list(KINDS.values()))[0]
            self.num_open += 1
            try:
                async with asyncio.timeout(LONGEST_ANSWER_S):
                    end = await self.ask(kind, output_len=self._draw.randrange(4, 64))
            except TimeoutError:
                end = "LOST: no end"
            except (OSError, asyncio.IncompleteReadError) as error:
                end = f"LOST: {type(error).__name__}"
            finally:
                self.num_open -= 1
            self.tally.ends[kind, end] += 1

    async def first_tokens(self) -> None:
        """Return when a stream has begun."""
        while not self.tally.num_tokens:
            await asyncio.sleep(0.01)

    async def ask(self, kind: str, output_len: int) -> str:
        """One request; returns how it ended."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)
        try:
            writer.write(self._request(kind, output_len))
            with suppress(ConnectionError):  # a body that is too large is not read to its end
                await writer.drain()
            status = int((await reader.readline()).split()[1])
            if kind in EXPECTED:
                return "refused" if status == EXPECTED[kind] else f"LOST: status {status}"
            if status != 200:
                return f"told {status}" if status in (429, 503) else f"LOST: status {status}"
            leaves_after = self._draw.randrange(output_len) if self._draw.random() < SHARE_OF_LEAVERS else None
            return await self._read(reader, output_len, leaves_after, pause_s=0.05 if kind == "reads slowly" else 0.0)
        finally:
            writer.close()

    async def _read(
        self, reader: asyncio.StreamReader, output_len: int, leaves_after: int | None, pause_s: float
    ) -> str:
        num_tokens = 0
        while line := await reader.readline():
            if b"data: [DONE]" in line:
                return "whole" if num_tokens == output_len else f"LOST: {num_tokens} tokens of {output_len}"
            if line.startswith(b"data: "):
                piece = json.loads(line[6:])
                if "error" in piece:
                    return f"told {piece['error']['message']}"
                (choice,) = piece["choices"]
                num_tokens += len(choice["token_ids"])
                self.tally.num_tokens += len(choice["token_ids"])
                await asyncio.sleep(pause_s)
                if leaves_after is not None and num_tokens > leaves_after:
                    return "left"
        return "LOST: the stream broke off"

    def _request(self, kind: str, output_len: int) -> bytes:
        prompt = [*self._draw.choice(self._prefixes), *self._ids(OWN_LEN)]
        asked = {"prompt": prompt, "max_tokens": output_len, "ignore_eos": True, "stream": True}
        body = json.dumps({**asked, "return_token_ids": True}).encode()
        if kind == "is no JSON":
            body = body[: self._draw.randrange(len(body) - 1)]
        if kind == "is too large":
            body = body.ljust(MOST_BODY_BYTES + 1)
        key = "wrong" if kind == "has a wrong key" else KEY
        return (
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            b"content-type: application/json\r\n"
            + f"authorization: Bearer {key}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            + body
        )

    def _ids(self, count: int) -> list[int]:
        return [self._draw.randrange(100, 40_000) for _ in range(count)]


async def _watch(server: Server, samples: list[dict[str, int]]) -> None:
    """Write memory down, in MiB, for as long as this runs.

    `pool` is what pages of K and V have been written at least once: they take no memory before. `rest` is what neither
    that nor files explain.
    """
    start_s, least_free = time.monotonic(), 1 << 62
    while True:
        pages = await asyncio.to_thread(server.pages)
        least_free = min(least_free, pages["free"])
        pool = POOL_BYTES * (1 - least_free / sum(pages.values()))
        engine, api = server.engine.memory_info(), psutil.Process(server.process.pid).memory_info()
        values = {"api": api.rss, "engine": engine.rss, "files": engine.shared, "pool": int(pool)}
        values["rest"] = engine.rss - engine.shared - int(pool)
        at_s = round(time.monotonic() - start_s)
        samples.append({"at_s": at_s, **{name: value >> 20 for name, value in values.items()}})
        await asyncio.sleep(SAMPLE_S)


async def _run(server: Server, clients: Clients, num_clients: int, seconds: float) -> list[dict[str, int]]:
    samples: list[dict[str, int]] = []
    watching = asyncio.create_task(_watch(server, samples))
    end_s = time.monotonic() + seconds
    await asyncio.gather(*(clients.keep_on(end_s) for _ in range(num_clients)))
    watching.cancel()
    return samples


def run_load(args: argparse.Namespace) -> dict[str, Any]:
    """The phase `load`."""
    server = Server(args.model, *args.option)
    try:
        total = sum(server.pages().values())
        clients = Clients(server.port, args.seed)
        samples = asyncio.run(_run(server, clients, args.clients, args.seconds))
        end_s = time.monotonic() + 60
        while server.metrics()["open_samples"] or server.pages()["held"]:
            assert time.monotonic() < end_s, f"after all clients have left: {server.pages()}"
            time.sleep(0.1)
        pages = server.pages()
        assert sum(pages.values()) == total, f"{pages} are not the {total} pages of the start"
        assert not clients.tally.lost, clients.tally.lost
        status = server.end()
        assert status == 0, f"exit status {status}"
    finally:
        server.process.kill()
    _check_memory(samples)
    return {"ends": _as_texts(clients.tally), "tokens": clients.tally.num_tokens, "pages": pages, "memory": samples}


def _check_memory(samples: Sequence[Mapping[str, int]]) -> None:
    """Both processes' memory has come to its end: the last third stays near the middle one."""
    third = len(samples) // 3
    if third < 4:
        return
    for name in ("api", "rest"):
        middle, last = (max(row[name] for row in rows) for rows in (samples[third : 2 * third], samples[2 * third :]))
        assert last <= middle * 1.1 + 10, f"{name} grew from {middle} to {last} MiB: {samples}"


def run_drain(args: argparse.Namespace) -> dict[str, Any]:
    """The phase `drain`."""
    server = Server(args.model, *args.option)
    try:
        clients = Clients(server.port, args.seed)

        async def run() -> tuple[list[str], str]:
            asked = [asyncio.create_task(clients.ask("streams", LONG_LEN)) for _ in range(args.clients // 4)]
            await clients.first_tokens()
            server.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.5)
            try:
                late = await clients.ask("streams", 4)
            except (OSError, IndexError):
                late = "refused"
            return [_end_of(one) for one in await asyncio.gather(*asked, return_exceptions=True)], late

        ends, late = asyncio.run(run())
        status = server.process.wait(120)
    finally:
        server.process.kill()
    assert status == 0, f"exit status {status}"
    assert late == "refused", late
    counts = Counter(ends)
    assert not [end for end in counts if end.startswith("LOST")], counts
    return {"ends": dict(counts), "late": late}


def run_kill(args: argparse.Namespace) -> dict[str, Any]:
    """The phase `kill`."""
    server = Server(args.model, "--restarts", "1", *args.option)
    try:
        clients = Clients(server.port, args.seed)

        async def run(num_clients: int, *, kills: bool) -> list[str]:
            output_len = LONG_LEN if kills else 8
            asked = [asyncio.create_task(clients.ask("streams", output_len)) for _ in range(num_clients)]
            if kills:
                await clients.first_tokens()
                server.engine.kill()
            return [_end_of(one) for one in await asyncio.gather(*asked, return_exceptions=True)]

        before = Counter(asyncio.run(run(args.clients // 4, kills=True)))
        time.sleep(1.0)
        server.wait_until_ready()
        after = Counter(asyncio.run(run(8, kills=False)))
        assert server.metrics()["engine_restarts"] == 1
        server.end()
    finally:
        server.process.kill()
    for counts in (before, after):
        assert not [end for end in counts if end.startswith("LOST")], counts
    assert any(end.startswith("told") for end in before), "nobody was there to be told"
    assert set(after) <= {"whole", "left"}, after
    return {"before": dict(before), "after": dict(after)}


def _end_of(result: str | BaseException) -> str:
    return result if isinstance(result, str) else f"LOST: {type(result).__name__}: {result}"


def _as_texts(tally: Tally) -> dict[str, int]:
    return {f"{kind}: {end}": count for (kind, end), count in sorted(tally.ends.items())}


PHASES = {"load": run_load, "drain": run_drain, "kill": run_kill}


def _shown(name: str, result: Mapping[str, Any]) -> None:
    print(f"{name}:")
    for key, value in result.items():
        if key != "memory":
            print(f"  {key}: {value}")
    rows: Sequence[Mapping[str, int]] = result.get("memory", ())
    for row in rows[:: max(1, len(rows) // 12)]:
        print("  " + "  ".join(f"{key} {value}" for key, value in row.items()))


def main() -> None:
    """Run the phases; raises `AssertionError` for what does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--json", type=Path, help="a file for all figures")
    parser.add_argument("--option", action="append", default=[], help="of the server, such as --option=--num-threads=1")
    args = parser.parse_args()
    results = {}
    for name in args.phases.split(","):
        results[name] = PHASES[name](args)
        _shown(name, results[name])
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2), "utf-8")


if __name__ == "__main__":
    main()

"""Two real processes: the tokens of `LLM.generate`, and what is told when one of them dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq
import zmq.asyncio

from cascade_llm import SamplingParams
from cascade_llm.errors import EngineClosedError, WorkerError
from cascade_llm.scheduler.sequence import Request
from cascade_llm.server.engine_client import Answers, EngineClient, EngineStatus
from cascade_llm.server.messages import Abort, decode_command, given_params
from tests.engine.tiny_llm import save_tiny, tiny_llm
from tests.patience import PATIENCE_S

OPTIONS = {"dtype": "float32", "page_size": 4, "max_num_seqs": 16, "num_threads": 1}
PROMPTS = [[*(3 + (i * 7) % 80 for i in range(40)), 5 + j] for j in range(3)]
SHORT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1, prompt_logprobs=0, n=2)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), num_hidden_layers=1)


def ask(name: str, params: SamplingParams, prompt: list[int] = PROMPTS[0]) -> Request:
    return Request(request_id=name, prompt_token_ids=prompt, params=params, seed=1)


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def with_client(
    model: Path | str,
    body: Callable[[EngineClient], Coroutine[Any, Any, None]],
    *,
    until_ready: bool = True,
    options: Mapping[str, Any] | None = None,
    **how: Any,
) -> None:
    async def run() -> None:
        client = EngineClient(str(model), {**OPTIONS, **(options or {})}, **how)
        client.start()
        try:
            if until_ready:
                await until(lambda: client.status is not EngineStatus.STARTING)
                assert client.status is EngineStatus.READY, client.failure
            await body(client)
        finally:
            await client.close()
        assert client.pid is None
        assert client.status is EngineStatus.ENDED

    asyncio.run(run())


async def collect(answers: Answers) -> dict[int, Any]:
    """The gains of each request, merged."""
    whole: dict[int, Any] = {}
    async for batch in answers:
        for place, gain in batch:
            if place in whole:
                whole[place].merge(gain)
            else:
                whole[place] = gain
    return whole


def test_requests_get_what_generate_returns_and_leaving_frees_pages(tiny: Path) -> None:
    with tiny_llm(tiny, num_threads=1) as llm:
        expected = llm.generate(PROMPTS, SHORT)

    async def body(client: EngineClient) -> None:
        assert client.facts is not None
        assert client.facts.max_model_len == 256
        requests = [ask(str(i), SHORT, prompt) for i, prompt in enumerate(PROMPTS)]
        for only_whole in (True, False):
            answers = client.submit(requests, only_whole=only_whole)
            whole = await collect(answers)
            for place, output in enumerate(expected):
                deltas = sorted(whole[place].deltas, key=lambda delta: delta.index)
                assert [delta.token_ids for delta in deltas] == [sample.token_ids for sample in output.outputs]
                assert [len(delta.logprobs) for delta in deltas] == [8, 8]
                assert len(whole[place].prompt_logprobs) == len(PROMPTS[place])
                assert whole[place].finished
            assert answers.unfinished == []
        left = client.submit([ask("left", LONG)], only_whole=False)
        async for _ in left:
            break
        client.leave(left)
        assert client.num_open_samples == 0
        stats = await client.ask("stats", PATIENCE_S)
        assert (stats["held_pages"], stats["running_sequences"]) == (0, 0)
        assert (await client.ask("health", PATIENCE_S))["stalled_s"] < PATIENCE_S
        running = client.submit([ask("running", LONG)], only_whole=True)
        await client.close()
        assert (await collect(running))[0].error == "the server is shutting down"

    with_client(tiny, body)


def test_the_death_of_the_engine_answers_all_and_it_is_started_again(tiny: Path) -> None:
    ended: list[bool] = []

    async def body(client: EngineClient) -> None:
        for num_restarts in range(2):
            waiting = [client.submit([ask(f"{num_restarts}-{i}", LONG)], only_whole=bool(i)) for i in range(3)]
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
            for answers in waiting:
                assert "killed by signal 9" in (await collect(answers))[0].error
            with pytest.raises(EngineClosedError, match="killed by signal 9"):
                client.submit([ask("late", SHORT)], only_whole=True)
            with pytest.raises(WorkerError, match="killed by signal 9"):
                await client.ask("health")
            if num_restarts == 0:
                assert not ended
                await until(lambda: client.status is EngineStatus.READY)
                assert len((await collect(client.submit([ask("again", SHORT)], only_whole=True)))[0].deltas) == 2
        assert ended == [True]

    with_client(tiny, body, restarts=1, first_pause_s=0.01, on_end=lambda: ended.append(True))


def test_a_command_waits_for_a_process_that_listens_late(tmp_path: Path) -> None:
    async def run() -> None:
        client, context = EngineClient("model", {}), zmq.asyncio.Context()
        try:
            sender, listener = context.socket(zmq.PUSH), context.socket(zmq.PULL)
            sender.bind(f"ipc://{tmp_path}/commands")
            client._commands = sender
            client._send(Abort(["one"]))
            client._send(Abort(["two"]))
            await asyncio.sleep(0.05)
            listener.connect(f"ipc://{tmp_path}/commands")
            received = [await asyncio.wait_for(listener.recv(), PATIENCE_S) for _ in range(2)]
            assert [decode_command(message) for message in received] == [Abort(["one"]), Abort(["two"])]
        finally:
            context.destroy(linger=0)

    asyncio.run(run())


def test_a_model_that_cannot_be_loaded_is_not_tried_again() -> None:
    async def body(client: EngineClient) -> None:
        await until(lambda: client.status is EngineStatus.ENDED)
        assert "/no/such/model" in str(client.failure)
        assert client.num_restarts == 0

    with_client("/no/such/model", body, until_ready=False, restarts=3)


def test_the_engine_process_ends_with_its_parent(tiny: Path) -> None:
    code = (
        "import asyncio\n"
        "from cascade_llm.server.engine_client import EngineClient\n"
        "async def run():\n"
        f"    client = EngineClient({str(tiny)!r}, {OPTIONS!r})\n"
        "    client.start()\n"
        "    while client.facts is None:\n"
        "        await asyncio.sleep(0.01)\n"
        "    print(client.pid, flush=True)\n"
        "    await asyncio.sleep(1000)\n"
        "if __name__ == '__main__':\n"
        "    asyncio.run(run())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        engine = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        engine.wait(PATIENCE_S)


def test_parameters_cross_as_they_are() -> None:
    params = SamplingParams(logit_bias={5: 1.5}, stop=["a", "b"], stop_token_ids=[3], seed=-1, top_k=-1, n=2)
    assert SamplingParams(**given_params(params)) == params
    assert given_params(SamplingParams()) == {}


@pytest.mark.slow
def test_the_death_of_a_rank_is_noticed_while_nobody_asks(tiny: Path) -> None:
    def kill_rank(client: EngineClient) -> None:
        children = psutil.Process(client.pid).children()
        (rank,) = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
        rank.kill()

    async def body(client: EngineClient) -> None:
        kill_rank(client)
        await until(lambda: client.status is not EngineStatus.READY)
        assert "a process that runs steps has ended" in str(client.failure)
        with pytest.raises(WorkerError):
            await client.ask("health")
        await until(lambda: client.status is EngineStatus.READY)
        waiting = [client.submit([ask(str(i), LONG)], only_whole=bool(i)) for i in range(20)]
        kill_rank(client)
        for answers in waiting:
            assert (await collect(answers))[0].error is not None
        await until(lambda: client.status is EngineStatus.ENDED)

    with_client(tiny, body, restarts=1, first_pause_s=0.01, options={"distributed_executor_backend": "mp"})

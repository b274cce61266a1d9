"""Servers of other engines, and ours, as processes: started with one model, asked over HTTP, ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cascade_llm.bench.load import LoadRequest
from cascade_llm.bench.online import RequestTiming
from cascade_llm.bench.serve_client import CompletionsServer
from cascade_llm.errors import BackendError

__all__ = ["SERVERS", "ServerCommand", "ServerNeeds", "started_server"]

OURS = "import sys; from cascade_llm.cli.main import main; sys.exit(main())"
START_S, END_S = 300.0, 20.0
LOG_BYTES = 3000
ANY, ASKED = LoadRequest([5, 6, 7], 8), {"ignore_eos": True, "return_token_ids": True}
"""Answered by a server that is ready."""


@dataclass(frozen=True, kw_only=True)
class ServerNeeds:
    """What a server must have room for, and what it runs."""

    model: Path
    """A Hugging Face folder, or a .gguf file."""
    program: Path | None
    """The interpreter that has the engine, or its server; None is our own interpreter."""
    max_model_len: int
    max_num_seqs: int
    num_threads: int
    kv_cache_gib: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class ServerCommand:
    """How a server is started; what is not said is its own default."""

    arguments: Callable[[ServerNeeds, int], Sequence[str]]
    """The command for a port."""
    variables: Callable[[ServerNeeds], Mapping[str, str]] = field(default=lambda needs: {})


def _ours(needs: ServerNeeds, port: int) -> Sequence[str]:
    return [
        *(str(needs.program or sys.executable), "-c", OURS, "serve", str(needs.model), f"--port={port}"),
        *(f"--max-model-len={needs.max_model_len}", f"--max-num-seqs={needs.max_num_seqs}", f"--dtype={needs.dtype}"),
        *(f"--num-threads={needs.num_threads}", f"--kv-cache-bytes={needs.kv_cache_gib << 30}"),
        *("--no-page", "--log-level=warning"),
    ]


def _vllm(needs: ServerNeeds, port: int) -> Sequence[str]:
    return [
        *(str(needs.program), "-m", "vllm.entrypoints.openai.api_server", f"--model={needs.model}", f"--port={port}"),
        *(f"--max-model-len={needs.max_model_len}", f"--max-num-seqs={needs.max_num_seqs}", f"--dtype={needs.dtype}"),
        *("--host=127.0.0.1", "--served-model-name=served", "--uvicorn-log-level=warning"),
        *("--disable-log-stats",),
    ]


def _vllm_variables(needs: ServerNeeds) -> Mapping[str, str]:
    variables = {"VLLM_CPU_KVCACHE_SPACE": str(needs.kv_cache_gib), "VLLM_NO_USAGE_STATS": "1"}
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > needs.num_threads:  # else its own choice, a thread for each core, is the same number
        variables["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores[: needs.num_threads]))
    return variables


def _llama(needs: ServerNeeds, port: int) -> Sequence[str]:
    context = needs.max_model_len * needs.max_num_seqs  # for all slots together
    return [
        *(str(needs.program), "--model", str(needs.model), "--host", "127.0.0.1", "--port", str(port)),
        *("--ctx-size", str(context), "--parallel", str(needs.max_num_seqs)),
        *("--threads", str(needs.num_threads), "--threads-batch", str(needs.num_threads)),
    ]


SERVERS: Mapping[str, ServerCommand] = {
    "cascade-llm": ServerCommand(arguments=_ours),
    "vllm": ServerCommand(arguments=_vllm, variables=_vllm_variables),
    "llama.cpp": ServerCommand(arguments=_llama),
}


@contextmanager
def started_server(name: str, needs: ServerNeeds) -> Iterator[CompletionsServer]:
    """A server that answers; it ends with this context, and its children too.

    Raises `BackendError` with its last words where it cannot be started, ends, or is not there after 5 minutes.
    """
    command, port = SERVERS[name], _free_port()
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    if needs.program is None:
        inherited = dict(os.environ)
    said = {"OMP_NUM_THREADS": str(needs.num_threads), "HF_HUB_OFFLINE": "1", **command.variables(needs)}
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                command.arguments(needs, port),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**inherited, **said},
                start_new_session=True,
            )
        except OSError as error:
            raise BackendError(f"{name} cannot be started ({error}): give its program") from None
        try:
            yield _when_it_answers(name, process, f"http://127.0.0.1:{port}", log.fileno())
        finally:
            _end(process)


def _when_it_answers(name: str, process: subprocess.Popen[bytes], url: str, log: int) -> CompletionsServer:
    end_s, error = time.monotonic() + START_S, "nothing listens"
    while time.monotonic() < end_s:
        if process.poll() is not None:
            raise BackendError(f"{name} has ended. Its last words: {_last_words(log)}")
        with suppress(BackendError):
            server = CompletionsServer(url)
            answer = server.complete(ANY.token_ids, ANY, ASKED, RequestTiming(0.0), lambda: 0.0)
            if answer.error is None:
                return server
            error = answer.error
        time.sleep(0.5)
    raise BackendError(f"{name} does not answer after {START_S:.0f} s ({error}). Its last words: {_last_words(log)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # also children that outlived it
    process.wait()


def _last_words(log: int) -> str:
    size = os.fstat(log).st_size
    return os.pread(log, LOG_BYTES, max(0, size - LOG_BYTES)).decode(errors="replace")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port

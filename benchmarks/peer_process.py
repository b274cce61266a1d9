"""Another engine in a process of its own, driven by JSON lines: one command in, one answer out."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from typing import IO, Any

from benchmarks.peer_environment import PeerInterpreter
from cascade_llm.bench import arrivals
from cascade_llm.errors import BackendError

__all__ = ["PeerProcess"]

CLOSE_S = 15.0
LOG_LINES = 6


class PeerProcess:
    """Runs a driver script of `peers`.

    Its standard output carries answers alone (a driver sends everything else to standard error, which goes to a file).
    It has a process group of its own: an interruption reaches us alone, and closing ends its children as well. Between
    commands the group is stopped: engines poll their queues, and that takes a core from the side that is measured.
    """

    def __init__(self, peer: PeerInterpreter, environment: Mapping[str, str]) -> None:
        """`environment`: variables in addition to ours."""
        self.name = peer.name
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
        self._path = tempfile.TemporaryDirectory(prefix="cascade-llm-")  # removed in close()
        shutil.copy(arrivals.__file__, self._path.name)  # drivers read no other module of the package
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        self._process = subprocess.Popen(
            [str(peer.python), str(peer.driver)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**inherited, "PYTHONPATH": os.pathsep.join((self._path.name, *peer.path)), **environment},
            start_new_session=True,
        )
        self._partial = b""
        self._has_failed = False

    def ask(self, command: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises `BackendError` with the engine's last words where it fails, ends, or does not answer in time.
        """
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("has ended") from None
        answer = json.loads(self._read_line(timeout_s))
        self._signal(signal.SIGSTOP)
        assert isinstance(answer, dict)
        if "error" in answer:
            raise self._failure(f"failed: {answer['error']}")
        return answer

    def close(self) -> None:
        """End it and its children."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # a driver ends with its input
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if self._has_failed else CLOSE_S)
        self._signal(signal.SIGKILL)  # also children that outlived it
        self._process.wait()
        self._log.close()
        self._path.cleanup()

    def _signal(self, number: signal.Signals) -> None:
        """To the whole process group, as far as it lives."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _read_line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        descriptor, end_s = self._process.stdout.fileno(), time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self._partial:
                if not selector.select(max(0.0, end_s - time.monotonic())):
                    raise self._failure(f"has not answered for {timeout_s:.0f} s")
                received = os.read(descriptor, 1 << 16)
                if not received:
                    raise self._failure("has ended")
                self._partial += received
        line, _, self._partial = self._partial.partition(b"\n")
        return line

    def _failure(self, what: str) -> BackendError:
        self._has_failed = True
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        said = " | ".join(line.strip() for line in lines[-LOG_LINES:])
        return BackendError(f"{self.name} {what}. Its last words: {said or 'none'}")

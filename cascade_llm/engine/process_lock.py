"""The engine's lock, and what a forked process is told."""

from __future__ import annotations

import os
import threading

from cascade_llm.errors import BackendError

__all__ = ["ProcessLock", "forked"]


class ProcessLock:
    """A re-entrant lock that a forked process does not get: it would wait for threads that are not there."""

    def __init__(self) -> None:
        self._lock, self._process = threading.RLock(), os.getpid()

    @property
    def is_foreign(self) -> bool:
        """Whether this is another process than the one that made it."""
        return os.getpid() != self._process

    def __enter__(self) -> None:
        if self.is_foreign:
            raise forked(f"the LLM belongs to process {self._process}")
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def forked(owner: str) -> BackendError:
    """The error of a forked process; `owner` says whose the engine is."""
    spawn = "make it in a process that multiprocessing.get_context('spawn') has started"
    return BackendError(f"{owner}, of which this is a fork: {spawn}")

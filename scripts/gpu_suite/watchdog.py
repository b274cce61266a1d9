"""Ends the process when its time is over, whatever it hangs in: a compiler, a kernel, a wait for the device."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

__all__ = ["STOPPED", "start_watchdog"]

STOPPED = 3
"""Exit status of a process that was ended."""


def start_watchdog(seconds: float, last_words: Callable[[], None]) -> threading.Timer:
    """After so many seconds call `last_words`, then end the process; `cancel()` the result to live on."""

    def end() -> None:
        try:
            last_words()
        finally:
            sys.stdout.flush()
            os._exit(STOPPED)

    timer = threading.Timer(max(0.0, seconds), end)
    timer.daemon = True
    timer.start()
    return timer

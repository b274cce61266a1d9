"""The folder where measurements and environments are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """CASCADE_LLM_CACHE, else cascade-llm in the user's cache folder; it may not exist yet."""
    own = os.environ.get("CASCADE_LLM_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cascade-llm"

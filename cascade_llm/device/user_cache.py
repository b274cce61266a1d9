"""The folder where what was measured or compiled on this machine is kept between runs."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from cascade_llm.errors import BackendError

__all__ = ["cache_folder", "private_folder"]


def cache_folder() -> Path:
    """CASCADE_LLM_CACHE, else cascade-llm in the user's cache folder of this platform; it may not exist yet."""
    own = os.environ.get("CASCADE_LLM_CACHE")
    if own:
        return Path(own)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "cascade-llm"


def private_folder(name: str) -> Path:
    """A folder below `cache_folder` for files that are run: made where it is missing, and nobody else can write there.

    Raises:
        BackendError: it cannot be made, or another user could put a file there; says where and what to change
    """
    folder = cache_folder() / name
    cure = "set CASCADE_LLM_CACHE to a folder of your own"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve(strict=True)
        owned = [(path, path.stat()) for path in (folder, *folder.parents)]
    except (OSError, RuntimeError) as error:
        raise BackendError(f"no folder for compiled code ({error}): {cure}") from None
    if not hasattr(os, "geteuid") or not os.access(folder, os.W_OK):
        raise BackendError(f"{folder} is not writable: {cure}")
    user = os.geteuid()
    for path, status in owned:
        # a sticky folder, such as /tmp, lets nobody replace what another has made in it
        open_to_all = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
        is_shared = path == folder and (status.st_uid != user or status.st_mode & 0o077)
        if status.st_uid not in (0, user) or open_to_all or is_shared:
            raise BackendError(f"compiled code is not kept in {folder}: others may write to {path}; {cure}")
    return folder

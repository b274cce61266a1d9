"""The Hugging Face hub, by its own client: honours HF_ENDPOINT, HF_HUB_CACHE, HF_HUB_OFFLINE and HF_TOKEN."""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from cascade_llm.loader.hub import Hub, HubRefusal, RepositoryFile, is_inside
from cascade_llm.loader.hub_name import HUGGINGFACE, HubName

__all__ = ["HuggingFaceHub"]

TIMEOUT_S = 5.0
"""For each question to the hub before a download starts."""
MOST_REVISIONS = 5


class HuggingFaceHub(Hub):
    """See `Hub`; the client's own bars show the progress, on terminals only."""

    title = "the Hugging Face hub"

    def files(self, name: HubName) -> list[RepositoryFile]:
        """See `Hub`."""
        from huggingface_hub import HfApi, try_to_load_from_cache

        with self._refusals(name):
            found = HfApi().model_info(name.repository, revision=name.revision, files_metadata=True, timeout=TIMEOUT_S)
        return [
            RepositoryFile(
                file.rfilename,
                file.size or 0,
                isinstance(try_to_load_from_cache(name.repository, file.rfilename, revision=found.sha), str),
            )
            for file in found.siblings or []
            if is_inside(file.rfilename)
        ]

    def fetch(self, name: HubName, files: Sequence[RepositoryFile]) -> Path:
        """See `Hub`."""
        from huggingface_hub import snapshot_download

        is_stopped = Event()
        download = partial(
            snapshot_download,
            name.repository,
            revision=name.revision,
            allow_patterns=[glob.escape(file.name) for file in files],
            etag_timeout=TIMEOUT_S,
            tqdm_class=_bar_class(is_stopped),
        )
        # the client's own threads finish their files before it lets an interruption through
        with self._refusals(name), ThreadPoolExecutor(1) as pool:
            running = pool.submit(download)
            try:
                return Path(running.result())
            except KeyboardInterrupt:
                is_stopped.set()
                raise

    def cached(self, name: HubName, patterns: Sequence[str], ignored: Sequence[str]) -> Path:
        """See `Hub`."""
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(
                name.repository,
                revision=name.revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(ignored),
                local_files_only=True,
            )
        except Exception as error:  # the client's own errors, and the operating system's
            raise HubRefusal(self._what_is_missing(name, error)) from error
        return Path(folder)

    @property
    def cache_folder(self) -> Path:
        """See `Hub`."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)

    def page(self, repository: str) -> str:
        """See `Hub`."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{repository}"

    def cached_folders(self) -> Iterator[tuple[HubName, Path]]:
        """See `Hub`: the main branch by the repository's name alone, other branches and tags by theirs."""
        for repository in sorted(self.cache_folder.glob("models--*--*")):
            org, _, title = repository.name.removeprefix("models--").partition("--")
            refs = repository / "refs"
            named = {ref.read_text().strip(): ref.relative_to(refs).as_posix() for ref in _files_below(refs)}
            for folder in sorted(path for path in (repository / "snapshots").glob("*") if path.is_dir()):
                revision = named.get(folder.name, folder.name)
                yield HubName(HUGGINGFACE, f"{org}/{title}", None if revision == "main" else revision), folder

    def _what_is_missing(self, name: HubName, error: Exception) -> str:
        """Why the cache has no folder for a name; the client's message would tell to go online, which is no news."""
        from huggingface_hub.errors import IncompleteSnapshotError

        pull = f"with a network, cascade-llm pull {name}"
        if isinstance(error, IncompleteSnapshotError):
            return f"its download is not complete: {pull}"
        folder = self.cache_folder / f"models--{name.repository.replace('/', '--')}" / "snapshots"
        revisions = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        if revisions:
            named = ", ".join(f"{name.repository}@{revision}" for revision in revisions[:MOST_REVISIONS])
            return f"it holds other revisions, name one: {named}; or {pull}"
        return f"it holds nothing of {name.repository} in {self.cache_folder}: {pull}, or copy its folder here"

    @contextmanager
    def _refusals(self, name: HubName) -> Iterator[None]:
        """The client raises its own errors, its HTTP library's and the operating system's."""
        from huggingface_hub import errors

        page = self.page(name.repository)
        try:
            yield
        except errors.GatedRepoError as error:
            raise HubRefusal(
                f"it is gated: ask for access on {page}, then log in with a token of that account (hf auth login, or "
                "HF_TOKEN)"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise HubRefusal(f"it has no revision {name.revision!r}: see {page}/refs", is_final=True) from error
        except errors.RepositoryNotFoundError as error:
            raise HubRefusal(
                "there is no such repository, or it is private: check the spelling; where it is private, log in (hf "
                "auth login, or HF_TOKEN)"
            ) from error
        except errors.OfflineModeIsEnabled as error:
            raise HubRefusal("HF_HUB_OFFLINE forbids to ask it") from error
        except Exception as error:
            reason = (str(error).strip() or "no reason given").split("\n", maxsplit=1)[0]
            raise HubRefusal(f"{type(error).__name__}: {reason}") from error


def _files_below(folder: Path) -> list[Path]:
    """Sorted, so that of several branches at one commit the last counts; "main" is put behind all."""
    return sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: (path.name == "main", path))


class _StoppedError(Exception):
    """Ends a download from within."""


def _bar_class(is_stopped: Event) -> type[Any]:
    """The client's bar, which it tells of every piece that came; drawn on terminals only, as every other bar here."""
    from huggingface_hub.utils.tqdm import tqdm

    base: Any = tqdm

    class Bar(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | ({} if sys.stderr.isatty() else {"disable": True}))

        def update(self, n: float | None = 1) -> Any:
            if is_stopped.is_set():
                raise _StoppedError
            return super().update(n)

    return Bar

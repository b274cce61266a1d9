"""ModelScope, by its own client (the extra `modelscope`): honours MODELSCOPE_ENDPOINT, MODELSCOPE_CACHE and
MODELSCOPE_API_TOKEN; HF_HUB_OFFLINE forbids the network here too."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cascade_llm.errors import ModelNotFoundError
from cascade_llm.loader.hub import Hub, HubRefusal, RepositoryFile, is_inside
from cascade_llm.loader.hub_name import MODELSCOPE, HubName

__all__ = ["ModelScopeHub"]

DEFAULT_REVISION = "master"
SMALL_BYTES = 16 << 20
"""Hashing so much takes no time that anybody notices."""


class ModelScopeHub(Hub):
    """See `Hub`. A revision's folder is called as the revision was asked for, and brought up to date in place."""

    title = "ModelScope"

    def __init__(self) -> None:
        """Raises `ModelNotFoundError` where the client is not installed."""
        try:
            from modelscope_hub import HubApi, get_default_config
        except ImportError as error:
            raise ModelNotFoundError(
                "models of ModelScope need its client: pip install 'cascade-llm[modelscope]' (modelscope-hub)"
            ) from error
        self._api: Any = HubApi()
        self._config: Any = get_default_config()

    def files(self, name: HubName) -> list[RepositoryFile]:
        """See `Hub`."""
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise HubRefusal("HF_HUB_OFFLINE forbids to ask it")
        with self._refusals(name):
            listed = self._api.list_repo_files(name.repository, "model", revision=name.revision)
        folder = self._folder(name)
        return [
            RepositoryFile(file.path, int(file.size or 0), _has_size(folder, file.path, int(file.size or 0)))
            for file in listed
            if file.type != "tree" and is_inside(file.path)
        ]

    def fetch(self, name: HubName, files: Sequence[RepositoryFile]) -> Path:
        """See `Hub`. The client compares hashes, so large files that have their size are not shown to it again."""
        from modelscope_hub import ProgressCallback, TqdmCallback

        bars = [TqdmCallback if sys.stderr.isatty() else ProgressCallback]
        doubtful = [file.name for file in files if not file.is_cached or file.num_bytes < SMALL_BYTES]
        if not doubtful and (folder := self._folder(name)) is not None:
            return folder
        with self._refusals(name):
            return Path(
                self._api.download_repo(
                    name.repository,
                    "model",
                    revision=name.revision,
                    allow_patterns=doubtful,
                    progress_callbacks=bars,
                )
            )

    def cached(self, name: HubName, patterns: Sequence[str], ignored: Sequence[str]) -> Path:
        """See `Hub`; which files a revision has is not kept in the cache, so that none is known to be missing."""
        folder = self._folder(name)
        if folder is None:
            raise HubRefusal(
                f"it holds nothing of {name} in {self.cache_folder}: with a network, cascade-llm pull {name}"
            )
        return folder

    @property
    def cache_folder(self) -> Path:
        """See `Hub`."""
        return Path(self._config.cache_dir)

    def cached_folders(self) -> Iterator[tuple[HubName, Path]]:
        """See `Hub`; also of the layouts that its client had before, which say no revision."""
        models = self.cache_folder / "models"
        for folder in sorted(path for path in models.glob("*--*/snapshots/*") if path.is_dir()):
            org, _, title = folder.parent.parent.name.partition("--")
            revision = None if folder.name == DEFAULT_REVISION else folder.name
            yield HubName(MODELSCOPE, f"{org}/{title}", revision), folder
        for older in (models, self.cache_folder / "hub" / "models"):
            for config in sorted(older.glob("*/*/config.json")):
                org, title = config.parent.parent.name, config.parent.name.replace("___", ".")
                yield HubName(MODELSCOPE, f"{org}/{title}"), config.parent

    def page(self, repository: str) -> str:
        """See `Hub`."""
        return f"{self._config.endpoint}/models/{repository}"

    def _folder(self, name: HubName) -> Path | None:
        from modelscope_hub.errors import HubError

        try:
            found = self._api.download_repo(name.repository, "model", revision=name.revision, local_files_only=True)
        except HubError:
            return None
        return Path(found)

    @contextmanager
    def _refusals(self, name: HubName) -> Iterator[None]:
        """The client raises its own errors, and those of requests."""
        from modelscope_hub import errors

        page = self.page(name.repository)
        try:
            yield
        except (errors.AuthenticationError, errors.PermissionDeniedError) as error:
            raise HubRefusal(
                f"it is private or gated: ask for access on {page}, then set MODELSCOPE_API_TOKEN, or log in (ms-hub "
                "login)"
            ) from error
        except errors.NotExistError as error:
            revision = name.revision or DEFAULT_REVISION
            raise HubRefusal(f"there is no such repository, or it has no revision {revision!r}: see {page}") from error
        except Exception as error:
            reason = (str(error).strip() or "no reason given").split("\n", maxsplit=1)[0]
            raise HubRefusal(f"{type(error).__name__}: {reason}") from error


def _has_size(folder: Path | None, name: str, num_bytes: int) -> bool:
    path = None if folder is None else folder / name
    return path is not None and path.is_file() and path.stat().st_size == num_bytes

"""What a hub is asked, whichever it is, and which of a repository's files are read."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from cascade_llm.errors import CapacityError, ModelNotFoundError, UnsupportedModelError
from cascade_llm.loader.gguf_names import PART_NAME, first_part
from cascade_llm.loader.hub_name import HubName

__all__ = ["CachedModel", "Hub", "HubRefusal", "OnPlan", "RepositoryFile", "cached_models", "fetch", "is_inside"]

CONFIG_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
WEIGHT_FILES = ("*.safetensors",)
LEFT_OUT = ("consolidated*", "*.bin.index.json", "training_args*")
TEMPLATES = "additional_chat_templates"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SPARE_BYTES = 64 << 20
"""Of the disk, that a download leaves free."""
MOST_NAMED = 12


@dataclass(frozen=True)
class RepositoryFile:
    """A file of a repository, before it is fetched."""

    name: str
    """Its path in the repository."""
    num_bytes: int
    is_cached: bool


@dataclass(frozen=True)
class CachedModel:
    """What a cache holds of a revision: a folder of safetensors, or a GGUF file."""

    name: HubName
    path: Path
    """The folder, or the file (the first where it is split)."""
    revision: str
    """As the cache calls it: Hugging Face's the commit, ModelScope's the branch or tag."""
    num_bytes: int
    """On the disk."""
    last_used: float
    """Seconds since 1970."""


OnPlan = Callable[[Sequence[RepositoryFile]], None]
"""Told of the files that a model needs, before the first of them is fetched."""


def is_inside(name: str) -> bool:
    """Whether a file's name in a listing stays within the folder that it is fetched to."""
    return not {"..", ".", ""} & set(name.split("/")) and "\\" not in name


class HubRefusal(Exception):
    """A hub did not answer, or said no: the reason and, where there is one, the cure."""

    def __init__(self, reason: str, *, is_final: bool = False) -> None:
        """`is_final`: whether a copy in the cache would be another thing than what was asked for."""
        super().__init__(reason)
        self.is_final = is_final


class Hub(ABC):
    """Where repositories come from, and the cache that holds those that came."""

    title: str
    """What messages call it."""

    @abstractmethod
    def files(self, name: HubName) -> list[RepositoryFile]:
        """All files of the revision, as the hub lists them now, but for those that `is_inside` refuses.

        Raises `HubRefusal`.
        """

    @abstractmethod
    def fetch(self, name: HubName, files: Sequence[RepositoryFile]) -> Path:
        """The folder that holds these files; those that are cached are not asked for again. Raises `HubRefusal`."""

    @abstractmethod
    def cached(self, name: HubName, patterns: Sequence[str], ignored: Sequence[str]) -> Path:
        """The folder of the revision in the cache, without network.

        Raises `HubRefusal` where it is not there, or a file is known to be missing that matches `patterns` and none of
        `ignored`.
        """

    @property
    @abstractmethod
    def cache_folder(self) -> Path:
        """Where it keeps what it fetched; it may not exist."""

    @abstractmethod
    def cached_folders(self) -> Iterator[tuple[HubName, Path]]:
        """The revisions that its cache holds, each by a name that serves without network."""

    @abstractmethod
    def page(self, repository: str) -> str:
        """The address at which a browser finds the repository."""


def cached_models(hub: Hub) -> Iterator[CachedModel]:
    """The models that a hub's cache holds, whole or not; reads no file."""
    for name, folder in hub.cached_folders():
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        gguf = {first_part(Path(file)).as_posix() for file in files if file.lower().endswith(".gguf")}
        for file in sorted(gguf):
            parts = [path for other, path in files.items() if first_part(Path(other)).as_posix() == file]
            yield _cached_model(replace(name, file=file), folder, parts)
        read = [path for file, path in files.items() if _is_config(file) or _is_weights(file)]
        if any(_is_weights(file) for file in files) or ("config.json" in files and not gguf):
            yield _cached_model(name, folder, read)


def _cached_model(name: HubName, folder: Path, files: Sequence[Path]) -> CachedModel:
    stats = [file.stat() for file in files]
    last_used = max((max(stat.st_atime, stat.st_mtime) for stat in stats), default=0.0)
    return CachedModel(name, _path_in(folder, name), folder.name, sum(stat.st_size for stat in stats), last_used)


def fetch(
    hub: Hub,
    name: HubName,
    *,
    with_weights: bool = True,
    include: Sequence[str] = (),
    on_plan: OnPlan | None = None,
) -> Path:
    """The local folder, or the named GGUF file, of a model: from the hub, or from its cache where that cannot be asked.

    Args:
        hub: the one of `name`
        name: the model
        with_weights: False fetches configuration and tokenizer alone
        include: patterns; of the files that a model needs, only those that match one
        on_plan: told what will be fetched

    Raises:
        ModelNotFoundError: neither hub nor cache has it; says why and what to do
        UnsupportedModelError: its weights are in a format that is not read
        CapacityError: the disk is too small
    """
    try:
        listed = hub.files(name)
    except HubRefusal as refusal:
        if refusal.is_final:
            raise ModelNotFoundError(f"{name}: {refusal}") from refusal
        return _from_cache(hub, name, with_weights, include, refusal)
    wanted = _wanted_files(hub, name, listed, with_weights, include)
    wanted = [file for file in wanted if not include or _matches_any(file.name, include)]
    if not wanted:
        raise ModelNotFoundError(f"{name}: no file that is read matches {', '.join(include)}; {_listing(listed)}")
    _check_disk(hub, name, wanted)
    if on_plan is not None:
        on_plan(wanted)
    try:
        return _path_in(hub.fetch(name, wanted), name)
    except HubRefusal as refusal:
        raise ModelNotFoundError(
            f"{name} cannot be fetched from {hub.title} ({refusal}); cascade-llm pull {name} goes on where this ended"
        ) from refusal


def _from_cache(hub: Hub, name: HubName, with_weights: bool, include: Sequence[str], refusal: HubRefusal) -> Path:
    patterns = [_part_pattern(name.file)] if name.file else [*CONFIG_FILES, *(WEIGHT_FILES if with_weights else ())]
    try:
        path = _path_in(hub.cached(name, patterns, () if name.file else ("*/*", *LEFT_OUT)), name)
        if not path.exists():
            raise HubRefusal(f"it lacks {name.file}: with a network, cascade-llm pull {name}")
    except HubRefusal as missing:
        raise ModelNotFoundError(
            f"{str(name)!r} cannot be had from {hub.title} ({refusal}), and its cache does not serve it ({missing})"
        ) from missing
    if name.file is None and not (path / "config.json").is_file():
        names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        _gguf_files(hub, name, [RepositoryFile(file, 0, True) for file in names], include)  # else it is an error
    return path


def _path_in(folder: Path, name: HubName) -> Path:
    return folder if name.file is None else folder / first_part(Path(name.file))


def _wanted_files(
    hub: Hub, name: HubName, listed: Sequence[RepositoryFile], with_weights: bool, include: Sequence[str]
) -> list[RepositoryFile]:
    """Those that a start of the model reads."""
    if name.file is not None:
        return _gguf_parts(hub, name, name.file, listed)
    config = [file for file in listed if _is_config(file.name)]
    weights = [file for file in listed if _is_weights(file.name)]
    if not any(file.name == "config.json" for file in config):
        return _gguf_files(hub, name, listed, include)
    if with_weights and not weights:
        raise _no_weights(name, listed)
    return sorted([*config, *(weights if with_weights else ())], key=lambda file: file.name)


def _is_config(name: str) -> bool:
    path = PurePosixPath(name)
    if path.parent.name == TEMPLATES:
        return path.suffix == ".jinja" and len(path.parts) == 2
    return len(path.parts) == 1 and _matches(name, CONFIG_FILES)


def _is_weights(name: str) -> bool:
    return "/" not in name and _matches(name, WEIGHT_FILES)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return _matches_any(name, patterns) and not _matches_any(name, LEFT_OUT)


def _matches_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _gguf_parts(hub: Hub, name: HubName, file: str, listed: Sequence[RepositoryFile]) -> list[RepositoryFile]:
    pattern = _part_pattern(file)
    parts = [item for item in listed if fnmatch(item.name, pattern)]
    if not parts:
        raise ModelNotFoundError(
            f"{name.repository!r} on {hub.title} has no file {file}; {_listing(listed)}; see "
            f"{hub.page(name.repository)}"
        )
    return sorted(parts, key=lambda item: item.name)


def _part_pattern(file: str) -> str:
    """Of a GGUF file: itself, or all parts where it is one of several."""
    first = first_part(Path(file))
    return first.as_posix().replace("-00001-of-", "-?????-of-") if PART_NAME.fullmatch(first.name) else file


def _gguf_files(
    hub: Hub, name: HubName, listed: Sequence[RepositoryFile], include: Sequence[str]
) -> list[RepositoryFile]:
    """A repository without config.json is one of GGUF files, and the user must say which."""
    files = [file for file in listed if file.name.lower().endswith(".gguf")]
    if chosen := [file for file in files if _matches_any(file.name, include)]:
        return sorted(chosen, key=lambda file: file.name)
    if files:
        names = sorted({f"{name}:{first_part(Path(file.name)).as_posix()}" for file in files})
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        raise ModelNotFoundError(
            f"{str(name)!r} on {hub.title} holds GGUF files, name one: {', '.join(names[:MOST_NAMED])}{more}"
        )
    raise ModelNotFoundError(
        f"{str(name)!r} has no config.json on {hub.title}: it is no model that transformers saved; {_listing(listed)}"
    )


def _no_weights(name: HubName, listed: Sequence[RepositoryFile]) -> UnsupportedModelError:
    pickles = [file.name for file in listed if file.name.endswith(PICKLES)]
    if not pickles:
        return UnsupportedModelError(f"{name} has no safetensors; {_listing(listed)}")
    return UnsupportedModelError(
        f"{name} has its weights in {pickles[0]} alone, a format that runs code when it is loaded, so it is not "
        "fetched: take a revision or a copy of the model with safetensors, or convert it once on a machine that may "
        f"run its code, with transformers: AutoModelForCausalLM.from_pretrained({name.repository!r})"
        ".save_pretrained(FOLDER), and serve FOLDER"
    )


def _listing(files: Sequence[RepositoryFile]) -> str:
    names = sorted(file.name for file in files)
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"it holds {', '.join(names[:MOST_NAMED])}{more}" if names else "it is empty"


def _check_disk(hub: Hub, name: HubName, files: Iterable[RepositoryFile]) -> None:
    needed = sum(file.num_bytes for file in files if not file.is_cached)
    folder = next(path for path in (hub.cache_folder, *hub.cache_folder.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed + SPARE_BYTES > free and needed:
        raise CapacityError(
            f"{name}: {needed:,} bytes are to be fetched, {free:,} are free where {hub.cache_folder} is: remove models "
            "from it (cascade-llm models lists them), or put the cache elsewhere (HF_HUB_CACHE, MODELSCOPE_CACHE)"
        )

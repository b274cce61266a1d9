"""What a model on a hub is called: `[hf://|ms://|modelscope://]ORG/NAME[@REVISION][:FILE.gguf]`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cascade_llm.errors import ConfigError, ModelNotFoundError

__all__ = ["HUBS", "HUGGINGFACE", "MODELSCOPE", "HubName", "parse_hub_name"]

HUGGINGFACE, MODELSCOPE = "huggingface", "modelscope"
HUBS = (HUGGINGFACE, MODELSCOPE)
PREFIXES = {"hf://": HUGGINGFACE, "ms://": MODELSCOPE, "modelscope://": MODELSCOPE}

NAME = re.compile(
    r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./+-]*))?(?::(?P<file>\w[\w./ +()-]*\.gguf))?",
    re.ASCII | re.IGNORECASE,
)
REVISION = re.compile(r"\w[\w./+-]*", re.ASCII)
FORM = "ORG/NAME, ORG/NAME@REVISION or ORG/NAME:FILE.gguf, after hf:// or ms:// where it must say which hub"


@dataclass(frozen=True)
class HubName:
    """A repository of a hub, or one GGUF file of it."""

    hub: str
    """One of `HUBS`."""
    repository: str
    """ORG/NAME"""
    revision: str | None = None
    """A branch, a tag or a commit; None is the hub's main branch."""
    file: str | None = None
    """A GGUF file, by its path in the repository; None is the repository's safetensors."""

    def __str__(self) -> str:
        """As a user writes it."""
        prefix = "ms://" if self.hub == MODELSCOPE else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{prefix}{self.repository}{revision}{f':{self.file}' if self.file else ''}"


def parse_hub_name(text: str, *, revision: str | None = None, hub: str | None = None) -> HubName | None:
    """Read a name; None where it is none of a hub, so that it may be a path.

    Args:
        text: what the user wrote
        revision: given beside the name
        hub: given beside the name, one of `HUBS`; None leaves it to the prefix, and without one to Hugging Face

    Raises:
        ModelNotFoundError: it has a hub's prefix and is no name
        ConfigError: the name and what is given beside it contradict each other, or `revision` is none
    """
    prefix = next((prefix for prefix in PREFIXES if text.startswith(prefix)), "")
    match = NAME.fullmatch(text.removeprefix(prefix))
    if match is None or any(".." in part for part in match.groups() if part):
        if prefix:
            raise ModelNotFoundError(f"{text!r} is no model of a hub: write {FORM}")
        return None
    if not prefix and match["file"] is None and match["repository"].lower().endswith(".gguf"):
        return None
    if hub is not None and prefix and PREFIXES[prefix] != hub:
        raise ConfigError(f"{text!r} says which hub it is on, and source is {hub!r}: leave one of them out")
    _check_revision(text, match["revision"], revision)
    return HubName(
        hub or PREFIXES.get(prefix, HUGGINGFACE), match["repository"], match["revision"] or revision, match["file"]
    )


def _check_revision(text: str, written: str | None, given: str | None) -> None:
    if given is None:
        return
    if not isinstance(given, str) or not REVISION.fullmatch(given) or ".." in given:
        raise ConfigError(f"revision is {given!r}: it must be a branch, a tag or a commit")
    if written not in (None, given):
        raise ConfigError(f"{text!r} names a revision, and revision is {given!r}: leave one of them out")

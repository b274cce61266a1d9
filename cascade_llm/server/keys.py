"""API keys: who asks, what is theirs, and how much they may ask for."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec

from cascade_llm.errors import ConfigError
from cascade_llm.scheduler.sequence import Client
from cascade_llm.server.api_errors import ApiError
from cascade_llm.server.options import ServerOptions

__all__ = ["KEY_VARIABLE", "KeyRing", "Quota", "Visitor", "read_keys"]

KEY_VARIABLE = "CASCADE_LLM_API_KEY"
YAML_ENDINGS = (".yaml", ".yml")
NAME = r"^[A-Za-z0-9._-]{1,64}$"

Name = Annotated[str, msgspec.Meta(pattern=NAME)]
Count = Annotated[int, msgspec.Meta(ge=1, lt=1 << 53)]
Weight = Annotated[float, msgspec.Meta(ge=1e-3, le=1e3)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """What requests of one key may take; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt and `max_tokens` of each sample; what was not generated comes back."""
    max_concurrent: int | None = None
    """Requests that have not been answered in full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visitor:
    """Whoever holds one key, or all who come where none is asked for."""

    client: Client = field(default_factory=Client)
    quota: Quota = Quota()
    most_urgent: int | None = None
    """The lowest `priority` that requests may have; None is any."""

    def priority(self, asked: int | None) -> int:
        """The priority of a request. Raises `ApiError` (400) for one that is more urgent than may be."""
        least = self.most_urgent
        if least is None or (asked is not None and asked >= least):
            return asked or 0
        if asked is not None:
            raise ApiError(400, f"priority is {asked}: this key may give {least} or larger", param="priority")
        return max(0, least)


class _Entry(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A key in a YAML file."""

    key: Annotated[str, msgspec.Meta(min_length=1)]
    name: Name
    tenant: Name | None = None
    weight: Weight = 1.0
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    max_concurrent: Count | None = None
    most_urgent_priority: Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)] | None = None

    def visitor(self) -> Visitor:
        return Visitor(
            client=Client(name=self.name, tenant=self.tenant or "", weight=self.weight),
            quota=Quota(
                requests_per_minute=self.requests_per_minute,
                tokens_per_minute=self.tokens_per_minute,
                max_concurrent=self.max_concurrent,
            ),
            most_urgent=self.most_urgent_priority,
        )


class _Tenant(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What is said of a tenant."""

    name: Name
    cache_share: Share


class _File(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    keys: list[_Entry]
    tenants: list[_Tenant] = []


class KeyRing:
    """All keys, by digest: they are compared in the same time whatever was given."""

    def __init__(
        self, visitors: Sequence[tuple[str, Visitor]] = (), tenant_shares: Mapping[str, float] | None = None
    ) -> None:
        """Keep who asks.

        Args:
            visitors: by their keys; without any, everybody is one visitor and no key is asked for
            tenant_shares: of the pool's pages, what tenants may leave behind; see `SessionLimits`
        """
        self.tenant_shares = dict(tenant_shares or {})
        self._visitors = [(_digest(key), visitor) for key, visitor in visitors]

    def __len__(self) -> int:
        return len(self._visitors)

    @property
    def has_tenants(self) -> bool:
        """Whether there are several: then nobody is told of all."""
        return len({visitor.client.tenant for _, visitor in self._visitors}) > 1

    def find(self, key: str) -> Visitor | None:
        """Who holds a key; None for one that is not here."""
        if not self._visitors:
            return Visitor()
        digest = _digest(key)
        found = [visitor for known, visitor in self._visitors if hmac.compare_digest(digest, known)]
        return found[0] if found else None


def read_keys(options: ServerOptions) -> KeyRing:
    """The keys of the options, the environment and a file. Raises `ConfigError` with the place of what is wrong."""
    plain = [*(options.api_key or ()), *filter(None, [os.environ.get(KEY_VARIABLE)])]
    entries: list[_Entry] = []
    tenants: list[_Tenant] = []
    if options.api_key_file is not None:
        path = Path(options.api_key_file)
        if path.suffix in YAML_ENDINGS:
            file = _read_yaml(path)
            entries, tenants = file.keys, file.tenants
        else:
            plain += _read_lines(path)
    if any(not key.strip() for key in plain):
        raise ConfigError("an API key is empty")
    visitors = [(key, Visitor(client=Client(name=f"key-{i}"))) for i, key in enumerate(dict.fromkeys(plain), 1)]
    visitors += [(entry.key, entry.visitor()) for entry in entries]
    for what, values in (("key", [key for key, _ in visitors]), ("name", [v.client.name for _, v in visitors])):
        if len(set(values)) < len(values):
            raise ConfigError(f"two API keys have the same {what}: each needs one of its own")
    return KeyRing(visitors, _shares(tenants, entries))


def _shares(tenants: Sequence[_Tenant], entries: Sequence[_Entry]) -> dict[str, float]:
    known, shares = {entry.tenant for entry in entries}, {tenant.name: tenant.cache_share for tenant in tenants}
    if len(shares) < len(tenants):
        raise ConfigError("a tenant is there twice: give each one cache_share")
    if missing := sorted(shares.keys() - known):
        raise ConfigError(f"the tenant {missing[0]!r} has a cache_share and no key: give one of its keys the tenant")
    return shares


def _read_lines(path: Path) -> list[str]:
    keys = _read(path).decode("utf-8", "replace").split()
    if not keys:
        raise ConfigError(f"api_key_file {path} has no key: write one on each line")
    return keys


def _read_yaml(path: Path) -> _File:
    try:
        file = msgspec.yaml.decode(_read(path), type=_File)
    except msgspec.DecodeError as error:  # names the place, and repeats no key
        raise ConfigError(f"api_key_file {path}: {' '.join(str(error).split())}") from None
    if not file.keys:
        raise ConfigError(f"api_key_file {path} has no key: give a list of keys, each with key and name")
    return file


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"api_key_file {path} cannot be read: {error.strerror or error}") from None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()

"""What a user may ask of the server itself; the standard library only, so that `--help` is quick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from cascade_llm.errors import ConfigError

__all__ = ["ServerOptions"]

NONE_WILL_DO = frozenset(("restarts", "max_queue", "drain_timeout", "port", "session_share", "session_ttl"))
LOOPBACK = frozenset(("127.0.0.1", "localhost", "::1"))


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where the server listens, whom it serves, and how much it takes.

    Raises `ConfigError` for a value out of range.
    """

    host: str = "127.0.0.1"
    """Address to listen on; other machines reach the server on 0.0.0.0."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    served_model_name: Sequence[str] | None = None
    """Name of the model in requests and answers; the first is the one that answers give."""
    api_key: Sequence[str] | None = None
    """Key that clients must send as a bearer token. CASCADE_LLM_API_KEY is one more."""
    api_key_file: str | None = None
    """File with a key on each line; a .yaml file gives each a name, a tenant and quotas (see limits.md)."""
    allowed_hosts: Sequence[str] | None = None
    """Name that the Host header of requests may give beside this machine's own; * is any."""
    otlp_endpoint: str | None = None
    """Base URL of an OpenTelemetry collector that spans are sent to over HTTP; OTEL_* variables configure the rest."""
    allow_origin: Sequence[str] | None = None
    """Origin of web pages that may ask this server (CORS)."""
    page: bool = True
    """Serve a page with a chat and a live view of what is shared, at /."""
    show_text: bool = False
    """Let the live view tell how shared prefixes begin; else it has lengths only."""
    strict: bool = False
    """Refuse unknown fields of a request instead of ignoring them."""
    allow_chat_templates: bool = False
    """Render conversations by a request's own chat_template, which runs in a sandbox, instead of refusing it."""
    restarts: int = 0
    """How often the engine process may be started again after it has died."""
    max_body_bytes: int = 8 << 20
    """Largest body of a request; a larger one is answered 413."""
    max_queue: int = 256
    """Samples that may wait beside the max_num_seqs that run; beyond, requests are answered 429."""
    max_prompt_len: int | None = None
    """Longest prompt in tokens; the model's context limits it too."""
    max_output_len: int | None = None
    """Most tokens that a request may ask for; the model's context limits it too."""
    session_share: float = 0.5
    """Share of the pool's pages that sessions may hold between turns; requests that need them get them."""
    session_ttl: float = 1800.0
    """Seconds that an unused session is held."""
    body_timeout: float = 30.0
    """Seconds that a client has to send the headers of a request, and then its body."""
    request_timeout: float | None = None
    """Seconds after which a request is ended, whether it is whole or not."""
    step_timeout: float = 120.0
    """Seconds after which a step that has not ended makes /health fail."""
    drain_timeout: float = 30.0
    """Seconds that running requests have after SIGTERM."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port is {self.port}: it must be 0 to 65535")
        if self.session_share > 1:
            raise ConfigError(f"session_share is {self.session_share}: it must be 0 to 1")
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in NONE_WILL_DO else 1e-3
            if isinstance(value, int | float) and not isinstance(value, bool) and not least <= value < 1 << 53:
                raise ConfigError(f"{field.name} is {value}: it must be {'0 or larger' if least == 0 else 'above 0'}")

    def checked_hosts(self, *, has_keys: bool) -> frozenset[str] | None:
        """Names that requests may give as their host; None is any, where keys or other machines are expected."""
        given = frozenset(name.strip("[]").lower() for name in self.allowed_hosts or ())
        if "*" in given or (not given and (has_keys or not self.is_loopback)):
            return None
        return given | LOOPBACK | {self.host.lower()}

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host in LOOPBACK

"""Whether the packages of an extra are here."""

from __future__ import annotations

from importlib.util import find_spec

from cascade_llm.errors import ConfigError

__all__ = ["require_serve_extra"]

SERVE = ("fastapi", "uvicorn", "pydantic", "zmq", "msgspec", "prometheus_client")


def require_serve_extra(command: str) -> None:
    """Raises `ConfigError` with the cure where a command lacks a package."""
    if missing := [name for name in SERVE if find_spec(name) is None]:
        raise ConfigError(
            f"{command} needs packages that are not here ({', '.join(missing)}): pip install cascade-llm[serve]"
        )

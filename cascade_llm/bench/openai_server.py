"""A server that speaks OpenAI's protocol, as a client of the standard library asks it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from cascade_llm.errors import BackendError, ConfigError

__all__ = ["OpenAIServer"]

MOST_READ = 4096
"""Bytes of an answer that tells of an error."""
MOST_SHOWN = 600
"""Characters of it."""


class OpenAIServer:
    """Where a server is, and how to ask it; a connection per request."""

    def __init__(
        self, url: str, *, model: str | None = None, api_key: str | None = None, timeout_s: float = 600.0
    ) -> None:
        """Ask the server for its models.

        Args:
            url: such as http://localhost:8000, with or without /v1
            model: one of the server's; default the first
            api_key: sent as a bearer token
            timeout_s: without a byte from the server

        Raises:
            ConfigError: no URL
            BackendError: nothing answers there, or it has not that model
        """
        try:
            parts = urlsplit(url)
            scheme, host, port = parts.scheme, parts.hostname, parts.port
        except ValueError:  # a port that is none
            scheme, host, port = "", None, None
        if scheme not in ("http", "https") or not host:
            raise ConfigError(f"{url!r} is no URL of a server: write it as http://localhost:8000")
        self._https, self._host, self._port = scheme == "https", host, port
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout_s = timeout_s
        self.url = url
        known = self._models()
        self.model = model or (known[0] if known else "")
        if known and self.model not in known:
            raise BackendError(f"{url} has no model {self.model!r}: it serves {', '.join(known)}")

    def _models(self) -> list[str]:
        connection = self._connection()
        try:
            connection.request("GET", f"{self._path}/v1/models", headers=self._headers)
            response = connection.getresponse()
            content = response.read()
            if response.status != 200:
                raise BackendError(f"{self.url} answers {response.status} to /v1/models: {content[:200]!r}")
            return [entry["id"] for entry in json.loads(content)["data"]]
        except (OSError, http.client.HTTPException) as error:
            raise BackendError(f"nothing answers at {self.url} ({error}): start the server, or mend the URL") from None
        except (ValueError, KeyError, TypeError) as error:
            raise BackendError(f"{self.url} does not speak OpenAI's protocol (/v1/models: {error!r})") from None
        finally:
            connection.close()

    def ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request that is not streamed. Raises `OSError`, `HTTPException`, `ValueError`."""
        with closing(self._connection()) as connection:
            answer = json.loads(self._post(connection, path, body).read())
        if not isinstance(answer, dict):
            raise ValueError(f"the answer is a JSON {type(answer).__name__}")
        return answer

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The objects of a stream of server-sent events, up to [DONE]. Raises as `ask`."""
        connection = self._connection()
        try:
            for line in self._post(connection, path, body):
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                yield json.loads(data)
            raise http.client.HTTPException("the stream ended without [DONE]")
        finally:
            connection.close()

    def _post(
        self, connection: http.client.HTTPConnection, path: str, body: Mapping[str, Any]
    ) -> http.client.HTTPResponse:
        connection.request("POST", self._path + path, json.dumps(body), self._headers)
        response = connection.getresponse()
        if response.status != 200:
            raise http.client.HTTPException(f"status {response.status}: {_reason(response.read(MOST_READ))}")
        return response

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=self._timeout_s)


def _reason(content: bytes) -> str:
    """The message of an error's body, or the body."""
    try:
        message = json.loads(content)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = repr(content)
    return str(message)[:MOST_SHOWN]

"""The page: static files of the package, with headers that let nothing else run or load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files

from fastapi import FastAPI, Response

__all__ = ["PAGE_PATHS", "add_page"]

FILES: Mapping[str, tuple[str, str]] = {
    "/": ("index.html", "text/html"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/main.js": ("main.js", "text/javascript"),
    "/page/chat.js": ("chat.js", "text/javascript"),
    "/page/conversations.js": ("conversations.js", "text/javascript"),
    "/page/sharing.js": ("sharing.js", "text/javascript"),
    "/page/elements.js": ("elements.js", "text/javascript"),
    "/page/markdown.js": ("markdown.js", "text/javascript"),
    "/page/server.js": ("server.js", "text/javascript"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""File of the package and media type, by path."""
PAGE_PATHS = frozenset(FILES)
"""Asked without a key: they are the same for everybody."""

POLICY = "; ".join(
    (
        *("default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'"),
        *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
        *("require-trusted-types-for 'script'", "trusted-types 'none'"),
    )
)
"""Nothing inline, nothing from elsewhere, and no text that becomes markup."""
HEADERS: Mapping[str, str] = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Add the page's paths."""
    folder = files("cascade_llm.server") / "page"
    for path, (name, media_type) in FILES.items():
        answer = _file((folder / name).read_bytes(), media_type)
        app.get(path, include_in_schema=False)(answer)


def _file(content: bytes, media_type: str) -> Callable[[], Response]:
    def answer() -> Response:
        return Response(content, media_type=media_type, headers=dict(HEADERS))

    return answer

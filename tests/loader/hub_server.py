"""A hub on this machine: a real HTTP server that answers as huggingface.co and modelscope.cn do, as far as their
clients ask when they list and download a repository."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

PIECE_LEN = 1 << 18
GATED, PRIVATE = "GatedRepo", "RepoNotFound"


@dataclass
class Repository:
    """Revisions are commits; names point to them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    refused: str | None = None
    """`GATED`, `PRIVATE` or None."""
    stated_bytes: dict[str, int] = field(default_factory=dict)
    """Sizes that the listing states in place of the files' own."""

    def commit(self, files: Mapping[str, bytes], name: str = "main") -> str:
        """A new commit that a branch points to; ModelScope calls the main branch otherwise."""
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[digest] = dict(files)
        self.names[name] = digest
        if name == "main":
            self.names["master"] = digest
        return digest

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.names.get(revision)


def files_of(folder: Path) -> dict[str, bytes]:
    """A folder as the files of a repository."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class HubServer:
    """Serves `repositories`; `requests` has every request line, `ranges` every range that was asked for; `drop_after`
    breaks the next body off; `delay_s` passes between the pieces of a body, `sent` are their bytes."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.drop_after: int | None = None
        self.delay_s = 0.0
        self.sent = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, cache: Path) -> dict[str, str]:
        """For a process that asks this hub, and keeps what it fetches in `cache`."""
        return {
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": self.url,
            "HF_HUB_CACHE": str(cache / "huggingface"),
            "HF_HOME": str(cache / "home"),
            "MODELSCOPE_ENDPOINT": self.url,
            "MODELSCOPE_CACHE": str(cache / "modelscope"),
            "MODELSCOPE_HOME": str(cache / "modelscope-home"),
            "NO_PROXY": "127.0.0.1",
        }

    def fetched(self) -> list[str]:
        """The files whose bytes were asked for, in order, since the start."""
        return [line.split("/")[-1].split("FilePath=")[-1].split("&")[0] for line in self.requests if _is_body(line)]

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()


def _is_body(line: str) -> bool:
    return line.startswith("GET") and ("/resolve/" in line or "FilePath=" in line)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, has_body: bool) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if parts[:3] == ["api", "v1", "models"]:
            self._answer_modelscope("/".join(parts[3:5]), parts[5:], query, has_body)
        elif parts[:2] == ["api", "models"]:
            self._answer_listing("/".join(parts[2:4]), parts[4:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._answer_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), has_body)
        else:
            self._json(404, {"error": "no such page"})

    # -- Hugging Face ---------------------------------------------------------------------------------------------

    def _answer_listing(self, repository: str, rest: list[str]) -> None:
        found = self.hub.repositories.get(repository)
        if found is None or found.refused == PRIVATE:
            self._json(401, {"error": "Invalid username or password."}, {"X-Error-Code": "RepoNotFound"})
            return
        commit = found.resolve(rest[1] if len(rest) > 1 else "main")
        if commit is None:
            self._json(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
            return
        files = found.commits[commit]
        if rest[:1] == ["tree"]:
            self._json(200, [{"type": "file", "path": name, **_facts(found, name, files)} for name in files])
        else:
            siblings = [{"rfilename": name, "blobId": "0", **_facts(found, name, files)} for name in files]
            self._json(200, {"id": repository, "modelId": repository, "sha": commit, "siblings": siblings})

    def _answer_file(self, repository: str, revision: str, name: str, has_body: bool) -> None:
        found = self.hub.repositories[repository]
        if found.refused == GATED:
            self._json(403, {"error": "Access is restricted"}, {"X-Error-Code": "GatedRepo"})
            return
        commit = found.resolve(revision)
        content = found.commits.get(commit or "", {}).get(name)
        if content is None:
            self._json(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
            return
        etag = hashlib.sha256(content).hexdigest()
        self._body(content, has_body, {"ETag": f'"{etag}"', "X-Repo-Commit": str(commit)})

    # -- ModelScope -----------------------------------------------------------------------------------------------

    def _answer_modelscope(self, repository: str, rest: list[str], query: Mapping[str, str], has_body: bool) -> None:
        found = self.hub.repositories.get(repository)
        commit = None if found is None else found.resolve(query.get("Revision", "master"))
        if found is None or commit is None:
            self._json(404, {"Code": 10010205001, "Message": "not found", "Success": False})
        elif found.refused == GATED:
            self._json(403, {"Code": 403, "Message": "no permission", "Success": False})
        elif rest == ["repo", "files"]:
            files = found.commits[commit]
            listed = [
                {"Path": name, "Name": name, "Type": "blob", "Size": len(content), "Sha256": _sha(content)}
                for name, content in files.items()
            ]
            self._json(200, {"Code": 200, "Data": {"Files": listed}, "Success": True})
        elif rest == ["repo"]:
            self._body(found.commits[commit][query["FilePath"]], has_body, {})
        else:
            self._json(200, {"Code": 200, "Data": {"Path": repository}, "Success": True})

    # -- bytes ----------------------------------------------------------------------------------------------------

    def _json(self, status: int, value: object, headers: Mapping[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _body(self, content: bytes, has_body: bool, headers: Mapping[str, str]) -> None:
        start = 0
        asked = self.headers.get("Range")
        if asked:
            self.hub.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if asked else 200)
        for key, text in headers.items():
            self.send_header(key, text)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not has_body:
            return
        drop, self.hub.drop_after = self.hub.drop_after, None
        if drop is None or drop > len(content):
            self.hub.drop_after = drop
            self._send_slowly(content[start:])
            return
        self.wfile.write(content[start : start + drop])
        self.wfile.flush()
        self.close_connection = True

    def _send_slowly(self, content: bytes) -> None:
        for first in range(0, len(content), PIECE_LEN):
            piece = content[first : first + PIECE_LEN]
            try:
                self.wfile.write(piece)
            except OSError:  # whoever asked is gone
                self.close_connection = True
                return
            self.hub.sent += len(piece)
            time.sleep(self.hub.delay_s)


def _facts(repository: Repository, name: str, files: Mapping[str, bytes]) -> dict[str, object]:
    size = repository.stated_bytes.get(name, len(files[name]))
    facts: dict[str, object] = {"size": size, "oid": hashlib.sha1(files[name]).hexdigest()}
    if name.endswith((".safetensors", ".gguf", ".bin")):
        facts["lfs"] = {"sha256": _sha(files[name]), "oid": _sha(files[name]), "size": size, "pointerSize": 134}
    return facts


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

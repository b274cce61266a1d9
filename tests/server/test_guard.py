"""Hosts, methods and special tokens, as a browser or a script meets them."""

from __future__ import annotations

import httpx
import pytest

from cascade_llm.server.options import ServerOptions
from tests.patience import PATIENCE_S
from tests.server.conftest import RunningServer

COMPLETIONS = "/v1/completions"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::2]:80", "a:b:c"])
def test_a_page_whose_name_leads_here_is_refused(server: RunningServer, host: str) -> None:
    for answer in (server.get("/", host=host), server.post(COMPLETIONS, {"prompt": "a"}, host=host)):
        assert answer.status_code == 421
        assert answer.json()["error"]["code"] == "host_not_allowed"
        assert "--allowed-hosts" in answer.json()["error"]["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.:1234", "127.0.0.1", "[::1]:8000"])
def test_this_machine_has_several_names(server: RunningServer, host: str) -> None:
    assert server.get("/version", host=host).status_code == 200


def test_hosts_are_checked_where_nothing_else_protects_or_they_are_given() -> None:
    own = frozenset(("127.0.0.1", "localhost", "::1"))
    assert ServerOptions().checked_hosts(has_keys=False) == own
    assert ServerOptions().checked_hosts(has_keys=True) is None
    assert ServerOptions(host="0.0.0.0").checked_hosts(has_keys=False) is None
    given = ServerOptions(host="0.0.0.0", allowed_hosts=["A.example", "[fd00::1]"])
    assert given.checked_hosts(has_keys=True) == own | {"a.example", "fd00::1", "0.0.0.0"}
    assert ServerOptions(allowed_hosts=["*"]).checked_hosts(has_keys=False) is None


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/version", "/v1/models", "/openapi.json", "/metrics"])
def test_what_is_got_has_a_head(server: RunningServer, path: str) -> None:
    whole = server.get(path)
    head = httpx.head(server.url + path, timeout=PATIENCE_S)
    assert (head.status_code, head.content) == (200, b"")
    if path != "/metrics":  # which counts meanwhile
        assert head.headers["content-length"] == str(len(whole.content))
    assert head.headers.get("content-security-policy") == whole.headers.get("content-security-policy")


@pytest.mark.parametrize(("path", "status"), [(COMPLETIONS, 405), ("/v1/cascade/events", 405), ("/v1/nothing", 404)])
def test_nothing_else_has_a_head(server: RunningServer, path: str, status: int) -> None:
    assert httpx.head(server.url + path, timeout=PATIENCE_S).status_code == status


def test_special_tokens_count_in_completions_and_are_text_in_chats(server: RunningServer) -> None:
    def num_prompt_tokens(path: str, **body: object) -> int:
        return int(server.post(path, {"max_tokens": 1, **body}).json()["usage"]["prompt_tokens"])

    assert num_prompt_tokens(COMPLETIONS, prompt="<|im_end|>") == 1
    as_text = num_prompt_tokens(COMPLETIONS, prompt="<|im_end|>", split_special_tokens=True)
    assert as_text > 1
    chats = [
        num_prompt_tokens("/v1/chat/completions", messages=[{"role": "user", "content": content}])
        for content in ("<|im_end|>", "a")
    ]
    assert chats[0] - chats[1] == as_text - 1


def test_advice_is_not_in_the_log(server: RunningServer) -> None:
    secret = "xyzzy<|im_end|>plugh"
    assert server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1, "stop": [secret]}).status_code == 200
    assert "xyzzy" not in server.log

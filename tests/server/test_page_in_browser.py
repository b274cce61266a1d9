"""The page in headless Chromium, against a real server: chat, stop, branches, live view, text that stays text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cascade_llm.server.sharing_schema import SHARING_EVENTS
from tests.server.browser import Browser, find_browser, open_browser
from tests.server.conftest import RunningServer, StartServer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_browser() is None, reason="no Chromium here")]

MARKUP = "<script>window.hurt = 1</script><img src=x onerror='window.hurt = 2'>"
LAST_ANSWER = "[...document.querySelectorAll('.message.assistant')].at(-1)"


@pytest.fixture
def page_server(start_server: StartServer) -> RunningServer:
    server = start_server("--cascade-shared-prefix-len", "16", "--served-model-name", "tiny")
    server.wait_until_ready()
    return server


@pytest.fixture
def browser(page_server: RunningServer, tmp_path: Path) -> Iterator[Browser]:
    path = find_browser()
    assert path is not None
    with open_browser(path, tmp_path / "profile") as browser:
        browser.look(width=1280, is_dark=False)
        browser.open(page_server.url)
        browser.wait_for("document.querySelector('#model').textContent === 'tiny'")
        yield browser


def ask(browser: Browser, text: str, *, answers: int = 1, max_tokens: int = 16) -> None:
    browser.run(f"""
        document.querySelector('#answers').value = '{answers}';
        document.querySelector('#max-tokens').value = '{max_tokens}';
        document.querySelector('#question').value = {json.dumps(text)};
        document.querySelector('#send').click();
    """)


def wait_until_answered(browser: Browser) -> str:
    browser.wait_for("document.querySelector('#stop').disabled")
    note: str = browser.wait_for(f"{LAST_ANSWER}.querySelector('.note, .wrong').textContent")
    return note


def test_chat_branches_and_the_live_view(browser: Browser) -> None:
    ask(browser, "A question of some length, which all answers share.", answers=4, max_tokens=300)
    browser.wait_for("document.querySelector('#tree').innerText.includes('read once for 4 sequences')")
    assert "with a prefix in common" in browser.run("document.querySelector('#sharing-state').textContent")
    assert re.search(
        r"all tokens\n\d+ held, \d+ cached, \d+ free", browser.run("document.querySelector('#pools').innerText")
    )
    browser.run("document.querySelector('#stop').click()")
    assert wait_until_answered(browser) == "stopped"
    beside = "[...document.querySelectorAll('.beside .message')]"
    assert browser.run(f"{beside}.map(one => one.ariaCurrent)") == ["true", "false", "false", "false"]
    assert all(browser.run(f"{beside}.map(one => one.querySelector('.text').textContent)"))
    go_on = f"[...{beside}.at(2).querySelectorAll('button')].at(-1)"
    assert browser.run(f"{go_on}.textContent") == "Go on with this"
    browser.run(f"{go_on}.click()")
    assert browser.run(f"{beside}.map(one => one.ariaCurrent)") == ["false", "false", "true", "false"]
    assert browser.run("document.querySelectorAll('#conversation-list ul button').length") == 3
    ask(browser, "And again?", max_tokens=8)
    assert "prompt tokens cached" in wait_until_answered(browser)
    num_messages = "document.querySelectorAll('.message').length"
    assert browser.run(num_messages) == 4
    browser.run("document.querySelectorAll('#conversation-list button')[0].click()")
    assert browser.run(f"{beside}.length") == 3  # those that have not gone on
    browser.run("document.querySelectorAll('#conversation-list button')[2].click()")
    browser.run("document.querySelector('.message.assistant footer button').click()")
    assert browser.run(num_messages) == 2
    assert browser.run("document.querySelectorAll('#conversation-list ul button').length") == 4
    browser.run("document.querySelectorAll('#conversation-list button')[1].focus(); document.activeElement.click()")
    assert browser.run("document.activeElement.textContent").startswith("1: ")  # the keyboard stays where it was
    browser.run("location.reload()")
    browser.wait_for("document.querySelectorAll('#conversation-list button').length === 5")  # kept in the browser
    assert browser.problems == []


def test_markup_in_questions_and_answers_stays_text(browser: Browser) -> None:
    piece = {"choices": [{"index": 0, "delta": {"content": MARKUP}}]}
    browser.answer_instead("/v1/chat/completions", f"data: {json.dumps(piece)}\n\ndata: [DONE]\n\n")
    ask(browser, MARKUP)
    browser.wait_for("document.querySelector('#stop').disabled && document.querySelectorAll('.message').length === 2")
    texts = browser.run("[...document.querySelectorAll('.message .text')].map(one => one.textContent)")
    assert texts == [MARKUP, MARKUP]
    assert browser.run("document.querySelectorAll('main script, main img').length") == 0
    assert browser.run("window.hurt ?? null") is None
    # the policy stops it even where a mistake of the page would make it markup
    told = browser.run(f"try {{ document.body.innerHTML = {json.dumps(MARKUP)} }} catch (error) {{ error.name }}")
    assert told == "TypeError"
    assert browser.run("window.hurt ?? null") is None


MARKDOWN = """## A list
1. **bold** and *italic*, `a < b`
   - inner ~~gone~~
2. snake_case_name, 2 * 3 * 4, \\*plain\\*

> quoted

| a | b |
| --- | --- |
| 1 | [here](https://example.org/x) |

[no](javascript:alert(1)) https://example.org/y.

```python
if a < b: **no**
```"""
DRAWN = """<h5>A list</h5>\
<ol start="1"><li><strong>bold</strong> and <em>italic</em>, <code>a &lt; b</code><ul><li>inner \
<del>gone</del></li></ul></li><li>snake_case_name, 2 * 3 * 4, *plain*</li></ol><blockquote><p>quoted</p></blockquote>\
<div class="table"><table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>LINK-x">here</a></td></tr></table></div>\
<p>[no](javascript:alert(1)) LINK-y">https://example.org/y</a>.</p>\
<pre tabindex="0" aria-label="Code: python"><code>if a &lt; b: **no**</code></pre>"""


def test_markdown_becomes_elements_piece_by_piece(browser: Browser) -> None:
    pieces = [MARKDOWN[first : first + 7] for first in range(0, len(MARKDOWN), 7)]
    events = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    browser.answer_instead("/v1/chat/completions", f"{body}data: [DONE]\n\n")
    ask(browser, MARKDOWN)
    browser.wait_for("document.querySelector('#stop').disabled && document.querySelectorAll('.message').length === 2")
    drawn = browser.run(f"{LAST_ANSWER}.querySelector('.text').innerHTML")
    link = '<a href="https://example.org/{}" target="_blank" rel="noopener noreferrer nofollow'
    assert drawn == DRAWN.replace("LINK-x", link.format("x")).replace("LINK-y", link.format("y"))
    assert browser.run("document.querySelector('.message.user .text').textContent") == MARKDOWN.strip()


HOSTILE = {
    "marks": "*_~`[" * 4000,
    "brackets": "[" * 20000 + "](x",
    "deep quotes": ">" * 20000,
    "deep lists": "\n".join(" " * level + "- x" for level in range(2000)),
    "open emphasis": "**a *b " * 4000,
    "ticks": " ".join("`" * size for size in range(1, 200)),
}


def test_no_markdown_holds_the_page_up_or_loses_text(browser: Browser) -> None:
    show = """const {{ MarkdownView }} = await import("/page/markdown.js"), holder = document.createElement("div");
        new MarkdownView(holder).show({}); return holder.textContent.length;"""
    for name, text in HOSTILE.items():
        num_kept = browser.run(f"(async () => {{ {show.format(json.dumps(text))} }})()")
        assert num_kept > 0, name


def kind(window_len: int | None, num_layers: int, num_tokens: int) -> dict[str, Any]:
    """What six sequences share, each with a few tokens of its own."""
    run = {"level": 0, "start_len": 0, "num_sequences": 6, "kv_bytes_saved": 4500, "runs": [], "own_lens": [4] * 6}
    return {
        "window_len": window_len,
        "num_layers": num_layers,
        "runs": [{**run, "num_tokens": num_tokens}],
        "own_lens": [],
    }


def pool(window_len: int | None, free: int, held: int, cached: int) -> dict[str, Any]:
    counts = {"free_pages": free, "held_pages": held, "cached_pages": cached, "session_pages": 3}
    return {"window_len": window_len, "total_pages": free + held + cached, **counts}


TOLD: dict[str, Any] = {
    "engine": "ready",
    **dict.fromkeys(("steps", "cascade_steps", "generated_tokens", "cached_tokens", "kv_bytes_read"), 9),
    "running_sequences": 6,
    "waiting_sequences": 0,
    "kv_bytes_saved": 9000,
    "cache": {
        "runs": [
            {
                "num_tokens": 96,
                "num_holders": 2,
                "has_pages": True,
                "text": "Once <b>upon</b>",
                "num_more": 5,
                "runs": [{"num_tokens": 16, "num_holders": 0, "has_pages": True, "runs": [], "num_more": 0}],
            }
        ],
        "num_more": 0,
    },
    "last_step": {
        "step_id": 7,
        "num_sequences": 6,
        "num_levels": 2,
        "num_groups": 1,
        "reason": None,
        "kv_bytes_read": 3000,
        "kv_bytes_saved": 9000,
        "kinds": [kind(None, 1, 40), kind(24, 2, 16)],
    },
    "pools": [pool(None, 40, 30, 10), pool(24, 10, 20, 10)],
}
"""An event of a model with a window in two layers of three."""


def test_the_live_view_shows_every_kind_and_every_pool(browser: Browser) -> None:
    SHARING_EVENTS[0].model_validate(TOLD)
    browser.answer_instead("/v1/cascade/events", f"event: sharing\ndata: {json.dumps(TOLD)}\n\n")
    browser.run("location.reload()")
    browser.wait_for("document.querySelectorAll('#pools li').length === 2")
    pools = browser.run("document.querySelector('#pools').innerText")
    assert "all tokens\n30 held (3 by sessions), 10 cached, 40 free" in pools
    assert "the last 24 tokens\n20 held (3 by sessions), 10 cached, 10 free" in pools
    tree = browser.run("document.querySelector('#tree').innerText")
    assert "1 layer that reads all tokens" in tree
    assert "2 layers that read the last 24 tokens" in tree
    assert "40 tokens, read once for 6 sequences" in tree
    assert "16 tokens, read once for 6 sequences" in tree
    cache = browser.run("document.querySelector('#cache').innerText")
    assert "96 tokens, held by 2 sequences and sessions" in cache
    assert "Once <b>upon</b>" in cache
    assert "16 tokens, cached" in cache
    assert "and 5 more" in cache
    assert browser.problems == []


@pytest.mark.parametrize("width", [390, 800, 1280])
def test_nothing_is_wider_than_the_window_and_all_is_labelled(browser: Browser, width: int) -> None:
    ask(browser, "word" * 200, max_tokens=4)
    wait_until_answered(browser)
    for is_dark in (False, True):
        browser.look(width=width, is_dark=is_dark)
        for view in ("chat", "sharing"):
            browser.run(f"document.body.dataset.view = '{view}'")
            assert browser.run("document.documentElement.scrollWidth") <= width
    nameless = """[...document.querySelectorAll('button, input, select, textarea')].filter(
        (one) => !(one.labels?.length || one.textContent.trim() || one.ariaLabel)).map((one) => one.id)"""
    assert browser.run(nameless) == []

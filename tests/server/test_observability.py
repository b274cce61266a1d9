"""The dashboard's queries against what /metrics exposes, and spans as a collector gets them."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from cascade_llm.sampling_params import SamplingParams
from cascade_llm.server.answer_forms import Tally
from cascade_llm.server.guard import RequestRecord
from cascade_llm.server.metrics import ServerMetrics
from cascade_llm.server.tracing import asked_attributes, open_tracing, used_attributes
from tests.cli.conftest import Run
from tests.server.conftest import RunningServer, StartServer

COMPLETIONS = "/v1/completions"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


# the dashboard


WINDOW = {"window"}
"""The label of what only models with windows in some layers have."""


def exposed(text: str) -> dict[str, set[str]]:
    """The names of a scrape's samples, each with its labels."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def unknown_in(dashboard: dict[str, Any], names: dict[str, set[str]]) -> list[str]:
    """What its queries ask for that is not there."""
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    expressions += [
        variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"
    ]
    assert len(expressions) > 20
    unknown = []
    for expression in expressions:
        asked = re.findall(r"\bcascade_llm_\w+", expression)
        assert asked, expression
        unknown += [name for name in asked if name not in names]
        labels = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
        known = {label for name in asked for label in names.get(name, ())} | WINDOW
        unknown += sorted(labels - known)
    return unknown


def test_every_query_of_the_dashboard_finds_what_it_asks_for(server: RunningServer, run: Run) -> None:
    printed = run("serve", "--print-dashboard")
    assert printed.exit_code == 0
    dashboard = json.loads(printed.stdout)
    body = {"prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True, "stream": True}
    assert server.post(COMPLETIONS, body).status_code == 200
    names = exposed(server.get("/metrics").text)
    assert unknown_in(dashboard, names) == []
    del names["cascade_llm_kv_bytes_saved_total"]
    assert set(unknown_in(dashboard, names)) == {"cascade_llm_kv_bytes_saved_total"}, "the check can fail"


def test_pages_of_every_pool_are_exposed() -> None:
    counts = {"total_pages": 9, "free_pages": 4, "held_pages": 3, "cached_pages": 2, "session_pages": 1}
    window = {f"window_512_{name}": 10 * count for name, count in counts.items()}
    lines = ServerMetrics().text({**counts, **window, "copied_pages": 7}).decode().splitlines()
    assert [line for line in lines if "_pages" in line and not line.startswith("#")] == [
        'cascade_llm_pages{state="free"} 4.0',
        'cascade_llm_pages{state="held"} 3.0',
        'cascade_llm_pages{state="cached"} 2.0',
        'cascade_llm_pages{state="free",window="512"} 40.0',
        'cascade_llm_pages{state="held",window="512"} 30.0',
        'cascade_llm_pages{state="cached",window="512"} 20.0',
        "cascade_llm_session_pages 1.0",
        'cascade_llm_session_pages{window="512"} 10.0',
        "cascade_llm_copied_pages_total 7.0",
    ]


def test_panels_of_the_dashboard_do_not_lie_on_each_other(run: Run) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(run("serve", "--print-dashboard").stdout)["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


# spans


class Collector:
    """Takes spans over HTTP, as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = ExportTraceServiceRequest()
                message.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
                if self.path == "/v1/traces":
                    collector.take(message)
                self.send_response(200 if self.path == "/v1/traces" else 404)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def take(self, message: ExportTraceServiceRequest) -> None:
        for part in message.resource_spans:
            self.resources.append(attributes(part.resource))
            self.spans += [span for scope in part.scope_spans for span in scope.spans]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


def attributes(told: Any) -> dict[str, Any]:
    values = {}
    for pair in told.attributes:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        values[pair.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return values


def test_no_spans_where_nobody_takes_them() -> None:
    assert open_tracing(None, {}) is None


def test_a_span_has_its_parent_its_times_and_its_counts(collector: Collector) -> None:
    tracing = open_tracing(collector.url + "/", {})
    assert tracing is not None
    record = RequestRecord("mine")
    params = SamplingParams(max_tokens=9, temperature=0.5, n=2, stop=["secret"])
    record.attributes |= asked_attributes("chat", "tiny", "chatcmpl-mine", params)
    record.attributes |= used_attributes(Tally(5, 7, [3], finish_reasons={"stop", "length"}))
    record.first_token_s = 0.0
    tracing.write(record, {"traceparent": TRACEPARENT}, "POST", "/v1/chat/completions", 200)
    tracing.write(RequestRecord("other"), {}, "GET", "/v1/models", 200)
    record.first_token_s = None
    tracing.write(record, {"traceparent": "no such thing"}, "POST", "/v1/chat/completions", 503)
    tracing.close()
    good, failed = collector.spans
    assert (good.name, good.trace_id.hex(), good.parent_span_id.hex()) == ("chat tiny", TRACE, PARENT)
    assert good.start_time_unix_nano <= good.events[0].time_unix_nano <= good.end_time_unix_nano
    told = attributes(good)
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "cascade_llm",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.response.id": "chatcmpl-mine",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.finish_reasons": ["length", "stop"],
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "cascade_llm.request_id": "mine",
    }
    assert (failed.parent_span_id, attributes(failed)["error.type"], failed.status.code) == (b"", "503", 2)
    assert collector.resources[0]["service.name"] == "cascade-llm"


@pytest.mark.slow
def test_a_server_sends_spans_without_text_and_its_last_ones_at_its_end(
    collector: Collector, start_server: StartServer
) -> None:
    server = start_server("--otlp-endpoint", collector.url, "--served-model-name", "tiny")
    server.wait_until_ready()
    secret = "xyzzy plugh"
    body = {"prompt": secret, "max_tokens": 3, "ignore_eos": True, "stream": True}
    server.post(COMPLETIONS, body, traceparent=TRACEPARENT, **{"x-request-id": "mine"})
    server.post("/v1/messages", {"messages": [{"role": "user", "content": secret}], "max_tokens": 2})
    server.post(COMPLETIONS, {"prompt": ""})
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    first, second = collector.spans
    assert (first.name, first.parent_span_id.hex(), second.name) == ("text_completion tiny", PARENT, "chat tiny")
    told = attributes(first)
    assert (told["cascade_llm.request_id"], told["gen_ai.usage.output_tokens"], told["cascade_llm.steps"]) == (
        "mine",
        3,
        3,
    )
    assert [event.name for event in first.events] == ["first_token"]
    assert "xyzzy" not in str(collector.spans)
    assert "xyzzy" not in server.log

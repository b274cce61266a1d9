"""OpenTelemetry: a span for each request that generates, with the attributes of the conventions for generative AI.

Spans are made when a request is over, from what is known of it then, and sent by a thread of OpenTelemetry's. They have
ids, counts and parameters; no text. Everything but the address is configured by OpenTelemetry's own variables (OTEL_*).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cascade_llm import __version__
from cascade_llm.errors import ConfigError
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.server.answer_forms import Tally
from cascade_llm.server.guard import RequestRecord

if TYPE_CHECKING:  # an extra
    from opentelemetry.sdk.trace import TracerProvider

__all__ = ["Tracing", "asked_attributes", "open_tracing", "used_attributes"]

ADDRESS_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
TRACES_PATH = "/v1/traces"
NS = 1e9


def open_tracing(endpoint: str | None, environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """Spans go to an OTLP collector over HTTP; None where neither `endpoint` nor the environment names one.

    Args:
        endpoint: the collector's base URL, such as http://localhost:4318
        environment: where OTEL_* variables are looked for

    Raises:
        ConfigError: the packages are not here
    """
    if endpoint is None and not any(environment.get(name) for name in ADDRESS_VARIABLES):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        missing = error.name
        raise ConfigError(f"spans need a package that is not here ({missing}): pip install cascade-llm[otel]") from None
    named = bool(environment.get("OTEL_SERVICE_NAME"))
    own = {"service.version": __version__, **({} if named else {"service.name": "cascade-llm"})}
    provider = TracerProvider(resource=Resource.create(own))
    address = None if endpoint is None else endpoint.rstrip("/") + TRACES_PATH
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=address)))
    return Tracing(provider)


class Tracing:
    """Writes spans until it is closed."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._tracer = provider, provider.get_tracer("cascade_llm", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def write(self, record: RequestRecord, headers: Mapping[str, str], method: str, path: str, status: int) -> None:
        """The span of a request that is over; none for one that generates nothing.

        Args:
            record: what is known of it
            headers: as they came; `traceparent` names the span that this one is part of
            method: of the request
            path: the route
            status: of the answer
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode

        if not record.attributes:
            return
        operation, model = record.attributes["gen_ai.operation.name"], record.attributes["gen_ai.request.model"]
        end_ns = time.time_ns()
        start_ns = end_ns - int(record.age_s * NS)
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            start_time=start_ns,
            attributes={
                "http.request.method": method,
                "http.route": path,
                "http.response.status_code": status,
                "cascade_llm.request_id": record.request_id,
                **record.attributes,
            },
        )
        if record.first_token_s is not None:
            span.add_event("first_token", timestamp=start_ns + int(record.first_token_s * NS))
        if status >= 500:
            span.set_attribute("error.type", str(status))
            span.set_status(Status(StatusCode.ERROR))
        span.end(end_ns)

    def close(self) -> None:
        """Send what waits, and end."""
        self._provider.shutdown()


def asked_attributes(operation: str, model: str, answer_id: str, params: SamplingParams) -> dict[str, Any]:
    """What is known of a request when it begins, by the names of the conventions."""
    asked = {
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
        "gen_ai.request.choice.count": params.n if params.n > 1 else None,
    }
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "cascade_llm",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": answer_id,
        **{name: value for name, value in asked.items() if value is not None},
    }


def used_attributes(tally: Tally) -> dict[str, Any]:
    """What is known when it is over."""
    cascade = tally.cascade().get("cascade", {})
    return {
        "gen_ai.response.finish_reasons": sorted(tally.finish_reasons),
        "gen_ai.usage.input_tokens": tally.prompt_tokens,
        "gen_ai.usage.output_tokens": tally.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": sum(tally.cached_tokens),
        **{f"cascade_llm.{name}": value for name, value in cascade.items()},
    }

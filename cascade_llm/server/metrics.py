"""What the server counts, in the text form that Prometheus reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

__all__ = ["CONTENT_TYPE", "ServerMetrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "cascade_llm_"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
GAUGES = frozenset(("running_sequences", "waiting_sequences"))
POOL_PAGES = re.compile(r"(?:window_(?P<window>\d+)_)?(?P<state>total|free|held|cached|session)_pages")
"""Counts of `LLM.stats()` that say where the pages of a pool are."""


class ServerMetrics:
    """Counters of the API process, and those of the engine as it last told them."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(f"{PREFIX}http_requests", "Requests answered.", ["path", "status"], registry=registry)
        self.first_token = Histogram(
            f"{PREFIX}time_to_first_token_seconds", "From a request's arrival.", buckets=SECONDS, registry=registry
        )
        self.between_tokens = Histogram(
            f"{PREFIX}inter_token_seconds", "Between tokens of a stream.", buckets=SECONDS, registry=registry
        )
        self.duration = Histogram(
            f"{PREFIX}request_seconds", "From a request's arrival to its end.", buckets=SECONDS, registry=registry
        )
        self.open_samples = Gauge(f"{PREFIX}open_samples", "Samples that run or wait.", registry=registry)
        self.restarts = Gauge(f"{PREFIX}engine_restarts", "Times that the engine was restarted.", registry=registry)
        self._engine = _EngineMetrics()
        registry.register(self._engine)

    def text(self, engine: Mapping[str, Any] | None) -> bytes:
        """All of it; `engine` is `LLM.stats()` with `LLM.plan_report()`, None where nobody answers."""
        self._engine.stats = engine
        return generate_latest(self._registry)


class _EngineMetrics:
    """Makes metrics of the engine's counters, whatever their names are."""

    def __init__(self) -> None:
        self.stats: Mapping[str, Any] | None = None

    def collect(self) -> Iterable[Metric]:
        """What the registry asks for."""
        yield GaugeMetricFamily(f"{PREFIX}engine_up", "Whether the engine answers.", float(self.stats is not None))
        stats = dict(self.stats or {})
        yield from _pool_pages(stats)
        reasons = CounterMetricFamily(
            f"{PREFIX}unshared_steps", "Steps that shared nothing, by reason.", labels=["reason"]
        )
        for reason, count in (stats.pop("unshared_steps", None) or {}).items():
            reasons.add_metric([reason], count)
        yield reasons
        yield from _tenant_pages(stats.pop("tenants", None) or {})
        for name, value in stats.items():
            if isinstance(value, int):
                form = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
                yield form(f"{PREFIX}{name}", name.replace("_", " ") + ".", value)


def _pool_pages(stats: dict[str, Any]) -> Iterable[Metric]:
    """Of all pools, taken out of `stats`; a pool that layers with a window have of their own is labelled with that."""
    pages = Metric(f"{PREFIX}pages", "Pages of a KV pool by state.", "gauge")
    sessions = Metric(f"{PREFIX}session_pages", "Pages that sessions hold, part of the held ones.", "gauge")
    for name, found in [(name, found) for name in stats if (found := POOL_PAGES.fullmatch(name))]:
        count, labels = stats.pop(name), {"window": found["window"]} if found["window"] else {}
        if found["state"] == "session":
            sessions.add_sample(sessions.name, labels, count)
        elif found["state"] != "total":
            pages.add_sample(pages.name, {"state": found["state"], **labels}, count)
    return pages, sessions


def _tenant_pages(tenants: Mapping[str, Mapping[str, int]]) -> Iterable[Metric]:
    """Of the tenants that have a share of the pool."""
    left = GaugeMetricFamily(
        f"{PREFIX}tenant_pages", "Pages that a tenant's requests have left behind.", labels=["tenant"]
    )
    budget = GaugeMetricFamily(
        f"{PREFIX}tenant_page_budget", "Pages that a tenant's requests may leave behind.", labels=["tenant"]
    )
    for tenant, pages in tenants.items():
        left.add_metric([tenant], pages["left_pages"])
        budget.add_metric([tenant], pages["budget_pages"])
    yield left
    yield budget

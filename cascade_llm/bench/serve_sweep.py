"""Servers measured at one or more arrivals, in turns: the same requests and the same times for each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cascade_llm.bench.latency import LatencyReport, LatencyRun
from cascade_llm.bench.load import Load
from cascade_llm.bench.online import Arrivals, RequestTiming
from cascade_llm.bench.reading import Reading
from cascade_llm.bench.serve_client import CompletionsServer, run_against_server
from cascade_llm.bench.slo import ServiceLevel
from cascade_llm.errors import BackendError

__all__ = ["ServeSweep"]


class ServeSweep:
    """One report for each of the arrivals, filled while servers are measured.

    Servers keep their prefix caches from run to run, so each run has a load of its own; all servers meet the same ones.
    """

    def __init__(
        self,
        model: str,
        loads: Callable[[int], Load],
        arrivals: Sequence[Arrivals],
        *,
        repeat: int,
        slo: ServiceLevel | None = None,
        ignore_eos: bool = True,
    ) -> None:
        """Keep what is run.

        Args:
            model: its name in reports
            loads: of the run of that number
            arrivals: one report for each
            repeat: runs of each server at each of the arrivals
            slo: what requests are counted by that kept it
            ignore_eos: see `run_against_server`
        """
        self._loads, self._repeat, self._ignore_eos = loads, repeat, ignore_eos
        self.slo = slo
        first = loads(0)
        self.reports = [LatencyReport(model, first, of_run) for of_run in arrivals]
        self.errors: list[str] = []

    @property
    def num_requests(self) -> int:
        """Of each server, as far as loads are of one size."""
        return len(self.reports) * self._repeat * len(self.reports[0].load.requests)

    @property
    def is_interrupted(self) -> bool:
        """Whether `measure` was."""
        return any(report.interrupted for report in self.reports)

    def measure(self, servers: Mapping[str, CompletionsServer], on_request: Callable[[], None] = lambda: None) -> None:
        """Run all of it against these servers, the order changing from turn to turn.

        Each gets one request before that does not count. An interruption is noted in the report and ends it.

        Raises:
            BackendError: a run in which no request succeeded
        """
        for name, server in servers.items():
            self._warm(name, server)
        for place, report in enumerate(self.reports):
            for turn in range(self._repeat):
                load = self._loads(place * self._repeat + turn)
                for name in list(servers)[:: 1 if turn % 2 == 0 else -1]:
                    report.sides.setdefault(name, {"model": servers[name].model, "ignore_eos": self._ignore_eos})
                    try:
                        self._run(report, name, servers[name], load, on_request)
                    except KeyboardInterrupt:
                        report.interrupted = True
                    if report.interrupted:
                        return

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "slo": None if self.slo is None else vars(self.slo),
            "reports": [report.as_dict() for report in self.reports if report.runs],
            "errors": self.errors,
        }

    def _warm(self, name: str, server: CompletionsServer) -> None:
        request = self._loads(len(self.reports) * self._repeat).requests[0]
        answer = server.complete(request.token_ids, request, {"temperature": 0}, RequestTiming(0.0), lambda: 0.0)
        if answer.error is not None:
            raise BackendError(f"{name}: no request succeeded; the first error: {answer.error}")

    def _run(
        self,
        report: LatencyReport,
        name: str,
        server: CompletionsServer,
        load: Load,
        on_request: Callable[[], None],
    ) -> None:
        run = run_against_server(server, load, report.arrivals, ignore_eos=self._ignore_eos, on_end=on_request)
        self.errors += [f"{name}: {error}" for error in run.errors]
        report.interrupted = "interrupted" in run.errors
        if not run.succeeded:
            if report.interrupted:
                return
            raise BackendError(f"{name}: no request succeeded; the first error: {run.errors[0]}")
        timings = [answer.timing for answer in run.succeeded]
        counters = {"requests": len(run.answers), "failed": len(run.errors)}
        if self.slo is not None:
            counters["in_time"] = sum(map(self.slo.is_met, timings))
        reading = Reading(run.elapsed_s, sum(answer.num_generated for answer in run.succeeded), counters)
        report.runs.setdefault(name, []).append(LatencyRun.of(timings, reading))

"""Where the time of the tests goes: `python -m pytest -p tests.processor_times -n 2` ends with a table.

It is processor time, of fixtures too, and of the processes that a test has waited for: other work on the machine
changes it little. What a fixture of a session or module takes stands with the test that asked first.
"""

from __future__ import annotations

import resource
import time
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest

SHOWN = 40
PROPERTY = "processor_s"
STARTED = pytest.StashKey[float]()


def processor_s() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.stash[STARTED] = processor_s()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    if call.when == "teardown":
        item.user_properties.append((PROPERTY, processor_s() - item.stash[STARTED]))
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    spent: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for report in [report for reports in terminalreporter.stats.values() for report in reports]:
        path, _, name = getattr(report, "nodeid", "").partition("::")
        for kind, value in getattr(report, "user_properties", ()):
            if kind == PROPERTY:
                spent[path][name.split("[")[0]] += value
    terminalreporter.section(f"{sum(map(Counter.total, spent.values())):.0f} s of a processor")
    for path, tests in sorted(spent.items(), key=lambda item: -item[1].total())[:SHOWN]:
        name, most = tests.most_common(1)[0]
        terminalreporter.line(f"{tests.total():7.1f} s  {path}, {most:.1f} s in {name}")

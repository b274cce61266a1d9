from __future__ import annotations

import os
from pathlib import Path

import pytest

from cascade_llm.device.cpu_cores import usable_cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four cores of two hyperthreads each, all of them this process's, in the group /a/b."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for cpu in range(8):
        folder = tmp_path / "devices" / "system" / "cpu" / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    (tmp_path / "fs" / "cgroup" / "a" / "b").mkdir(parents=True)
    return tmp_path


def test_hyperthreads_count_once(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores(machine, machine) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 6})
    assert usable_cores(machine, machine) == 2


@pytest.mark.parametrize(
    ("own", "above", "expected"),
    [("max 100000", "max 100000", 4), ("150000 100000", "max 100000", 2), ("300000 100000", "50000 100000", 1)],
)
def test_the_strictest_group_limits(own: str, above: str, expected: int, machine: Path) -> None:
    (machine / "fs" / "cgroup" / "a" / "b" / "cpu.max").write_text(f"{own}\n")
    (machine / "fs" / "cgroup" / "a" / "cpu.max").write_text(f"{above}\n")
    assert usable_cores(machine, machine) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 4), ("250000", 3)])
def test_the_first_version_of_control_groups(quota: str, expected: int, machine: Path) -> None:
    (machine / "cgroup").write_text("4:cpu,cpuacct:/a/b\n")
    folder = machine / "fs" / "cgroup" / "cpu" / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores(machine, machine) == expected


def test_a_system_that_tells_nothing_has_a_core(tmp_path: Path) -> None:
    assert usable_cores(tmp_path, tmp_path) >= 1

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from cascade_llm.device import huge_pages
from cascade_llm.device.huge_pages import HUGE_PAGE_BYTES, MemoryRange, collect_into_huge_pages, huge_pages_allowed


def huge_bytes_at(address: int) -> int:
    """In huge pages, of the mapping that holds this address."""
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            is_there = begin <= address < end
        elif is_there and first == "AnonHugePages:":
            return int(line.split()[1]) << 10
    raise AssertionError("nothing is mapped there")


def test_memory_is_as_it_was_and_lies_in_huge_pages() -> None:
    if not huge_pages_allowed():
        pytest.skip("no huge pages here")
    with mmap.mmap(-1, 5 * HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        _check_collected(torch.frombuffer(memory, dtype=torch.int64))


def _check_collected(values: torch.Tensor) -> None:
    torch.arange(len(values), out=values)
    gained = collect_into_huge_pages([MemoryRange(values.data_ptr(), values.nbytes)])
    assert gained % HUGE_PAGE_BYTES == 0
    if not gained:
        pytest.skip("this kernel refuses")
    assert huge_bytes_at(values.data_ptr()) >= gained
    assert torch.equal(values, torch.arange(len(values)))


def test_pages_are_asked_for_where_half_of_them_is_covered() -> None:
    page, half = HUGE_PAGE_BYTES, HUGE_PAGE_BYTES // 2
    ranges = [MemoryRange(page, half), MemoryRange(2 * page + half + 1, page), MemoryRange(5 * page - 9, half + 9)]
    assert list(huge_pages._pages_of(ranges)) == [page, 3 * page, 5 * page]
    ranges = [MemoryRange(page + 4096 * part, 4096) for part in range(256)]
    assert list(huge_pages._pages_of(ranges)) == [page], "small ones add up"
    assert list(huge_pages._pages_of(ranges[1:])) == []


def test_what_the_kernel_refuses_stays_as_it_is() -> None:
    assert collect_into_huge_pages([MemoryRange(HUGE_PAGE_BYTES, HUGE_PAGE_BYTES)]) == 0, "nothing is mapped there"


def test_an_owner_who_switched_them_off_is_obeyed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = tmp_path / "enabled"
    monkeypatch.setattr(huge_pages, "SETTING", setting)
    assert not huge_pages_allowed(), "there is no such file"
    setting.write_text("always madvise [never]\n")
    assert not huge_pages_allowed()
    values = torch.ones(HUGE_PAGE_BYTES)
    assert collect_into_huge_pages([MemoryRange(values.data_ptr(), values.nbytes)]) == 0

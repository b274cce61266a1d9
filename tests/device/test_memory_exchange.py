"""Exchanges through shared memory, against sums of the tensors themselves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cascade_llm.device.memory_exchange import SLOT_BYTES, MemoryExchange
from cascade_llm.device.ranks import Ranks, join_ranks
from cascade_llm.errors import RankError

SHAPES = [(3, 5), (1,), (0, 4), (16, 576), (SLOT_BYTES // 4,), (3, SLOT_BYTES // 5), (2,)]


def tensor_of(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + rank), dtype=torch.float32).to(dtype)


def check(exchange: MemoryExchange, all_of: list[torch.Tensor], index: int) -> None:
    """Each kind of exchange, where every rank has its own of these tensors."""
    expected = all_of[0].clone()
    for other in all_of[1:]:
        expected += other
    total, told, least = all_of[index].clone(), all_of[index].clone(), all_of[index].clone()
    exchange.sum(total)
    assert torch.equal(total, expected)
    parts = exchange.gather(all_of[index])
    assert len(parts) == (len(all_of) if index == 0 else 0)
    assert all(map(torch.equal, parts, all_of))
    exchange.broadcast(told)
    assert torch.equal(told, all_of[0])
    exchange.least(least)
    assert torch.equal(least, torch.stack(all_of).amin(0))


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "polling"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_exchanges_are_those_of_plain_tensors(count: int, compiled: bool, tmp_path: Path) -> None:
    """In one order without pauses, so that slots are used again and again; in inference mode, as steps are, and not."""
    dtypes = [torch.float32, torch.bfloat16]

    def work(index: int) -> None:
        exchange = MemoryExchange(index, count, tmp_path / "ranks", compiled=compiled)
        for number, shape in enumerate(SHAPES * 3):
            for dtype in dtypes:
                with torch.inference_mode(number % 2 == 0):
                    check(exchange, [tensor_of(rank, shape, dtype) for rank in range(count)], index)
        exchange.close()

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))
    assert not (tmp_path / "ranks").exists()


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "polling"])
def test_who_waits_for_a_rank_that_leaves_is_told(compiled: bool, tmp_path: Path) -> None:
    def work(index: int) -> None:
        exchange = MemoryExchange(index, 2, tmp_path / "ranks", compiled=compiled)
        ranks = Ranks(index, 2, exchange)
        ranks.all_reduce(torch.ones(2))
        if index == 1:
            ranks.close()
        else:
            with pytest.raises(RankError, match="rank 0 lost another rank during an exchange: it has left"):
                ranks.all_reduce(torch.ones(2))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))


def test_memory_that_cannot_be_had_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"rank 0 could not meet the others: .*No such file"):
        join_ranks(0, 2, tmp_path / "no folder" / "ranks", torch.device("cpu"))

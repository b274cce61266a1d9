"""Recordings of stretches of work: replayed on other values, they leave what the stretch itself would."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from cascade_llm.device.arena import Arena
from cascade_llm.device.native_calls import replay_function
from cascade_llm.device.native_function import NativeFunction
from cascade_llm.device.recording import NotRecordable, Recording
from cascade_llm.errors import BackendError, CapacityError
from cascade_llm.layers.fused_ops import RMSNorm
from cascade_llm.layers.native_ops import select_fused_ops
from tests.native_code import needs_compiler

SIZE = 32


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def stretch(ids: torch.Tensor, table: torch.Tensor, weight: torch.Tensor, repeats: int = 4) -> torch.Tensor:
    """Compiled functions, torch's operations with new results, in place, and views."""
    ops = select_fused_ops(torch.float32, ids.device)
    norm = RMSNorm.ones(SIZE, 1e-5, dtype=torch.float32, device=ids.device)
    x = table.index_select(0, ids)
    for _ in range(repeats):
        x = x + ops.silu_and_mul(F.linear(ops.rms_norm(x, norm), weight))
        x.mul_(0.5)
        first, second = x.view(len(ids), 2, SIZE // 2).split(1, dim=1)
        x = torch.cat((second, first), dim=1).flatten(1)
    return x


@needs_compiler
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_a_replay_reads_what_memory_holds_now(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    table, weight = torch.randn(100, SIZE, generator=generator), torch.randn(2 * SIZE, SIZE, generator=generator)
    ids, recording = torch.arange(rows), Recording(Arena())
    out = recording.record(lambda: stretch(ids, table, weight))
    assert torch.equal(out, stretch(ids, table, weight))
    for first in (50, 20):
        ids.copy_(torch.arange(rows) + first)
        recording.replay()
        assert torch.equal(out, stretch(ids, table, weight))


def test_memory_grows_with_what_lives_together_and_not_with_the_stretch() -> None:
    table, weight, ids = torch.randn(100, SIZE), torch.randn(2 * SIZE, SIZE), torch.arange(9)
    sizes = []
    for repeats in (4, 40):
        arena = Arena()
        Recording(arena).record(lambda repeats=repeats: stretch(ids, table, weight, repeats))  # type: ignore[misc]
        sizes.append(arena.num_bytes)
    assert sizes[0] == sizes[1]


def test_recordings_share_an_arena_and_keep_their_results_apart() -> None:
    arena, results = Arena(), []
    table, weight, ids = torch.randn(100, SIZE), torch.randn(2 * SIZE, SIZE), torch.arange(9)
    recordings = [Recording(arena), Recording(arena)]
    for recording in recordings:
        results.append(recording.record(lambda: stretch(ids, table, weight)))
    assert results[0].data_ptr() != results[1].data_ptr()
    ids.add_(3)
    for recording in recordings:
        recording.replay()
    expected = stretch(ids, table, weight)
    assert torch.equal(results[0], expected)
    assert torch.equal(results[1], expected)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: torch.tensor(x.tolist()),
        lambda x: torch.from_numpy(x.numpy().copy()),
        lambda x: x * x[0].item(),
        lambda x: x + 1 if bool((x > 3).any()) else x,
        lambda x: x.new_zeros(int(x.max())),
    ],
)
def test_what_depends_on_values_that_python_reads_is_refused(read: Callable[[torch.Tensor], torch.Tensor]) -> None:
    values = torch.arange(6)
    with pytest.raises(NotRecordable, match="Python reads a tensor"):
        Recording(Arena()).record(lambda: read(values))
    assert torch.equal(torch.tensor(values.tolist()), values)  # nothing is left behind


def test_a_function_without_memory_is_told() -> None:
    function = NativeFunction(ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_long)(int))
    function.declare(ctypes.c_long, returns=ctypes.c_int)

    def work(answer: int) -> torch.Tensor:
        function(answer)
        return torch.zeros(1)

    fine, failing = Recording(Arena()), Recording(Arena())
    fine.record(lambda: work(0))
    fine.replay()
    failing.record(lambda: work(1))
    with pytest.raises(CapacityError, match="no memory for a step's products"):
        failing.replay()


def test_arguments_of_every_kind_come_in_their_order() -> None:
    """More integers than registers hold, floats between them, an address, None and negative numbers."""
    kinds = (*[ctypes.c_long] * 5, ctypes.c_float, ctypes.c_void_p, ctypes.c_int, ctypes.c_float, *[ctypes.c_long] * 6)
    heard: list[tuple[float | None, ...]] = []
    function = NativeFunction(ctypes.CFUNCTYPE(None, *kinds)(lambda *args: heard.append(args)))
    function.declare(*kinds)
    args = (1, -2, 3, 4, 5, 0.5, None, -6, -1.25, 7, 8, 9, 10, 11, -(1 << 40))
    memory = (ctypes.c_int * 2)(3, 4)
    takes_memory = NativeFunction(ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_int))(lambda p: heard.append((p[1],))))
    takes_memory.declare(ctypes.POINTER(ctypes.c_int))

    def work() -> torch.Tensor:
        function(*args)
        takes_memory(memory)
        return torch.zeros(1)

    recording = Recording(Arena())
    recording.record(work)
    memory[1] = 5
    recording.replay()
    assert heard == [args, (4,), args, (5,)]


def test_other_systems_have_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's calls pack small arguments on the stack."""
    monkeypatch.setattr("sys.platform", "darwin")
    replay_function.cache_clear()
    with pytest.raises(BackendError, match="Linux's calling conventions, not darwin's"):
        replay_function()


@pytest.mark.parametrize(
    "kinds", [(ctypes.c_double,), (ctypes.c_long,) * 17, (ctypes.c_float,) * 5], ids=["double", "many", "floats"]
)
def test_what_a_list_has_no_room_for_is_refused(kinds: tuple[type, ...]) -> None:
    function = NativeFunction(ctypes.CFUNCTYPE(None, *kinds)(lambda *args: None))
    function.declare(*kinds)

    def work() -> torch.Tensor:
        function(*(1 for _ in kinds))
        return torch.zeros(1)

    with pytest.raises(NotRecordable, match="no room for"):
        Recording(Arena()).record(work)

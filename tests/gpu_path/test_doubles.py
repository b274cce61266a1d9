"""The doubles themselves: FlashInfer's signatures, FlashInfer's arithmetic, and a stream that does nothing early."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch

from cascade_llm.attention.flashinfer.ops import FlashInferOps
from cascade_llm.device.stream import Graph
from scripts.flashinfer_signatures import describe
from tests.doubles.device import DoubleStream
from tests.doubles.flashinfer import FlashInferDouble
from tests.doubles.planner import DoubleError, decode_plan, prefill_plan
from tests.doubles.wrappers import SIGNATURES, DecodeWrapper, PrefillWrapper

RECORDED: dict[str, list[dict[str, str]]] = json.loads(SIGNATURES.read_text())["calls"]
DOUBLE = FlashInferDouble(DoubleStream())

CALLS = {
    "flashinfer:merge_state_in_place": DOUBLE.merge_state_in_place,
    "flashinfer:append_paged_kv_cache": DOUBLE.append_paged_kv_cache,
    "flashinfer.norm:rmsnorm": DOUBLE.rmsnorm,
    "flashinfer.norm:fused_add_rmsnorm": DOUBLE.fused_add_rmsnorm,
    "flashinfer.activation:silu_and_mul": DOUBLE.silu_and_mul,
    "flashinfer.rope:apply_rope_with_cos_sin_cache_inplace": DOUBLE.apply_rope_with_cos_sin_cache_inplace,
}
WRAPPERS = {
    "flashinfer:BatchPrefillWithPagedKVCacheWrapper": PrefillWrapper,
    "flashinfer:BatchDecodeWithPagedKVCacheWrapper": DecodeWrapper,
}


def without(names: tuple[str, ...], parameters: list[dict[str, str]]) -> list[dict[str, str]]:
    return [parameter for parameter in parameters if parameter["name"] not in names]


@pytest.mark.parametrize("name", CALLS)
def test_calls_have_the_recorded_signatures(name: str) -> None:
    assert describe(CALLS[name]) == RECORDED[name]


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_have_the_recorded_signatures(name: str) -> None:
    """plan, run and workspace_size bind their arguments by the recorded signatures; the others are written out."""
    wrapper = WRAPPERS[name]
    own = without(("self", "double"), describe(wrapper.__init__))
    assert own == without(("self",), RECORDED[f"{name}.__init__"])
    assert describe(wrapper.reset_workspace_buffer) == RECORDED[f"{name}.reset_workspace_buffer"]


def test_the_door_names_calls_that_are_recorded() -> None:
    names = {name.split(":")[1].split(".")[0] for name in RECORDED}
    assert set(FlashInferOps.__dataclass_fields__) <= names


def test_the_installed_package_has_what_the_double_binds() -> None:
    if importlib.util.find_spec("flashinfer") is None:
        pytest.skip("flashinfer is not installed here; CI compares in an environment of its own")
    for name in (*CALLS, *WRAPPERS):
        module, attribute = name.split(":")
        found: Any = attrgetter(attribute)(importlib.import_module(module))
        if not inspect.isclass(found):
            assert describe(found) == RECORDED[name]


def test_an_argument_that_flashinfer_does_not_take_is_an_error() -> None:
    wrapper = DOUBLE.ops().BatchDecodeWithPagedKVCacheWrapper(torch.empty(64, dtype=torch.uint8), backend="fa2")
    column = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(TypeError, match="causal"):
        wrapper.plan(column, column, column[:1], 4, 2, 64, 16, causal=True)


def shape(**changes: Any) -> dict[str, Any]:
    return {
        "num_qo_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "page_size": 16,
        "graph": True,
        "disable_split_kv": False,
        "num_sm": 132,
    } | changes


@pytest.mark.parametrize(
    ("rows", "segments", "tile", "padded"),
    [(64, 1, 128, 33), (256, 32, 128, 39), (256, 256, 16, 319), (8, 1, 64, 33)],
)
def test_planner_chooses_tile_and_grid_by_the_number_of_slots(rows: int, segments: int, tile: int, padded: int) -> None:
    """The figures of 132 processors, 32 query and 8 KV heads of 128, worked out from FlashInfer's source."""
    qo_indptr = [*range(segments), rows]
    plan = prefill_plan(qo_indptr, [64 * i for i in range(segments + 1)], max_rows=rows, **shape())
    assert (plan.cta_tile_q, plan.padded_tiles, plan.split_kv) == (tile, padded, True)


def test_planner_splits_long_segments_while_the_grid_has_room() -> None:
    one = prefill_plan([0, 4], [0, 2048], max_rows=4, **shape())
    assert len(one.tiles) == 33
    many = prefill_plan(range(65), [4 * i for i in range(65)], max_rows=64, **shape())
    assert len(many.tiles) == 64
    assert {kv_tile for _, _, kv_tile in many.tiles} == {0}
    eager = prefill_plan([0, 4], [0, 4], max_rows=4, **shape(graph=False))
    assert not eager.split_kv


def test_cuda_core_planner_refuses_what_the_original_drops() -> None:
    with pytest.raises(DoubleError, match="no pages"):
        decode_plan([0, 512, 512], num_kv_heads=8, page_size=16, graph=True, num_sm=132)


def test_a_copy_happens_at_the_wait_and_not_before() -> None:
    stream = DoubleStream()
    host, device = stream.pinned(4, torch.int32), torch.zeros(4, dtype=torch.int32)
    host[:] = 7
    stream.copy(device, host)
    assert device.tolist() == [0, 0, 0, 0]
    stream.record_event().synchronize()
    assert device.tolist() == [7, 7, 7, 7]


def test_a_pinned_buffer_may_not_be_written_while_its_copy_is_in_flight() -> None:
    stream = DoubleStream()
    host, device = stream.pinned(8, torch.int32), torch.zeros(4, dtype=torch.int32)
    with stream.active():
        stream.copy(device, host[:4])
        host[4:].fill_(1)  # another part
        with pytest.raises(DoubleError, match="in flight"):
            host[3:5].fill_(1)
        stream.record_event().synchronize()
        host[:4].fill_(1)


def test_a_result_that_is_read_before_its_mark_is_poison() -> None:
    stream = DoubleStream()
    host, device = stream.pinned(2, torch.int32), torch.tensor([1, 2], dtype=torch.int32)
    stream.copy(host, device)
    assert min(host.tolist()) < -1000
    stream.record_event().synchronize()
    assert host.tolist() == [1, 2]


def test_eager_work_comes_after_queued_work_that_it_depends_on() -> None:
    stream = DoubleStream()
    host, device = stream.pinned(2, torch.int32), torch.zeros(2, dtype=torch.int32)
    host.fill_(3)
    with stream.active():
        stream.copy(device, host)
        assert (device + 1).tolist() == [4, 4]


def captured(stream: DoubleStream, work: Callable[[], Any]) -> Graph:
    """As an engine captures: the work has run before."""
    with stream.active():
        work()
    return stream.capture(work)


def test_a_replay_runs_the_records_on_the_buffers_of_the_capture() -> None:
    stream = DoubleStream()
    x, y = torch.arange(3.0), torch.zeros(3)
    calls = []

    def work() -> None:
        calls.append(1)
        y.copy_((x * 2).view(3) + 1)

    graph = captured(stream, work)
    for scale in (1.0, 5.0):
        x.copy_(torch.arange(3.0) * scale)
        graph.replay()
        stream.record_event().synchronize()
        assert y.tolist() == [1.0, 1.0 + 2 * scale, 1.0 + 4 * scale]
    assert len(calls) == 2
    assert stream.num_replays == 2


def test_a_replay_poisons_the_outputs_of_other_graphs() -> None:
    stream = DoubleStream()
    x, kept = torch.ones(2), []
    first = captured(stream, lambda: kept.append(x + 1))
    second = captured(stream, lambda: kept.append(x + 2))
    first.replay()
    second.replay()
    stream.record_event().synchronize()
    assert kept[1].isnan().all()
    assert kept[3].tolist() == [3.0, 3.0]


def test_a_capture_refuses_what_has_not_run_before() -> None:
    x = torch.ones(2)
    with pytest.raises(DoubleError, match="add runs in a capture first"):
        DoubleStream().capture(lambda: x + 1)


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x + torch.tensor([1.0, 2.0]),
        lambda x: bool((x > 0).all()),
    ],
)
def test_a_capture_refuses_what_makes_the_host_wait(work: Any) -> None:
    x = torch.ones(2)
    with pytest.raises(DoubleError, match="during capture"):
        captured(DoubleStream(), lambda: work(x))


def test_a_capture_refuses_a_wrapper_without_fixed_buffers() -> None:
    double = FlashInferDouble(DoubleStream(), exact=True)
    wrapper = double.ops().BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(64, dtype=torch.uint8), use_tensor_cores=True, backend="fa2"
    )
    indptr, one = torch.tensor([0, 1], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    options = {"q_data_type": torch.float32, "kv_data_type": torch.float32}
    with pytest.raises(DoubleError, match="pageable"):
        wrapper.plan(indptr, one, one, 4, 2, 64, 16, **options)
    wrapper.plan(indptr, double.stream.upload(one), one, 4, 2, 64, 16, **options)
    q, pools = torch.zeros(1, 4, 64), torch.zeros(2, 2, 16, 2, 64)
    out, lse = torch.zeros(1, 4, 64), torch.zeros(1, 4)
    wrapper.run(q, pools.unbind(), out=out, lse=lse, return_lse=True)
    with pytest.raises(DoubleError, match="without fixed buffers"):
        double.stream.capture(lambda: wrapper.run(q, pools.unbind(), out=out, lse=lse, return_lse=True))


def test_a_plan_that_the_float_workspace_is_too_small_for_fails_as_the_original_does() -> None:
    """One row on 100 pages is cut into chunks, each with a partial result."""
    double = FlashInferDouble(DoubleStream())
    pages = double.stream.upload(torch.arange(100, dtype=torch.int32))
    dtypes = dict.fromkeys(("q_data_type", "kv_data_type"), torch.bfloat16)
    indptr, last = torch.tensor([0, 100], dtype=torch.int32), torch.tensor([16], dtype=torch.int32)
    for num_bytes, tensor_cores in ((4 << 20, True), (1 << 20, False)):
        for workspace in (torch.empty(num_bytes, dtype=torch.uint8), torch.empty(1 << 10, dtype=torch.uint8)):
            wrapper = double.ops().BatchDecodeWithPagedKVCacheWrapper(
                workspace, use_tensor_cores=tensor_cores, backend="fa2"
            )
            if workspace.numel() == num_bytes:
                wrapper.plan(indptr, pages, last, 8, 8, 128, 16, **dtypes)
            else:
                with pytest.raises(RuntimeError, match="Increase the workspace buffer size"):
                    wrapper.plan(indptr, pages, last, 8, 8, 128, 16, **dtypes)


def test_two_streams_may_not_share_a_float_workspace() -> None:
    double, workspace = FlashInferDouble(DoubleStream()), torch.empty(64, dtype=torch.uint8)
    double.ops().BatchPrefillWithPagedKVCacheWrapper(workspace, backend="fa2")
    double.stream = DoubleStream()
    with pytest.raises(DoubleError, match="two streams"):
        double.ops().BatchPrefillWithPagedKVCacheWrapper(workspace, backend="fa2")


def test_append_and_merge_check_their_tensors() -> None:
    double = FlashInferDouble(DoubleStream())
    v, s = torch.zeros(2, 4, 64, dtype=torch.bfloat16), torch.zeros(2, 4)
    double.merge_state_in_place(v, s, v.clone(), s.clone())
    for bad in (
        (v.float(), s, v.float(), s),
        (v, s.bfloat16(), v, s),
        (v.transpose(0, 1).contiguous().transpose(0, 1), s, v, s),
        (v[:, :, :32].contiguous(), s, v[:, :, :32].contiguous(), s),
    ):
        with pytest.raises(DoubleError):
            double.merge_state_in_place(*bad)
    pools = torch.zeros(2, 3, 4, 2, 64, dtype=torch.bfloat16).unbind()
    table = torch.arange(3, dtype=torch.int32), torch.tensor([0, 3]).int(), torch.tensor([4]).int()
    rows, zeros = torch.ones(2, 2, 64, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32)
    double.expect_appends({2})
    double.append_paged_kv_cache(rows, rows, zeros, torch.tensor([3, 6]).int(), pools, *table)
    for bad_rows, positions in ((rows.float(), [3, 6]), (rows, [3, 9]), (rows, [3, 12])):
        with pytest.raises(DoubleError):
            double.append_paged_kv_cache(bad_rows, bad_rows, zeros, torch.tensor(positions).int(), pools, *table)
    double.expect_appends(set(), {3, 6})
    double.append_paged_kv_cache(rows, rows, zeros, torch.tensor([3, 6]).int(), pools, *table)
    with pytest.raises(DoubleError, match="no row of the step owns"):
        double.append_paged_kv_cache(rows, rows, zeros, torch.tensor([3, 7]).int(), pools, *table)

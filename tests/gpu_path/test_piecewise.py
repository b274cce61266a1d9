"""Mixed steps in pieces: what the decoder computes, no row that nobody asked for reaches attention, and when not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_llm import LLM, SamplingParams
from cascade_llm.worker import piecewise
from cascade_llm.worker.piecewise import PiecewiseGraphs, piece_rows
from tests.engine.tiny_llm import random_forest, save_tiny, tiny_llm
from tests.gpu_path.gpu_engine import SHAPE, double_gpu, gpu_llm, graphs_of

VOCAB = 97
SMALL = (32, 64, 128, 256)
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", **SHAPE)


def pieces_of(llm: LLM) -> PiecewiseGraphs:
    return graphs_of(llm)._pieces


@pytest.mark.parametrize(
    ("max_rows", "expected"),
    [(1, (1,)), (32, (32,)), (100, (32, 64, 100)), (512, (*SMALL, 384, 512)), (8192, (*SMALL, 384, 512))],
)
def test_the_numbers_of_rows_that_are_captured(max_rows: int, expected: tuple[int, ...]) -> None:
    assert piece_rows(max_rows) == expected


def test_replays_are_what_the_decoder_computes(tiny: Path) -> None:
    """For every number of rows around the captured ones; the rows that fill a piece up never reach attention."""
    double = double_gpu()
    with gpu_llm(tiny, double, max_num_batched_tokens=64) as llm, torch.inference_mode(), double.stream.active():
        decoder, pieces = llm.engine.executor.runner.decoder, pieces_of(llm)  # type: ignore[attr-defined]
        seen: list[tuple[int, ...]] = []

        def attention(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
        ) -> torch.Tensor:
            seen.append((len(q), len(k), len(v)))
            group = q.shape[1] // k.shape[1]
            return (q + (layer + 1) * (k + v).repeat_interleave(group, dim=1)).cumsum(0)

        generator = torch.Generator().manual_seed(0)
        for rows in (1, 7, 31, 32, 33, 63, 64):
            token_ids = torch.randint(0, VOCAB - 1, (rows,), generator=generator)
            positions = torch.randint(0, 200, (rows,), generator=generator)
            expected = decoder.forward(token_ids, positions, attention)
            seen.clear()
            found = pieces.forward(token_ids, positions, attention)
            double.stream.run_queued()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert seen == [(rows,) * 3] * len(decoder.layers)


def test_larger_steps_run_eagerly(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piecewise, "ROWS", (16, 32))
    prompts = random_forest(5, 12, VOCAB, 50)
    with tiny_llm(tiny) as twin:
        expected = [output["token_ids"] for output in twin.generate(prompts, GREEDY)]
    with gpu_llm(tiny, double_gpu(), max_num_batched_tokens=64) as llm:
        assert [output["token_ids"] for output in llm.generate(prompts, GREEDY)] == expected
        llm.generate([5, 6, 7], GREEDY)
        counters = graphs_of(llm).counters
        assert 0 < counters.piecewise_steps < sum(counters.eager_steps.values())
        assert llm.stats()["piecewise_steps"] == counters.piecewise_steps


def test_pieces_that_do_not_fit_into_memory_are_left_out(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    capture = PiecewiseGraphs.capture

    def without_memory(self: PiecewiseGraphs, on_graph: Any) -> None:
        record = self._stream.capture
        calls: list[int] = []

        def capture_piece(work: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("no memory")
            return record(work)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self._stream, "capture", capture_piece)
            capture(self, on_graph)

    monkeypatch.setattr(PiecewiseGraphs, "capture", without_memory)
    with gpu_llm(tiny, double_gpu(), max_num_batched_tokens=64) as llm:
        assert pieces_of(llm).capacity(33) is None
        assert pieces_of(llm).capacity(5) == 32
        assert "no memory for graphs of mixed steps of 64 rows" in caplog.text
        assert llm.generate([[5, 6, 7]], GREEDY)[0].error is None


def test_what_pieces_leave_in_graph_memory_is_noticed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: queries that stay where the graph put them are written over by another graph."""

    def left_behind(self: PiecewiseGraphs, rows: int, index: int, delta: Any) -> None:
        rotation = self._decoder.rotary.by_layer([kept[:rows] for kept in self._cos_sins])[index]
        layer = self._decoder.layers[index]
        self._q, self._k, self._v = layer.before_attention(self._residual[:rows], delta, rotation)

    prompts = random_forest(5, 12, VOCAB, 50)
    with tiny_llm(tiny) as twin:
        expected = [output["token_ids"] for output in twin.generate(prompts, GREEDY)]
    monkeypatch.setattr(PiecewiseGraphs, "_project", left_behind)
    with gpu_llm(tiny, double_gpu(), max_num_batched_tokens=64) as llm:
        outputs = llm.generate(prompts, GREEDY, on_error="return")
        assert [output.outputs[0].token_ids for output in outputs] != expected

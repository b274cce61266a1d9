"""The whole engine on the GPU path, against the torch backend: tokens, log-probabilities, and how steps were run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_llm import SamplingParams
from cascade_llm.config import EngineOptions
from cascade_llm.errors import CapacityError
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.worker import worker
from cascade_llm.worker.start_progress import CAPTURING
from tests.engine.tiny_llm import assert_equal_outputs, random_forest, save_tiny, tiny_llm
from tests.gpu_path.gpu_engine import SHAPE, double_gpu, gpu_llm, graphs_of

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
VOCAB = 90


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", **SHAPE)


def tokens(outputs: Any) -> list[list[list[int]]]:
    return [[list(sample.token_ids) for sample in output.outputs] for output in outputs]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
def test_equals_the_torch_backend(tiny: Path, lag: int, enforce_eager: bool) -> None:
    prompts = random_forest(3, 10, VOCAB, 60)
    with tiny_llm(tiny) as twin:
        expected = tokens(twin.generate(prompts, GREEDY))
        assert twin.stats()["cascade_steps"] > 0
    double = double_gpu()
    with gpu_llm(tiny, double, schedule_lag=lag, enforce_eager=enforce_eager) as llm:
        assert tokens(llm.generate(prompts, GREEDY)) == expected
        assert llm.stats()["cascade_steps"] > 0
        assert double.published_pages, "else no append was checked against them"
        if not enforce_eager:
            counters = graphs_of(llm).counters
            assert counters.graph_steps >= 8
            assert set(counters.eager_steps) <= {"a sequence has several rows"}
            assert counters.eagerly_sampled_steps.total() == 0
            assert llm.stats()["graph_steps"] == counters.graph_steps
            assert llm.stats()["eager_steps"] == sum(counters.eager_steps.values())
            assert counters.piecewise_steps == sum(counters.eager_steps.values())
            replays_of_pieces = (SHAPE["num_hidden_layers"] + 1) * counters.piecewise_steps
            sampled_behind_eager = double.stream.num_replays - 2 * counters.graph_steps - replays_of_pieces
            assert 0 < sampled_behind_eager <= sum(counters.eager_steps.values())


OPTIONS: dict[str, dict[str, Any]] = {
    "chunked": {"max_num_batched_tokens": 24, "max_num_seqs": 8},
    "four levels": {"cascade_max_levels": 4, "page_size": 1},
    "pages of 16": {"page_size": 16, "cascade_shared_prefix_len": 16, "max_num_seqs": 24},
    "one level": {"enable_cascade_attention": False},
}
FORESTS = [
    pytest.param(name, seed, marks=() if place == seed else pytest.mark.slow)
    for place, name in enumerate(OPTIONS)
    for seed in range(4)
]
"""In `make test` each of the options with a forest of its own."""


@pytest.mark.parametrize(("name", "seed"), FORESTS)
def test_graphs_equal_the_torch_backend_over_forests(tiny: Path, name: str, seed: int) -> None:
    prompts, options = random_forest(seed, 14, VOCAB, 50), OPTIONS[name]
    params = [SamplingParams(temperature=0, max_tokens=3 + i % 9, ignore_eos=True) for i in range(len(prompts))]
    with tiny_llm(tiny, **options) as twin:
        expected = tokens(twin.generate(prompts, params))
    with gpu_llm(tiny, double_gpu(num_sm=4), **options) as llm:
        assert tokens(llm.generate(prompts, params)) == expected
        assert graphs_of(llm).counters.graph_steps > 0


def test_preemption_and_a_tiny_pool(tiny: Path) -> None:
    prompts = random_forest(7, 12, VOCAB, 60)
    pool = {"kv_cache_bytes": (256 // 4 + 6) * 4 * 2 * 2 * 2 * 64 * 4}
    with tiny_llm(tiny, **pool) as twin:
        expected = tokens(twin.generate(prompts, GREEDY))
    with gpu_llm(tiny, double_gpu(), **pool) as llm:
        assert tokens(llm.generate(prompts, GREEDY)) == expected
        assert llm.stats()["preemptions"] > 0


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.8, "seed": 5, "n": 3},
        {"temperature": 1.2, "top_k": 40, "top_p": 0.8, "min_p": 0.05, "seed": 2},
        {"temperature": 0, "repetition_penalty": 1.3, "logprobs": 2, "logit_bias": {5: 3.0}},
        *(
            pytest.param(params, marks=pytest.mark.slow)
            for params in (
                {"temperature": 0.8, "seed": 5},
                {"temperature": 0.7, "top_p": 0.9, "seed": 1},
                {"temperature": 0.7, "top_k": 5, "seed": 1},
                {"temperature": 1.0, "min_p": 0.1, "seed": 3},
                {"temperature": 0, "repetition_penalty": 1.3},
                {"temperature": 0, "logprobs": 2},
                {"temperature": 0, "logit_bias": {5: 3.0}},
            )
        ),
    ],
    ids=str,
)
def test_every_kind_of_sampling(tiny: Path, params: dict[str, Any]) -> None:
    """Draws are the same as without graphs, token by token; see also `test_graph_sampling`."""
    prompts = random_forest(2, 6, VOCAB, 30)
    sampling = SamplingParams(max_tokens=10, ignore_eos=True, **params)
    with tiny_llm(tiny) as twin:
        expected = twin.generate(prompts, sampling)
    with gpu_llm(tiny, double_gpu()) as llm:
        found = llm.generate(prompts, sampling)
        counters = graphs_of(llm).counters
    assert tokens(found) == tokens(expected)
    assert counters.eagerly_sampled_steps.total() == 0
    if "logprobs" in params:
        assert_equal_outputs(found, expected)


def test_greedy_and_drawn_sequences_in_one_step(tiny: Path) -> None:
    prompts = random_forest(4, 8, VOCAB, 30)
    top_p = [1.0, 1.0, 1.0, 0.7]
    params = [
        SamplingParams(temperature=i % 2, top_p=top_p[i % 4], seed=i, max_tokens=8, ignore_eos=True) for i in range(8)
    ]
    with tiny_llm(tiny) as twin:
        expected = tokens(twin.generate(prompts, params))
    with gpu_llm(tiny, double_gpu()) as llm:
        assert tokens(llm.generate(prompts, params)) == expected
        assert graphs_of(llm).counters.eagerly_sampled_steps.total() == 0


def test_sixteen_bits_run_by_the_strict_rules(tiny: Path) -> None:
    """bfloat16, nothing let through: tokens may differ at near-ties, so only their number is compared."""
    prompts = random_forest(5, 6, VOCAB, 40)
    with gpu_llm(tiny, double_gpu(exact=False), dtype="bfloat16") as llm:
        outputs = llm.generate(prompts, GREEDY)
        assert graphs_of(llm).counters.graph_steps > 0
    assert [len(output.outputs[0].token_ids) for output in outputs] == [12] * 6


def test_plans_are_made_rarely(tiny: Path) -> None:
    """One shared prefix, many steps: the shared level is planned once, the leaf when pages are added."""
    prefix = list(range(3, 35))
    prompts = [[*prefix, 40 + i] for i in range(12)]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    double = double_gpu(num_sm=2)  # 12 rows of 2 heads fill it: the leaf does not split
    with gpu_llm(tiny, double, page_size=16, cascade_shared_prefix_len=16) as llm:
        llm.generate(prompts[:1], params)
        before, steps = double.num_plans, graphs_of(llm).counters.graph_steps
        llm.generate(prompts, params)
        eager = sum(graphs_of(llm).counters.eager_steps.values())
        assert graphs_of(llm).counters.graph_steps - steps >= 22
        assert double.num_plans - before <= 2 * eager + 2


def test_the_capture_report_and_progress(tiny: Path) -> None:
    seen: list[tuple[int, int]] = []
    options = EngineOptions(dtype="float32", page_size=4, max_num_seqs=16, max_num_batched_tokens=64)
    _, facts = worker.build_worker(
        options,
        open_checkpoint(tiny),
        platform=double_gpu().platform(),
        on_start=lambda what, done, total: seen.append((done, total)) if what == CAPTURING else None,
    )
    report = facts.capture
    assert report is not None
    assert seen[-1] == (report.num_graphs, report.num_graphs)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    pieces = 2 * (SHAPE["num_hidden_layers"] + 1)
    assert report.num_graphs == 3 + 2 * 6 + 3 * 5 + pieces  # forward by shape; sampling by rows and needs; mixed steps
    assert report.num_later_at_most == 2 * 5
    assert report.usage_bytes == 17 * facts.model.vocab_size * 2
    assert report.num_bytes > 0
    assert report.seconds > 0
    assert report.dropped == ()


@pytest.mark.parametrize(
    "refusal",
    [
        torch.OutOfMemoryError("no memory"),
        RuntimeError("CUDA error: out of memory"),  # of a graph that is instantiated
        CapacityError("split-KV attention needs a workspace of 999 bytes, 128 are set aside"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_graphs_that_do_not_fit_into_memory_are_left_out(
    refusal: Exception, tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine starts, says so, and runs such steps eagerly."""
    double = double_gpu()
    capture, calls = double.stream.capture, []

    def without_memory(work: Any) -> Any:
        calls.append(1)
        if len(calls) <= 6:  # all shapes of 16 rows
            raise refusal
        return capture(work)

    monkeypatch.setattr(double.stream, "capture", without_memory)
    prompts = random_forest(3, 10, VOCAB, 40)
    with tiny_llm(tiny) as twin:
        expected = tokens(twin.generate(prompts, GREEDY))
    with gpu_llm(tiny, double) as llm:
        assert tokens(llm.generate(prompts, GREEDY)) == expected
        report = llm.facts.capture
        assert report is not None
        assert {shape.rows for shape in report.dropped} == {16}
        assert len(report.dropped) == 6
        assert graphs_of(llm).counters.eager_steps["no graph of that shape"] > 0
    assert sum("will run eagerly" in record.message for record in caplog.records) == 6


def test_debug_does_without_graphs(tiny: Path) -> None:
    with gpu_llm(tiny, double_gpu(), debug=True) as llm:
        assert llm._engine.executor.runner.graphs is None
        assert llm.facts.capture is None
        assert len(llm.generate([[5, 6, 7]], GREEDY)[0]["token_ids"]) == 12


def test_logits_of_any_rows_for_validation(tiny: Path) -> None:
    """The runner's `logits` goes the eager way, on the same pool."""
    with gpu_llm(tiny, double_gpu()) as llm, tiny_llm(tiny) as twin:
        ids = list(range(3, 30))
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        ours, theirs = llm.generate([ids], params)[0], twin.generate([ids], params)[0]
        assert ours.prompt_logprobs is not None
        assert theirs.prompt_logprobs is not None
        pairs = list(zip(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True))
        assert pairs
        for mine, other in pairs:
            assert abs(mine.logprob - other.logprob) < 1e-4


@pytest.mark.parametrize("lag", [0, 1])
def test_sequences_that_end_by_a_token_are_resolved_a_step_late(tiny: Path, lag: int) -> None:
    """What was planned beyond their end is dropped, and no token of it is seen."""
    prompts = random_forest(8, 12, VOCAB, 40)
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=30, stop_token_ids=list(range(20, 40)))
    with tiny_llm(tiny) as twin:
        expected = tokens(twin.generate(prompts, params))
    assert len({len(output[0]) for output in expected}) > 2
    with gpu_llm(tiny, double_gpu(), schedule_lag=lag) as llm:
        assert tokens(llm.generate(prompts, params)) == expected
        assert tokens(llm.generate(prompts, params)) == expected  # pages and lanes of the first run are used again


def test_an_aborted_stream_leaves_others_alone(tiny: Path) -> None:
    prompt, others = list(range(3, 40)), random_forest(9, 5, VOCAB, 40)
    with tiny_llm(tiny) as twin:
        expected = tokens(twin.generate(others, GREEDY))
    with gpu_llm(tiny, double_gpu()) as llm:
        stream = llm.stream(prompt, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
        for _ in range(3):
            next(stream)
        stream.close()
        assert tokens(llm.generate(others, GREEDY)) == expected


def test_memory_that_another_process_took_is_a_clear_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(**arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(worker, "PagedKVCache", taken)
    with pytest.raises(CapacityError, match="gpu_memory_utilization"):
        gpu_llm(tiny, double_gpu())

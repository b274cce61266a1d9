"""The tree of lengths that the live view draws, read off plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cascade_llm.bench.plan_tree import decode_step
from cascade_llm.config import CascadeConfig
from cascade_llm.plan import CascadeLevel, CascadePlan, int_column
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.cascade.choice import TokensRead
from cascade_llm.scheduler.sequence import Client, Request
from cascade_llm.server.sharing_view import SharedRun, SharingView, shared_runs
from tests.engine.tiny_llm import save_tiny, tiny_llm


def plan_of(*levels: tuple[list[int], list[int]], page_size: int = 4) -> CascadePlan:
    """A plan of full pages; each level as the rows where segments begin and end, and the pages of each."""
    made, page = [], 0
    for qo_indptr, num_pages in levels:
        indptr = [sum(num_pages[:i]) for i in range(len(num_pages) + 1)]
        pages = range(page, page := page + indptr[-1])
        last = [page_size if count else 0 for count in num_pages]
        made.append(CascadeLevel(int_column(qo_indptr), int_column(indptr), int_column(pages), int_column(last)))
    plan = CascadePlan(tuple(made), page_size)
    plan.check()
    return plan


def test_runs_lie_inside_each_other() -> None:
    plan = plan_of(([0, 4, 5], [3, 0]), ([0, 1, 3, 4, 5], [0, 2, 0, 0]), ([0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5]))
    inner = SharedRun(1, 12, 8, 2, 1, [], [8, 12])
    assert shared_runs(plan) == ([SharedRun(0, 0, 12, 4, 0, [inner], [4, 16])], [20])


def test_a_segment_of_one_sequence_is_its_own_and_rows_are_no_sequences() -> None:
    plan = plan_of(([0, 3, 5], [2, 1]), ([0, 1, 3, 5], [1, 1, 1]))
    assert shared_runs(plan) == ([SharedRun(0, 0, 8, 2, 0, [], [4, 4])], [8])


def test_a_step_of_the_scheduler() -> None:
    prompts = [[*range(32), 100 + i, *range(40, 40 + i)] for i in range(3)] + [[7] * 20]
    config = CascadeConfig(shared_prefix_len=16)
    _, step, _ = decode_step(prompts, TokensRead(), config, page_size=16, max_model_len=128)
    runs, own_lens = shared_runs(step.cascade)
    assert [(run.num_tokens, run.num_sequences, sorted(run.own_lens)) for run in runs] == [(32, 3, [2, 3, 4])]
    assert own_lens == [21]
    assert step.report.kv_tokens_saved == 32 * 2


def test_a_part_of_the_sequences() -> None:
    plan = plan_of(([0, 4, 5], [3, 0]), ([0, 1, 3, 4, 5], [0, 2, 0, 0]), ([0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5]))
    assert shared_runs(plan, {0, 1}) == ([SharedRun(0, 0, 12, 2, 0, [], [4, 16])], [])
    assert shared_runs(plan, {2, 4}) == ([], [32, 20])
    assert shared_runs(plan, ()) == ([], [])


def runs_of(step: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The outermost shared runs of each kind."""
    return [kind["runs"] for kind in step["kinds"]]


def test_every_kind_and_every_pool_is_told_of(tmp_path: Path) -> None:
    """Six sequences of 45 tokens, 40 of which all share; one layer reads all, two the last 24."""
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    folder = save_tiny(tmp_path, "gemma3_text", num_hidden_layers=3, layer_types=layer_types, sliding_window=24)
    prompts = [[*range(3, 43), 50 + i, 60, 61] for i in range(6)]
    with tiny_llm(folder, num_threads=1) as llm:
        view = SharingView(llm)
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        for number, prompt in enumerate(prompts):
            llm.engine.add(Request(request_id=str(number), prompt_token_ids=prompt, params=params, seed=1))
        while llm.stats()["generated_tokens"] < 12:
            llm.step()
        told, stats = view.describe(with_tokens=True), llm.stats()
    step = told["last_step"]
    assert [(kind["window_len"], kind["num_layers"]) for kind in step["kinds"]] == [(None, 1), (24, 2)]
    (whole,), (tail,) = runs_of(step)
    assert (whole["num_tokens"], whole["num_sequences"], whole["token_ids"]) == (40, 6, prompts[0][:40])
    assert tail["num_sequences"] == 6
    assert 0 < tail["num_tokens"] < 24
    assert "token_ids" not in tail
    saved = [run["kv_bytes_saved"] for run in (whole, tail)]
    assert saved[1] * whole["num_tokens"] == 2 * saved[0] * tail["num_tokens"], (
        "two layers read the tail, one the whole"
    )
    assert sum(saved) == step["kv_bytes_saved"]
    pools = told["pools"]
    assert [pool["window_len"] for pool in pools] == [None, 24]
    for pool, prefix in zip(pools, ("", "window_24_"), strict=True):
        for state in ("total", "free", "held", "cached", "session"):
            assert pool[f"{state}_pages"] == stats[f"{prefix}{state}_pages"]
    assert 0 < pools[1]["held_pages"] < pools[0]["held_pages"]


def test_a_tenant_is_told_of_its_own(tmp_path: Path) -> None:
    prompt = list(range(3, 43))
    with tiny_llm(save_tiny(tmp_path, num_hidden_layers=1), cascade_shared_prefix_len=4, num_threads=1) as llm:
        view = SharingView(llm)
        for number, tenant in enumerate("aaab"):
            client = Client(name=str(number), tenant=tenant)
            params = SamplingParams(max_tokens=20, ignore_eos=True)
            llm.engine.add(
                Request(
                    request_id=str(number), prompt_token_ids=[*prompt, number], params=params, seed=1, client=client
                )
            )
        for _ in range(3):
            llm.step()
        own, other, third = (view.describe(tenant, with_tokens=True) for tenant in "abc")
        whole = view.describe(with_tokens=True)
    step = own["last_step"]
    ((run,),) = runs_of(step)
    assert (run["num_sequences"], run["num_tokens"], run["token_ids"]) == (3, 40, prompt)
    assert (step["num_sequences"], step["num_levels"], step["num_groups"]) == (3, 2, 1)
    alone = other["last_step"]
    assert (alone["num_sequences"], alone["num_groups"], runs_of(alone)) == (1, 0, [[]])
    assert len(alone["kinds"][0]["own_lens"]) == 1
    nothing = {"runs": [], "num_more": 0}
    assert third == {"running_sequences": 0, "waiting_sequences": 0, "cache": nothing, "last_step": None}
    for told, num_holders in ((own, 3), (other, 1)):
        (cached,) = told["cache"]["runs"]
        assert (cached["num_tokens"], cached["num_holders"], cached["token_ids"]) == (40, num_holders, prompt)
    assert [run["num_holders"] for run in whole["cache"]["runs"]] == [3, 1]
    for name in ("kv_bytes_read", "kv_bytes_saved"):
        assert step[name] + alone[name] == whole["last_step"][name]

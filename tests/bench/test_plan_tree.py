"""The tree of shared prefixes against a slow twin that compares token ids, and its savings against the plan's."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.bench.plan_tree import PrefixNode, PrefixTree, plan_prompts, plan_tree
from cascade_llm.config import EngineOptions, ModelConfig
from cascade_llm.engine.cost_setup import calibration_key, calibration_path
from cascade_llm.errors import ConfigError, PromptError
from cascade_llm.scheduler.cascade.calibration import Calibration, write_calibration
from cascade_llm.scheduler.cascade.cost_model import AttentionShape, CostModel, PlanWork
from cascade_llm.scheduler.cascade.device_costs import DEVICE_COSTS
from tests.native_code import cache_without_measurements

MODEL = ModelConfig(
    architecture="llama",
    vocab_size=100,
    hidden_size=64,
    intermediate_size=64,
    num_layers=3,
    num_qo_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
)
PAGE = 4


def tree_of(prompts: list[list[int]], costs: str | None = None, **options: object) -> PrefixTree:
    merged = {"device": "cpu", "dtype": "float32", "page_size": PAGE, **options}
    return plan_tree(prompts, MODEL, EngineOptions(**merged), costs=costs)


def shared_runs(prompts: list[list[int]]) -> set[tuple[int, frozenset[int]]]:
    """(end, prompts) of every run of full pages that a set of prompts shares, from each pair's common prefix."""
    runs = set()
    for a, b in combinations(prompts, 2):
        length = 0
        while length < min(len(a), len(b)) and a[length] == b[length]:
            length += 1
        if end := length // PAGE * PAGE:
            runs.add((end, frozenset(index for index, prompt in enumerate(prompts) if prompt[:end] == a[:end])))
    return runs


def prompts_below(node: PrefixNode) -> frozenset[int]:
    return frozenset(prompt for below in node.walk() for prompt in below.prompts)


@st.composite
def forests(draw: st.DrawFn) -> list[list[int]]:
    """Prompts that begin like earlier ones. None ends with a page: its sharing would depend on who came first."""
    prompts: list[list[int]] = [draw(st.lists(st.integers(1, 99), min_size=9, max_size=30))]
    for _ in range(draw(st.integers(1, 6))):
        parent = draw(st.sampled_from(prompts))
        kept = parent[: draw(st.integers(0, len(parent)))]
        prompts.append([*kept, *draw(st.lists(st.integers(1, 99), min_size=1, max_size=12))])
    return [prompt if len(prompt) % PAGE else [*prompt, 1] for prompt in prompts]


@given(forests(), st.sampled_from([None, 1, 8]), st.integers(1, 4))
def test_the_tree_is_what_the_token_ids_say(
    prompts: list[list[int]], shared_prefix_len: int | None, max_levels: int
) -> None:
    tree = tree_of(prompts, cascade_shared_prefix_len=shared_prefix_len, cascade_max_levels=max_levels)
    nodes = list(tree.root.walk())[1:]
    assert {(node.end_len, prompts_below(node)) for node in nodes} == shared_runs(prompts)
    for node in (tree.root, *nodes):
        assert len(prompts_below(node)) == node.num_sequences
        assert all(child.start_len == node.end_len for child in node.children)
    assert prompts_below(tree.root) == frozenset(range(len(prompts)))


@given(forests(), st.sampled_from([None, 1, 8]), st.integers(1, 4))
def test_the_nodes_savings_are_the_plan_s(
    prompts: list[list[int]], shared_prefix_len: int | None, max_levels: int
) -> None:
    tree = tree_of(prompts, cascade_shared_prefix_len=shared_prefix_len, cascade_max_levels=max_levels)
    given_levels = [node for node in tree.root.walk() if node.level is not None]
    assert sum(node.kv_tokens_saved for node in given_levels) == tree.report.kv_tokens_saved
    assert len(given_levels) == tree.report.num_groups
    assert all(node.level < tree.report.num_levels - 1 for node in given_levels if node.level is not None)
    one_level = sum(len(prompt) + 1 for prompt in prompts)
    assert tree.report.kv_tokens_one_level == one_level


def test_two_levels_of_a_known_tree() -> None:
    shared = list(range(1, 41))
    left, right = [*shared, *[50] * 40], [*shared, *[60] * 40]
    prompts = [[*left, 1], [*left, 2], [*right, 3], [*right, 4], [*right, 5]]
    tree = tree_of(prompts, cascade_shared_prefix_len=4)
    (root,) = tree.root.children
    assert (root.start_len, root.num_tokens, root.num_sequences, root.level) == (0, 40, 5, 0)
    a, b = sorted(root.children, key=lambda node: node.num_sequences)
    assert (a.num_sequences, a.num_tokens, a.level, a.prompts) == (2, 40, 1, (0, 1))
    assert (b.num_sequences, b.num_tokens, b.level, b.prompts) == (3, 40, 1, (2, 3, 4))
    assert tree.report.kv_tokens_saved == 40 * 4 + 40 * 1 + 40 * 2
    record = tree.as_dict()
    assert record["kv_bytes_saved"] == tree.report.kv_tokens_saved * 2 * 3 * 2 * 16 * 4
    assert record["tree"]["children"][0]["num_tokens"] == 40
    folded = tree_of(prompts, cascade_shared_prefix_len=4, cascade_max_levels=2)
    levels = {node.end_len: (node.level, node.segment_len) for node in folded.root.walk()}
    assert levels in ({0: (None, 0), 40: (None, 0), 80: (0, 80)}, {0: (None, 0), 40: (0, 40), 80: (None, 0)})


def test_without_sharing_there_is_a_reason() -> None:
    alone = tree_of([list(range(1, 50))])
    assert alone.root.children == ()
    assert alone.report.reason == "one sequence"
    off = tree_of([[1] * 50, [1] * 50], enable_cascade_attention=False)
    assert off.root.children[0].level is None
    assert off.report.reason == "cascade attention is off"


def test_another_device_s_costs() -> None:
    prompts = [[*range(1, 90), 99 - i] for i in range(4)]
    here, there = tree_of(prompts), tree_of(prompts, costs="h200")
    assert here.costs.startswith("table entry 'cpu'; ")
    assert there.costs == "table entry 'h200', as asked"
    assert there.attention_one_level_s != here.attention_one_level_s
    with pytest.raises(ConfigError, match="did you mean 'h200'"):
        plan_tree(prompts, MODEL, EngineOptions(device="cpu"), costs="h20")


def test_predicted_times_are_the_cost_model_s() -> None:
    prompts = [[*[7] * 40, 50 + i, 60 + i] for i in range(4)]
    shape = AttentionShape(num_qo_heads=4, num_kv_heads=2, head_dim=16, kv_dtype_bytes=4)
    model = CostModel(shape, DEVICE_COSTS["h200"])
    tree = tree_of(prompts, costs="h200", cascade_shared_prefix_len=4)
    assert tree.report.num_groups == 1
    assert tree.attention_s == 3 * model.plan_s(PlanWork([[(40, 4)]], [(3, 1)] * 4))
    one_level = PlanWork([], [(43, 1)] * 4, reread_tokens=3 * 40, common_tokens=40)
    assert tree.attention_one_level_s == 3 * model.plan_s(one_level)
    off = tree_of(prompts, costs="h200", enable_cascade_attention=False)
    assert off.attention_s == off.attention_one_level_s == tree.attention_one_level_s
    record = tree.as_dict()
    assert record["predicted_attention_s"] == tree.attention_s
    assert record["predicted_attention_one_level_s"] == tree.attention_one_level_s


def test_a_calibration_of_this_machine_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASCADE_LLM_CACHE", cache_without_measurements(tmp_path))
    prompts = [[*[7] * 40, 50 + i] for i in range(4)]
    options = {"attention_backend": "torch", "num_threads": 1}
    spec = AttentionSpec(
        num_layers=3,
        num_qo_heads=4,
        num_kv_heads=2,
        head_dim=16,
        sm_scale=0.25,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    calibration = Calibration(
        key=calibration_key(spec, "torch", 1),
        costs=replace(DEVICE_COSTS["cpu"], step_s=1.0),
        median_error=0.1,
        worst_error=0.2,
        num_measured=9,
        measured_at="now",
    )
    write_calibration(calibration_path(), calibration)
    assert tree_of(prompts, **options).costs == "measured here at now, median error 10%"
    assert tree_of(prompts, **options).attention_s > 3
    assert tree_of(prompts, attention_backend="torch", num_threads=2).attention_s < 3


def test_bad_prompts_are_named_together() -> None:
    with pytest.raises(PromptError, match=r"2 of 3 prompts cannot be served: prompt 0: .*empty.*; prompt 2: .*shorten"):
        plan_prompts("smollm2", ["", "fine", "word " * 50], EngineOptions(max_model_len=32))
    with pytest.raises(PromptError, match="no prompt"):
        plan_prompts("smollm2", [], EngineOptions())

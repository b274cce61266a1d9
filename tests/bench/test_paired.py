"""Two engines in short turns: pairs are of the same work, equal plans are told, nothing is left running."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cascade_llm.bench.paired import MOST_PAIRS, PairedDecode, measure_paired
from cascade_llm.bench.reading import Spread
from cascade_llm.bench.setup import BenchModel, open_model, options_for
from cascade_llm.bench.sides import EngineSide
from cascade_llm.bench.throughput import compare
from cascade_llm.bench.workloads import ChatWorkload, RandomWorkload, SharedPrefixWorkload, Workload
from tests.engine.tiny_llm import tiny_llm

OPTIONS = {"dtype": "float32", "page_size": 4, "cascade_shared_prefix_len": 8}
SHARED = SharedPrefixWorkload(prefix_len=40, num_requests=4, suffix_len=4, output_len=17)
CHAT = ChatWorkload(conversations=2, turns=2, system_len=16, user_len=4, output_len=9)


@pytest.fixture(scope="module")
def bench(tiny: Path) -> BenchModel:
    return open_model(str(tiny), OPTIONS)


@pytest.fixture(scope="module")
def sides(tiny: Path, bench: BenchModel) -> Iterator[tuple[EngineSide, EngineSide]]:
    """On and off, with room for what the tests run."""
    loads = [bench.load(SHARED), bench.load(SharedPrefixWorkload(prefix_len=0, num_requests=4, output_len=150))]
    options = options_for(bench, *loads)
    on = EngineSide("on", tiny_llm(tiny, **options), loads[0])
    off = EngineSide("off", tiny_llm(tiny, **options, enable_cascade_attention=False), loads[0])
    yield on, off
    on.close()
    off.close()


def paired(sides: tuple[EngineSide, EngineSide], bench: BenchModel, workload: Workload) -> PairedDecode | None:
    for side in sides:
        side.use_load(bench.load(workload))
    measured = measure_paired(*sides)
    for side in sides:
        assert side.llm.stats()["running_sequences"] == 0
        assert side.llm.stats()["held_pages"] == 0
    return measured


@pytest.mark.parametrize(
    ("workload", "pairs", "shared_steps"),
    [
        (SHARED, 8, 16),
        (SharedPrefixWorkload(prefix_len=0, num_requests=1, suffix_len=8, output_len=33), 8, 0),
        (SharedPrefixWorkload(prefix_len=0, num_requests=2, suffix_len=8, output_len=150), MOST_PAIRS, 0),
        (CHAT, 8, 16),
    ],
    ids=["shared", "one", "long", "chat"],
)
def test_turns_are_as_many_as_the_load_has_steps_for(
    sides: tuple[EngineSide, EngineSide], bench: BenchModel, workload: Workload, pairs: int, shared_steps: int
) -> None:
    measured = paired(sides, bench, workload)
    assert measured is not None
    assert len(measured.step_s) == len(measured.other_step_s) == pairs
    assert min(*measured.step_s, *measured.other_step_s) > 0
    assert measured.num_shared_steps == shared_steps
    assert measured.has_equal_plans == (shared_steps == 0)


def test_a_load_too_short_for_two_pairs_has_none(sides: tuple[EngineSide, EngineSide], bench: BenchModel) -> None:
    assert paired(sides, bench, SharedPrefixWorkload(prefix_len=8, num_requests=2, output_len=4)) is None
    assert paired(sides, bench, RandomWorkload(num_requests=2, min_len=1, max_len=1)) is None


def test_ratios_are_of_pairs_and_have_quartiles() -> None:
    measured = PairedDecode([1.0, 2.0, 1.0, 1.0, 10.0], [1.0, 4.0, 3.0, 4.0, 50.0], num_shared_steps=3)
    assert measured.ratio == Spread(median=3.0, low=2.0, high=4.0)
    assert not measured.has_equal_plans


@pytest.mark.slow
def test_a_report_has_the_paired_ratio_and_says_where_plans_were_equal(bench: BenchModel) -> None:
    report = compare(bench, bench.load(SHARED), repeat=1, split_steps=False)
    assert report.ratio("cascade off", "decode") == report.paired["cascade off"].ratio
    assert [report.has_equal_plans("cascade off", name) for name in report.compared("cascade off")] == [False] * 3
    alone = SharedPrefixWorkload(prefix_len=0, num_requests=1, suffix_len=8, output_len=17)
    printed = compare(bench, bench.load(alone), repeat=1, split_steps=False).as_dict()
    assert set(printed["equal_plans"]["cascade off"]) >= {"cold", "warm", "decode"}
    assert printed["paired"]["cascade off"]["pairs"] == 8
    chat = compare(bench, bench.load(CHAT), repeat=1, split_steps=False)
    assert chat.compared("cascade off") == ["cold", "warm", "decode"], "conversations have no other decode"

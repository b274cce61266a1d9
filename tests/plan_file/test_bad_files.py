"""A plan file that is broken, foreign or edited: an error that names file, line and cure, and no plan comes out."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cascade_llm.config import ModelConfig, SchedulerConfig
from cascade_llm.errors import PlanError
from cascade_llm.plan import StepPlan
from cascade_llm.plan_file.reader import PlanFileReader
from tests.plan_file.recordings import HEADER, edit, header, read, write
from tests.scheduler.generated import generated_steps

NUM_STEPS = 12
CONFIG = SchedulerConfig(page_size=4, total_pages=400, max_model_len=64, max_num_seqs=16, max_num_batched_tokens=64)


@pytest.fixture(scope="module")
def plans() -> list[StepPlan]:
    return [plan for plan, _ in generated_steps(5, NUM_STEPS, config=CONFIG, lag=0)]


@pytest.fixture
def recording(plans: list[StepPlan], tmp_path: Path) -> Path:
    return write(tmp_path / "plans.gz", plans)


def line_of(plans: list[StepPlan], wanted: Callable[[StepPlan], bool]) -> int:
    """The line of the first plan like that: the header is line 1, a result follows each plan."""
    return 2 + 2 * next(i for i, plan in enumerate(plans) if wanted(plan))


def first_column(step: dict[str, Any], name: str) -> list[int]:
    """The first level's column that is written out."""
    levels = [level for cascade in step["cascades"] for level in cascade["levels"] if isinstance(level, dict)]
    found: list[int] = next(level[name] for level in reversed(levels) if isinstance(level[name], list))
    return found


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nothing\.gz cannot be read \(No such file.*give a file of record_plans"):
        PlanFileReader(tmp_path / "nothing.gz")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        PlanFileReader(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"line 1: the file is empty: record one with LLM"),
        (b"a text file\n", r"line 1: Not a gzipped file.*a plan file is gzip-compressed"),
        (gzip.compress(b"a text file\n"), r"line 1: not JSON"),
        (gzip.compress(b"[1, 2]\n"), r"line 1: it holds a JSON list"),
        (gzip.compress(b'{"format": "something else"}\n'), r"line 1: this is no plan file"),
        (gzip.compress(b'{"format": "cascade-llm step'), r"line 1: the last line is not complete: record it again"),
        (gzip.compress(b'{"a": 1}\n' * 99)[:-9], r"line 1: "),
    ],
)
def test_a_file_of_another_kind(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "plans.gz"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=rf"plans\.gz, {words}"):
        PlanFileReader(path, allow_truncated=True)


def test_another_version_says_which_one_to_use(recording: Path) -> None:
    edit(recording, 1, lambda line: line.update(version=2, cascade_llm="0.9.0"))
    with pytest.raises(PlanError, match=r"line 1: format 2 was written by cascade-llm 0\.9\.0.*replay it with"):
        PlanFileReader(recording)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("page_size", 0, "page_size is 0"),
        ("total_pages", "many", "total_pages is 'many'"),
        ("max_num_seqs", True, "max_num_seqs is True"),
        ("num_kv_heads", 3, "4 query heads cannot be shared out over 3"),
        ("dtype", "int8", "dtype is 'int8'"),
        ("kv_cache_dtype", "int8", "kv_cache_dtype is 'int8'"),
        ("sm_scale", -1.0, "sm_scale is -1.0"),
        ("sm_scale", "0.1", "sm_scale is '0.1'"),
        ("token_ids", 1, "token_ids is 1"),
    ],
)
def test_a_header_that_makes_no_sense(recording: Path, name: str, value: Any, words: str) -> None:
    edit(recording, 1, lambda line: line.update({name: value}))
    with pytest.raises(PlanError, match=f"line 1: .*{words}"):
        PlanFileReader(recording)


def test_a_header_that_lacks_fields(recording: Path) -> None:
    edit(recording, 1, lambda line: line.pop("head_dim"))
    with pytest.raises(PlanError, match="line 1: the header lacks head_dim"):
        PlanFileReader(recording)


def test_another_model_is_named_with_what_differs() -> None:
    shape = {name: HEADER[name] for name in ("num_layers", "num_qo_heads", "num_kv_heads", "head_dim", "vocab_size")}
    rest: dict[str, Any] = {"architecture": "llama", "hidden_size": 32, "intermediate_size": 64}
    same = ModelConfig(**shape, **rest, max_position_embeddings=128)
    header().check_model("ours", same)
    other = ModelConfig(**{**shape, "num_layers": 5, "head_dim": 16}, **rest, max_position_embeddings=128)
    with pytest.raises(PlanError, match=r"tiny, which has num_layers 2 \(here 5\), head_dim 8 \(here 16\), not with"):
        header().check_model("ours", other)


def test_a_truncated_file_names_the_line_and_is_read_up_to_there_on_request(
    recording: Path, plans: list[StepPlan], tmp_path: Path
) -> None:
    whole = recording.read_bytes()
    cut = tmp_path / "cut.gz"
    for size in sorted(random.Random(0).sample(range(len(whole) // 2, len(whole)), 20)):
        cut.write_bytes(whole[:size])
        with pytest.raises(PlanError, match=r"cut\.gz, line \d+: .*allow a truncated file to use the steps before"):
            read(cut)
        with PlanFileReader(cut, allow_truncated=True) as reader:
            steps = [step.plan.step_id for step in reader]
            assert reader.truncated_at is not None
        assert steps == [plan.step_id for plan in plans][: len(steps)]
        assert len(steps) >= NUM_STEPS // 4


def test_a_whole_file_is_not_called_truncated(recording: Path) -> None:
    with PlanFileReader(recording, allow_truncated=True) as reader:
        assert len(list(reader)) == NUM_STEPS
        assert reader.truncated_at is None


def test_damaged_bytes_are_an_error_or_harmless(recording: Path, plans: list[StepPlan]) -> None:
    whole = recording.read_bytes()
    rng = random.Random(1)
    num_errors = 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        recording.write_bytes(bytes(damaged))
        try:
            steps = read(recording)
        except PlanError as error:
            num_errors += "plans.gz, line" in str(error)
        else:  # a bit of gzip's own header that means nothing
            assert [step.plan.step_id for step in steps] == [plan.step_id for plan in plans]
    assert num_errors > 50


EDITS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    (
        "partition",
        lambda s: first_column(s, "qo_indptr").__setitem__(-1, 10_000),
        "rows|segments|differ|decrease|causality",
    ),
    (
        "page outside the pool",
        lambda s: first_column(s, "kv_page_indices").__setitem__(-1, 400),
        "page 400, the pool|outside its place",
    ),
    ("negative page", lambda s: first_column(s, "kv_page_indices").__setitem__(0, -1), "negative page id"),
    ("int too large", lambda s: first_column(s, "kv_page_indices").__setitem__(0, 2**40), "wrong form"),
    ("a float", lambda s: first_column(s, "kv_page_indices").__setitem__(0, 1.5), "wrong form"),
    ("a text", lambda s: s.update(slots="abc"), "not a list of integers"),
    ("indptr falls", lambda s: first_column(s, "kv_page_indptr").__setitem__(0, 3), "must start with 0"),
    ("last page too full", lambda s: first_column(s, "kv_last_page_len").__setitem__(0, 9), "does not fit its pages"),
    ("level of no step", lambda s: s["cascades"][0]["levels"].__setitem__(0, 7), "level 7 of the step before"),
    ("no levels", lambda s: s["cascades"][0].update(levels=[]), "at least the leaf level"),
    ("no cascades", lambda s: s.update(cascades=[]), "first cascade of a step must be there"),
    ("page size", lambda s: s["cascades"][0].update(page_size=8), "fit|page_size|outside"),
    ("slot elsewhere", lambda s: s["slots"].__setitem__(0, 1599), "writes slot|two rows"),
    ("slot twice", lambda s: s["slots"].__setitem__(0, s["slots"][1]), "two rows write one slot"),
    ("position", lambda s: s["positions"].__setitem__(0, 63), "position"),
    ("sample row", lambda s: s["sample_rows"].__setitem__(0, 999), "a row outside the step"),
    ("lane", lambda s: s["lane_starts"][0].update(lane=16), "enters lane 16, there are 16"),
    ("epoch", lambda s: s["lane_starts"][0].update(epoch=99), "the last to enter began another"),
    ("token id", lambda s: s["token_ids"].__setitem__(0, 1000), "token id 1000, the vocabulary has 1000"),
    ("prompt id", lambda s: s["lane_starts"][0]["prompt"].__setitem__(0, -1), "prompt_token_ids has the token id -1"),
    ("no prompt", lambda s: s["lane_starts"][0].update(prompt=[]), "has no prompt"),
    ("parameter", lambda s: s["lane_starts"][0]["params"].update(top_p=7), "sampling parameters of a lane: top_p"),
    ("unknown", lambda s: s["lane_starts"][0]["params"].update(hello=7), "unknown sampling parameter 'hello'"),
    ("copy", lambda s: s.update(page_copies=[[0, 400, 0, 0]]), "copies page 0 to 400"),
    ("copy of three", lambda s: s.update(page_copies=[[0, 1, 2]]), "wrong form"),
    ("field missing", lambda s: s.pop("slots"), "the field 'slots' is missing"),
    ("report", lambda s: s["report"].update(hello=1), "wrong form"),
    ("step", lambda s: s.update(step="first"), "'first' is no integer"),
]


@pytest.mark.parametrize(("change", "words"), [case[1:] for case in EDITS], ids=[case[0] for case in EDITS])
def test_an_edited_plan_is_refused_by_line(
    recording: Path, plans: list[StepPlan], change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    line = line_of(plans, lambda plan: bool(plan.lane_starts) and plan.num_rows > 1 and len(plan.sample_rows) > 0)
    edit(recording, line, change)
    with pytest.raises(PlanError, match=rf"plans\.gz, line {line}: .*({words}).*: .*record it again"):
        read(recording)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(result=99), "a result of step 99, which does not wait for one"),
        (lambda r: r["token_ids"].append(1), "must have"),
        (lambda r: r.pop("token_ids"), "must have"),
        (lambda r: r["token_ids"].__setitem__(0, 1000), "token id 1000"),
        (lambda r: r["token_ids"].__setitem__(0, "a"), "token id 'a'"),
    ],
)
def test_an_edited_result_is_refused_by_line(
    recording: Path, plans: list[StepPlan], change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    line = line_of(plans, lambda plan: len(plan.sample_rows) > 0) + 1
    edit(recording, line, change)
    with pytest.raises(PlanError, match=rf"plans\.gz, line {line}: .*{words}"):
        read(recording)


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"total_pages": 3}, "the pool has 3 pages"),
        ({"max_num_seqs": 1}, "there are 1"),
        ({"max_model_len": 4}, "beyond max_model_len 4"),
        ({"vocab_size": 2}, "the vocabulary has 2"),
        ({"page_size": 8}, "its page_size is 4, the header's 8"),
    ],
)
def test_a_plan_beyond_the_header_is_refused(recording: Path, limit: dict[str, int], words: str) -> None:
    edit(recording, 1, lambda line: line.update(limit))
    with pytest.raises(PlanError, match=rf"plans\.gz, line \d+: .*{words}"):
        read(recording)


def test_a_step_left_out_is_noticed_where_it_matters(recording: Path) -> None:
    """Without the first step the lanes of the second were never entered."""
    lines = gzip.decompress(recording.read_bytes()).splitlines(keepends=True)
    recording.write_bytes(gzip.compress(b"".join([lines[0], *lines[3:]])))
    with pytest.raises(PlanError, match=r"line 2: "):
        read(recording)

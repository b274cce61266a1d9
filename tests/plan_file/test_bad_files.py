"""A plan file that is broken, foreign or edited: an error that names file, frame and cure, and no plan comes out."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cascade_llm import plan_file
from cascade_llm.config import ModelConfig, SchedulerConfig
from cascade_llm.errors import PlanError
from cascade_llm.plan import CascadeLevel, PageCopy, StepPlan, Tier, int_column
from cascade_llm.plan_file import FRAME, MAGIC, PlanFileReader
from tests.plan_file.recordings import HEADER, edit, frames, header, messages, read, write
from tests.scheduler.generated import generated_steps

NUM_STEPS = 12
CONFIG = SchedulerConfig(page_size=4, total_pages=400, max_model_len=64, max_num_seqs=16, max_num_batched_tokens=64)


@pytest.fixture(scope="module")
def plans() -> list[StepPlan]:
    return [plan for plan, _ in generated_steps(5, NUM_STEPS, config=CONFIG, lag=0)]


@pytest.fixture
def recording(plans: list[StepPlan], tmp_path: Path) -> Path:
    return write(tmp_path / "plans.gz", plans)


def frame_of(plans: list[StepPlan], wanted: Callable[[StepPlan], bool]) -> int:
    """The frame of the first plan like that: the header is frame 1, a result follows each plan."""
    return 2 + 2 * next(i for i, plan in enumerate(plans) if wanted(plan))


def edited(values: Any, index: int, value: int) -> Any:
    changed = list(values)
    changed[index] = value
    return int_column(changed)


def column(name: str, index: int, value: int) -> Callable[[StepPlan], StepPlan]:
    """One entry of a column of the step is another."""
    return lambda step: replace(step, **{name: edited(getattr(step, name), index, value)})


def leaf(name: str, index: int, value: int) -> Callable[[StepPlan], StepPlan]:
    """The same for a column of the leaf."""

    def change(step: StepPlan) -> StepPlan:
        level = step.cascade.leaf
        level = replace(level, **{name: edited(getattr(level, name), index, value)})
        return with_levels(step, *step.cascade.shared_levels, level)

    return change


def with_levels(step: StepPlan, *levels: CascadeLevel) -> StepPlan:
    return replace(step, cascades=(replace(step.cascade, levels=levels),))


def lane(**changes: Any) -> Callable[[StepPlan], StepPlan]:
    """The first sequence that enters a lane is another."""
    return lambda step: replace(step, lane_starts=(replace(step.lane_starts[0], **changes), *step.lane_starts[1:]))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nothing\.gz cannot be read \(No such file.*give a file of record_plans"):
        PlanFileReader(tmp_path / "nothing.gz")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        PlanFileReader(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"the file is empty: record one with LLM"),
        (b"a text file\n", r"this is no plan file: record one with LLM"),
        (gzip.compress(b"a text file\n", mtime=0), r"this is no plan file"),
        (gzip.compress(b"a text file\n" * 99, mtime=0)[:-9], r"this is no plan file"),
        (frames(b"a text"), r"the header is not JSON"),
        (frames(b"[1, 2]"), r"this is no plan file"),
        (frames(b'{"format": "something else"}'), r"this is no plan file"),
        (frames(b"{}", end=False)[:-1], r"the file breaks off here, as after a crash: record it again"),
        (MAGIC + b"123", r"the file breaks off here, as after a crash: record it again"),
        (frames(), r"the header is not JSON"),
        (MAGIC + FRAME.pack(1, 2**32 - 1) + b"1", r"a frame of 4294967295 bytes, the most are"),
        (MAGIC + FRAME.pack(2, 9) + b"12", r"the frame cannot be decompressed"),
        (
            MAGIC + FRAME.pack(len(zlib.compress(b"{}")), 1) + zlib.compress(b"{}"),
            r"the frame does not hold the 1 bytes",
        ),
    ],
)
def test_a_file_of_another_kind(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "plans.gz"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=rf"plans\.gz, frame 1: {words}"):
        PlanFileReader(path, allow_truncated=True)


def test_a_small_file_cannot_become_a_large_message(recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame that says a small size and unpacks to more is left as soon as it is found out."""
    monkeypatch.setattr(plan_file, "MAX_FRAME_BYTES", 1 << 20)
    bomb = frames(*messages(recording), bytes(1 << 24), end=False)
    size = FRAME.pack(0, 1 << 24)[4:]
    assert bomb.count(size) == 1
    for num_bytes, words in ((10, "does not hold the 10 bytes"), (1 << 24, "a frame of 16777216 bytes")):
        recording.write_bytes(bomb.replace(size, FRAME.pack(0, num_bytes)[4:]))
        with pytest.raises(PlanError, match=words):
            read(recording)


def test_a_file_of_the_format_before_says_what_wrote_it(tmp_path: Path) -> None:
    line = {"format": "cascade-llm step plans", "version": 1, **HEADER}
    (tmp_path / "plans.gz").write_bytes(gzip.compress(json.dumps(line).encode() + b"\n{}\n"))
    with pytest.raises(PlanError, match=r"format 1 was written by cascade-llm 0\.1\.0, this one reads format 3"):
        PlanFileReader(tmp_path / "plans.gz")


def test_what_follows_the_end(recording: Path) -> None:
    recording.write_bytes(recording.read_bytes() + b"x")
    with pytest.raises(PlanError, match="something follows the end of the recording"):
        read(recording)


def test_another_version_says_which_one_to_use(recording: Path) -> None:
    edit(recording, 1, lambda line: line.update(version=9, cascade_llm="0.9.0"))
    with pytest.raises(PlanError, match=r"frame 1: format 9 was written by cascade-llm 0\.9\.0.*replay it with"):
        PlanFileReader(recording)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("page_size", 0, "page_size is 0"),
        ("pool_pages", "many", "pool_pages is 'many'"),
        ("pool_pages", [], r"pool_pages is \[\]"),
        ("pool_pages", [9, 10], r"pool_pages is \[9, 10\].*none larger than the first"),
        ("pool_pages", [True], r"pool_pages is \[True\]"),
        ("max_num_seqs", True, "max_num_seqs is True"),
        ("num_kv_heads", 3, "4 query heads cannot be shared out over 3"),
        ("dtype", "int8", "dtype is 'int8'"),
        ("kv_cache_dtype", "int4", "kv_cache_dtype is 'int4'"),
        ("sm_scale", -1.0, "sm_scale is -1.0"),
        ("sm_scale", "0.1", "sm_scale is '0.1'"),
        ("token_ids", 1, "token_ids is 1"),
    ],
)
def test_a_header_that_makes_no_sense(recording: Path, name: str, value: Any, words: str) -> None:
    edit(recording, 1, lambda line: line.update({name: value}))
    with pytest.raises(PlanError, match=f"frame 1: .*{words}"):
        PlanFileReader(recording)


def test_a_header_that_lacks_fields(recording: Path) -> None:
    edit(recording, 1, lambda line: line.pop("head_dim"))
    with pytest.raises(PlanError, match="frame 1: the header lacks head_dim"):
        PlanFileReader(recording)


def test_another_model_is_named_with_what_differs() -> None:
    shape = {name: HEADER[name] for name in ("num_layers", "num_qo_heads", "num_kv_heads", "head_dim", "vocab_size")}
    rest: dict[str, Any] = {"architecture": "llama", "hidden_size": 32, "intermediate_size": 64}
    same = ModelConfig(**shape, **rest, max_position_embeddings=128)
    header().check_model("ours", same)
    other = ModelConfig(**{**shape, "num_layers": 5, "head_dim": 16}, **rest, max_position_embeddings=128)
    with pytest.raises(PlanError, match=r"tiny, which has num_layers 2 \(here 5\), head_dim 8 \(here 16\), not with"):
        header().check_model("ours", other)


def test_a_truncated_file_names_the_frame_and_is_read_up_to_there_on_request(
    recording: Path, plans: list[StepPlan], tmp_path: Path
) -> None:
    whole = recording.read_bytes()
    cut = tmp_path / "cut.gz"
    for size in sorted(random.Random(0).sample(range(len(whole) // 2, len(whole)), 20)):
        cut.write_bytes(whole[:size])
        with pytest.raises(PlanError, match=r"cut\.gz, frame \d+: .*allow a truncated file to use the steps before"):
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
            num_errors += "plans.gz, frame" in str(error)
        else:  # a bit that fills a byte up, where the stream was flushed
            assert [step.plan.step_id for step in steps] == [plan.step_id for plan in plans]
    assert num_errors > 50


EDITS: list[tuple[str, Callable[[StepPlan], StepPlan], str]] = [
    ("partition", leaf("qo_indptr", -1, 10_000), "rows|segments|differ|decrease|causality"),
    ("page outside the pool", leaf("kv_page_indices", -1, 400), "page 400, the pool|outside its place"),
    ("negative page", leaf("kv_page_indices", 0, -1), "negative page id"),
    ("indptr falls", leaf("kv_page_indptr", 0, 3), "must start with 0"),
    ("last page too full", leaf("kv_last_page_len", 0, 9), "does not fit its pages"),
    ("no levels", with_levels, "at least the leaf level"),
    ("no cascades", lambda s: replace(s, cascades=()), "a step needs the cascade of an attention kind"),
    ("page size", lambda s: replace(s, cascades=(replace(s.cascade, page_size=8),)), "fit|page_size|outside"),
    ("slot elsewhere", column("slots", 0, 1599), "writes slot|two rows"),
    ("slot twice", lambda s: column("slots", 0, s.slots[1])(s), "two rows write one slot"),
    ("position", column("positions", 0, 63), "position"),
    ("sample row", column("sample_rows", 0, 999), "a row outside the step"),
    ("lane", lane(lane=16), "enters lane 16, there are 16"),
    ("epoch", lane(epoch=99), "the last to enter began another"),
    ("token id", column("token_ids", 0, 1000), "token id 1000, the vocabulary has 1000"),
    ("prompt id", lane(prompt_token_ids=[-1]), "prompt_token_ids has the token id -1"),
    ("no prompt", lane(prompt_token_ids=[]), "has no prompt"),
    ("copy", lambda s: replace(s, page_copies=(PageCopy(0, 400),)), "copies page 0 to 400"),
    (
        "copy from elsewhere",
        lambda s: replace(s, page_copies=(PageCopy(0, 400, target_tier=Tier.HOST), PageCopy(-1, 4, Tier.HOST))),
        "copies page -1 to 4",
    ),
    ("layers", lambda s: replace(s, layer_kinds=(0, 0, 0)), "3 layer_kinds, the model has 2 layers"),
    ("mask", lambda s: replace(s, token_bitmasks=(int_column([1]),)), "token_bitmasks of 1 words, the vocabulary"),
]


@pytest.mark.parametrize(("change", "words"), [case[1:] for case in EDITS], ids=[case[0] for case in EDITS])
def test_an_edited_plan_is_refused_by_frame(
    recording: Path, plans: list[StepPlan], change: Callable[[StepPlan], StepPlan], words: str
) -> None:
    frame = frame_of(plans, lambda plan: bool(plan.lane_starts) and plan.num_rows > 1 and len(plan.sample_rows) > 0)
    edit(recording, frame, change)
    with pytest.raises(PlanError, match=rf"plans\.gz, frame {frame}: .*({words}).*: .*record it again"):
        read(recording)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: replace(r, step_id=99), "a result of step 99, which does not wait for one"),
        (lambda r: replace(r, token_ids=[*r.token_ids, 1]), "token_ids for a plan that asks for"),
        (lambda r: replace(r, token_ids=[]), "token_ids for a plan that asks for"),
        (lambda r: replace(r, token_ids=[1000, *r.token_ids[1:]]), "token id 1000"),
        (lambda r: replace(r, failed_samples=frozenset({99})), "failed_samples"),
    ],
)
def test_an_edited_result_is_refused_by_frame(
    recording: Path, plans: list[StepPlan], change: Callable[[Any], Any], words: str
) -> None:
    frame = frame_of(plans, lambda plan: len(plan.sample_rows) > 0) + 1
    edit(recording, frame, change)
    with pytest.raises(PlanError, match=rf"plans\.gz, frame {frame}: .*{words}"):
        read(recording)


def test_a_result_twice(recording: Path) -> None:
    first, plan, result, *others = messages(recording)
    recording.write_bytes(frames(first, plan, result, result, *others))
    with pytest.raises(PlanError, match=r"frame 4: a result of step 0, which does not wait for one"):
        read(recording)


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"pool_pages": [3]}, "the pool has 3 pages"),
        ({"pool_pages": [400, 8]}, "it writes to 1 pools, there were 2"),
        ({"max_num_seqs": 1}, "there are 1"),
        ({"max_model_len": 4}, "beyond max_model_len 4"),
        ({"vocab_size": 2}, "the vocabulary has 2"),
        ({"page_size": 8}, "its page_size is 4, the header's 8"),
    ],
)
def test_a_plan_beyond_the_header_is_refused(recording: Path, limit: dict[str, Any], words: str) -> None:
    edit(recording, 1, lambda line: line.update(limit))
    with pytest.raises(PlanError, match=rf"plans\.gz, frame \d+: .*{words}"):
        read(recording)


def test_a_step_left_out_is_noticed(recording: Path) -> None:
    first, _, _, *others = messages(recording)
    recording.write_bytes(frames(first, *others))
    with pytest.raises(PlanError, match=r"frame 2: message 2 where 1 was to come: one was lost or repeated"):
        read(recording)

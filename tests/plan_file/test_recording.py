"""`LLM(record_plans=...)`: what an engine did is in the file, whatever happened to the process."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cascade_llm import LLM, SamplingParams
from cascade_llm.errors import ConfigError, EngineClosedError
from cascade_llm.plan import StepResult
from cascade_llm.plan_file import PlanFileReader, PlanFileWriter, RecordedStep
from tests.engine.tiny_llm import save_tiny, tiny_llm
from tests.plan_file.recordings import header, read
from tests.scheduler.generated import generated_steps

PREFIX = list(range(3, 27))
PROMPTS = [[*PREFIX, 30 + i, 40 + i] for i in range(4)]
PARAMS = SamplingParams(temperature=0.8, max_tokens=7, n=2, ignore_eos=True, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def generate(folder: Path, path: Path, **options: Any) -> tuple[list[list[int]], LLM]:
    """What every sample got, in the order of requests and samples."""
    with tiny_llm(folder, record_plans=path, **options) as llm:
        outputs = llm.generate(PROMPTS, PARAMS)
        return [sample.token_ids for output in outputs for sample in output.outputs], llm


def sampled_by_lane(steps: list[RecordedStep]) -> list[list[int]]:
    """The tokens that each use of a lane got."""
    lanes: dict[tuple[int, int], list[int]] = {}
    epochs: dict[int, int] = {}
    for step in steps:
        epochs.update((start.lane, start.epoch) for start in step.plan.lane_starts)
        assert step.token_ids is not None
        for lane, token_id in zip(step.plan.sample_lanes, step.token_ids, strict=True):
            assert token_id is not None
            lanes.setdefault((lane, epochs[lane]), []).append(token_id)
    return list(lanes.values())


@pytest.mark.parametrize("lag", [0, 1])
def test_every_step_and_every_token_is_recorded(folder: Path, tmp_path: Path, lag: int) -> None:
    path = tmp_path / "plans.gz"
    tokens, llm = generate(folder, path, record_token_ids=True, schedule_lag=lag)
    steps = read(path)
    assert len(steps) == llm.stats()["steps"]
    assert sorted(sampled_by_lane(steps)) == sorted(tokens)
    last = llm.plan_report()["last_step"]
    assert steps[-1].plan.report.kv_tokens_read == last["kv_tokens_read"]
    kept = [
        later.plan.cascade.levels[0] is earlier.plan.cascade.levels[0]
        for earlier, later in pairwise(steps)
        if later.plan.cascade.shared_levels
    ]
    assert any(kept), "decode steps share the level object of the step before"


def test_the_header_says_what_the_engine_was(folder: Path, tmp_path: Path) -> None:
    _, llm = generate(folder, tmp_path / "plans.gz", max_model_len=64)
    with PlanFileReader(tmp_path / "plans.gz") as reader:
        found = reader.header
    found.check_model("itself", llm.facts.model)
    assert (found.model, found.dtype, found.page_size) == (llm.model_name, "float32", 4)
    assert (found.pool_pages, found.max_model_len, found.max_num_seqs) == ([llm.facts.total_pages], 64, 16)
    assert not found.token_ids


def test_tokens_do_not_depend_on_recording(folder: Path, tmp_path: Path) -> None:
    recorded, _ = generate(folder, tmp_path / "plans.gz", record_token_ids=True)
    with tiny_llm(folder) as llm:
        outputs = llm.generate(PROMPTS, PARAMS)
    assert recorded == [sample.token_ids for output in outputs for sample in output.outputs]


def test_a_crash_leaves_the_steps_before_it_and_the_one_that_crashed(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "plans.gz"
    code = f"""
import os
from tests.engine.tiny_llm import tiny_llm
llm = tiny_llm({str(folder)!r}, record_plans={str(path)!r})
stream = llm.stream({PROMPTS[0]})
next(stream), next(stream), next(stream)
print(llm.stats()["steps"], flush=True)
os._exit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert len(read(path, allow_truncated=True)) == int(done.stdout)


def test_an_existing_file_is_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "plans.gz").write_text("something else")
    generate(folder, tmp_path / "plans.gz")
    assert read(tmp_path / "plans.gz")


def test_a_path_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"record_plans is .*cannot be written \(No such file.*a folder that exists"):
        tiny_llm(folder, record_plans=tmp_path / "no" / "folder" / "plans.gz")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"record_plans": 3}, "record_plans is 3: it must be a file name"),
        ({"record_plans": ""}, "record_plans is '': it must be a file name"),
        ({"record_token_ids": True}, "it needs record_plans"),
        ({"record_token_ids": 1, "record_plans": "x"}, "record_token_ids is 1: it must be True or False"),
    ],
)
def test_wrong_options(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_llm(folder, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device of a full disk")
def test_a_full_disk_ends_the_recording_and_not_the_engine() -> None:
    plan, _ = next(generated_steps(0, 1))
    writer = PlanFileWriter("/dev/full", token_ids=True)
    with pytest.warns(RuntimeWarning, match="recording of step plans ended .*generation goes on"):
        writer.begin(header())
    writer.write_step(plan)
    writer.write_result(StepResult(step_id=plan.step_id, token_ids=[0] * len(plan.sample_rows)))
    writer.close()


def test_closing_completes_the_file(folder: Path, tmp_path: Path) -> None:
    _, llm = generate(folder, tmp_path / "plans.gz")
    with pytest.raises(EngineClosedError):
        llm.generate(PROMPTS)
    llm.close()
    assert read(tmp_path / "plans.gz")

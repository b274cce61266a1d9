"""What a start tells of its loading, and what is drawn of it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from cascade_llm.config import EngineOptions
from cascade_llm.engine.progress_bars import StartBars
from cascade_llm.loader.checkpoint import Checkpoint
from cascade_llm.loader.gguf_checkpoint import GGUFCheckpoint
from cascade_llm.loader.hf_folder import HuggingFaceCheckpoint
from cascade_llm.worker.process_executor import ProcessExecutor
from cascade_llm.worker.start_progress import CAPTURING, LOADING
from cascade_llm.worker.worker import build_worker
from tests.loader.gguf_files import write_model
from tests.models.checkpoints import tiny_model

OPTIONS = EngineOptions(dtype="float32", max_num_seqs=2, kv_cache_bytes=1 << 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(folder, max_shard_size="50KB")
    return folder


def check(told: list[tuple[str, int, int]], checkpoint: Checkpoint) -> None:
    assert {what for what, _, _ in told} == {LOADING}
    assert {total for _, _, total in told} == {checkpoint.num_bytes}
    done = [done for _, done, _ in told]
    assert done == sorted(done)
    assert 0 < done[0] < checkpoint.num_bytes
    assert done[-1] == checkpoint.num_bytes
    assert done[-2] > 0.9 * checkpoint.num_bytes, "told at the end alone"


@pytest.mark.parametrize("is_gguf", [False, True], ids=["safetensors", "gguf"])
def test_bytes_are_told_as_they_are_loaded(folder: Path, tmp_path: Path, is_gguf: bool) -> None:
    gguf = GGUFCheckpoint(write_model(tmp_path / "tiny.gguf", tiny_model("llama")))
    checkpoint = gguf if is_gguf else HuggingFaceCheckpoint(folder)
    told: list[tuple[str, int, int]] = []
    build_worker(OPTIONS, checkpoint, on_start=lambda *progress: told.append(progress))
    check(told, checkpoint)


def test_a_rank_in_another_process_tells_too(folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    ProcessExecutor(folder, OPTIONS, on_start=lambda *progress: told.append(progress)).close()
    check(told, HuggingFaceCheckpoint(folder))


def drawn(terminal: bool, seconds: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a loading of so many seconds draws."""
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
    monkeypatch.setenv("COLUMNS", "120")
    now = [0.0]
    with ExitStack() as bars:
        on_start = StartBars(bars, clock=lambda: now[0])
        for done in range(0, 5_000_001, 1_000_000):
            on_start(LOADING, done, 5_000_000)
            now[0] += seconds / 5
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_bar_is_drawn_on_terminals_of_what_takes_longer_than_a_second(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = drawn(True, 5.0, monkeypatch, capsys)
    assert "loading weights" in text
    assert "5.0/5.0 MB" in text
    assert drawn(True, 0.5, monkeypatch, capsys) == ""
    assert drawn(False, 5.0, monkeypatch, capsys).strip() == ""


def test_graphs_have_a_bar_of_their_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with ExitStack() as bars:
        on_start = StartBars(bars)
        on_start(LOADING, 1, 1)
        for done in (0, 1, 2):
            on_start(CAPTURING, done, 2)
    text = capsys.readouterr().err
    assert "capturing CUDA graphs" in text
    assert "2/2" in text
    assert LOADING not in text

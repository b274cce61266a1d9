"""The model against transformers: the same weights agree, others do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cascade_llm.config import EngineOptions
from cascade_llm.errors import UnsupportedModelError
from cascade_llm.loader.checkpoint import Checkpoint
from cascade_llm.loader.hf_folder import DummyCheckpoint
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.validation.report import Check
from cascade_llm.validation.transformers_check import check_transformers
from cascade_llm.validation.transformers_model import TransformersModel
from cascade_llm.worker.executor import LocalExecutor
from cascade_llm.worker.worker import build_worker
from tests.engine.tiny_llm import save_tiny
from tests.models.checkpoints import tiny_model
from tests.models.families import FAMILIES

PROMPTS = [[5], [7, 8, 9, 10, 11], list(range(20, 60))]


def run(ours: Checkpoint, theirs: Checkpoint, dtype: str = "float32") -> list[Check]:
    executor = LocalExecutor(
        *build_worker(EngineOptions(dtype=dtype, max_num_seqs=4, max_model_len=64, page_size=4), ours)
    )
    return check_transformers(
        executor, theirs, PROMPTS, page_size=4, num_new=6, progress=lambda what, done, total: None
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_the_same_weights_agree(tmp_path: Path, architecture: str, dtype: str) -> None:
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", architecture))
    checks = run(checkpoint, checkpoint, dtype)
    assert [check.passed for check in checks] == [True] * 3, checks
    assert checks[2].figures["tokens"] == len(PROMPTS) * 6
    assert (checks[0].figures["transformers_own"] > 0) == (dtype == "bfloat16")


def test_another_epsilon_is_found(tmp_path: Path) -> None:
    theirs = save_tiny(tmp_path / "theirs")
    ours = save_tiny(tmp_path / "ours")
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    checks = run(open_checkpoint(ours), open_checkpoint(theirs))
    assert checks[0].passed is False
    assert checks[1].passed is False


def test_dummy_weights_are_skipped(tmp_path: Path) -> None:
    checkpoint = DummyCheckpoint(save_tiny(tmp_path / "model"))
    (check,) = run(checkpoint, checkpoint)
    assert check.verdict == "skipped"
    assert "dummy weights" in check.note


class Renamed(DummyCheckpoint):
    """Tensors under names that nobody knows."""

    def tensors(self):  # type: ignore[no-untyped-def]
        return iter([("something.weight", torch.zeros(2))])


def test_what_transformers_cannot_build_is_said(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=r"transformers wants model\.embed_tokens\.weight"):
        TransformersModel(Renamed(folder), torch.float32, torch.device("cpu"))
    config = {**json.loads((folder / "config.json").read_text()), "model_type": "no-such-model"}
    with pytest.raises(UnsupportedModelError, match="transformers cannot build"):
        TransformersModel(DummyCheckpoint(config), torch.float32, torch.device("cpu"))


def test_log_probabilities_are_those_of_the_model(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model"))
    found = TransformersModel(checkpoint, torch.float32, torch.device("cpu")).logprobs(PROMPTS[2])
    with torch.inference_mode():
        expected = tiny_model("llama", max_position_embeddings=256)(torch.tensor([PROMPTS[2]])).logits[0]
    torch.testing.assert_close(found, expected.log_softmax(-1), atol=1e-4, rtol=0)
